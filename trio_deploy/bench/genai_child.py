"""Answer with OpenVINO GenAI, once per line read: the path of an .npy file of pictures.

A program for another Python environment, so it imports nothing of this package;
`contenders/genai.py` starts it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    import openvino
    import openvino_genai

    options = json.loads(sys.argv[1])
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": options["precision"]}
    if options["threads"]:
        properties["INFERENCE_NUM_THREADS"] = options["threads"]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = options["most_tokens"]  # else prompts are run in parts
    properties["scheduler_config"] = scheduler
    pipeline = openvino_genai.VLMPipeline(options["folder"], "CPU", **properties)
    config = pipeline.get_generation_config()
    config.max_new_tokens = options["new_tokens"]
    config.ignore_eos = True
    ratio = options["pruning_ratio"]
    pruning = None if ratio is None else {"known": hasattr(config, "pruning_ratio"), "ratio": ratio}
    for line in sys.stdin:
        pictures = [openvino.Tensor(picture[None]) for picture in np.load(line.strip())]

        def answer(pictures: list[Any] = pictures) -> Any:
            return pipeline.generate(options["prompt"], images=pictures, generation_config=config)

        plain = None
        if pruning is not None and pruning["known"] and "same" not in pruning:
            plain = answer()  # once, to tell what the pruner does
            config.pruning_ratio = ratio
        start = time.perf_counter()
        result = answer()
        wall = time.perf_counter() - start
        if pruning is not None and plain is not None:
            pruning["before"] = plain.perf_metrics.get_num_input_tokens()
            pruning["after"] = result.perf_metrics.get_num_input_tokens()
            pruning["same"] = plain.texts == result.texts
            pruning["relevance_weight"] = getattr(config, "relevance_weight", None)
        metrics = result.perf_metrics
        several = options["new_tokens"] > 1
        reply = {
            "first_token_s": metrics.get_ttft().mean / 1000,
            "prepare_s": _seconds(metrics, "get_prepare_embeddings_duration"),
            "wall_s": wall,
            "tokens_per_s": 1000 / metrics.get_tpot().mean if several else 0.0,
            "input_tokens": metrics.get_num_input_tokens(),
            "pruning": pruning,
            "peak_mib": _peak_mib(),
            "version": openvino_genai.__version__,
        }
        print(json.dumps(reply), flush=True)


def _seconds(metrics: Any, name: str) -> float | None:
    """A figure of the metrics; None where this version has none."""
    figure = getattr(metrics, name, None)
    return None if figure is None else figure().mean / 1000


def _peak_mib() -> float | None:
    """Peak resident memory, VmHWM of /proc/self/status; None on other systems."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main()
