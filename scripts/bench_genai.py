"""Time to first token of OpenVINO GenAI's VLMPipeline on a LLaVA checkpoint, as JSON on stdout.

The baseline of `bench_core.py --only genai`. It runs in a virtual environment of its own, since
optimum-intel needs an older transformers than the reference does:

    python -m venv genai && genai/bin/pip install torch==2.13.0
    genai/bin/pip install "transformers<5" openvino-genai nncf optimum
    genai/bin/pip install --no-deps optimum-intel
    genai/bin/python scripts/bench_genai.py --checkpoint DIR --precision bf16

Every run is given new random pictures: the pipeline would answer a repeated one from its prefix
cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai


def convert(checkpoint: Path) -> Path:
    """Converts the checkpoint with optimum-intel into a folder beside it, unless it is there."""
    target = checkpoint.with_name(checkpoint.name + "-openvino-fp32")
    if not (target / "openvino_detokenizer.xml").exists():
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
        command += ["--model", str(checkpoint), "--task", "image-text-to-text"]
        command += ["--weight-format", "fp32", str(target)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return target


def first_token_times(
    folder: Path, precision: str, images: int, side: int, prompt: str, repeats: int, threads: int
) -> tuple[list[float], int]:
    """Returns each run's seconds to the first token after one warm-up, and the prompt tokens."""
    pipeline = genai.VLMPipeline(
        str(folder), "CPU", INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=threads
    )
    config = genai.GenerationConfig()
    config.max_new_tokens = 2
    config.ignore_eos = True
    config.do_sample = False
    rng = np.random.default_rng(0)
    seconds, tokens = [], 0
    for _ in range(repeats + 1):
        pictures = [
            ov.Tensor(rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8))
            for _ in range(images)
        ]
        metrics = pipeline.generate(prompt, images=pictures, generation_config=config).perf_metrics
        seconds.append(metrics.get_ttft().mean / 1000)
        tokens = metrics.get_num_input_tokens()
    return seconds[1:], tokens


def main() -> None:
    """Parses the command line, measures, and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="bf16")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--side", type=int, default=336, help="pixels along a side of a picture")
    parser.add_argument("--prompt", default="what is in the picture?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    seconds, tokens = first_token_times(
        convert(args.checkpoint),
        args.precision,
        args.images,
        args.side,
        args.prompt,
        args.repeats,
        args.threads,
    )
    print(
        json.dumps(
            {
                "precision": args.precision,
                "prompt_tokens": tokens,
                "first_token_s": seconds,
                "median_s": statistics.median(seconds),
                "openvino_genai": genai.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
