"""Speed and size of pruned inference, ratios within one run.

    python scripts/bench_core.py --out docs/measurements            # the published figures
    python scripts/bench_core.py --size quick                       # a smoke test in seconds

What is compared runs side by side in this one process (or, for another Python environment, in a
child that waits for its turn), interleaved run by run, with new pictures in every run, after
warm-up; medians are reported. Peak memory is that of a fresh process for each pipeline.

Model: a random-initialised LLaVA-1.5 with five pictures of 576 tokens in its prompt, so 2880 visual
and 64 text tokens; weights do not change what a matrix product costs. OpenVINO GenAI is optional
and needs an environment of its own (optimum-intel pins an older transformers): make one with
`pip install openvino-genai optimum-intel` (and `pip uninstall torchvision` where torch is the CPU
build, which PyPI's torchvision does not fit), and pass its interpreter as --genai-python.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

IMAGES = 5
TEXT_TOKENS = 64
SECTIONS = ("ort", "openvino", "genai", "saliency", "export", "decode")


@dataclass(frozen=True)
class Size:
    """One model to measure on; `saliency_hidden` is the width of the saliency comparison."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    image: int
    schedule: str
    saliency_hidden: int
    saliency_intermediate: int
    runs: int
    new_tokens: int
    patch: int = 14
    vision_hidden: int = 256
    vision_layers: int = 3

    @property
    def visual(self) -> int:
        """Visual tokens of all pictures together."""
        return IMAGES * (self.image // self.patch) ** 2


SIZES = {
    # 11.1 % of 2880 visual tokens, averaged over the 16 layers: (2880 + 4·292 + 3·171 + 8·70) / 16
    "full": Size(1024, 2816, 16, 16, 32000, 336, "1:292,5:171,8:70", 2048, 5504, 7, 48),
    "small": Size(256, 704, 16, 4, 4096, 168, "1:73,5:43,8:18", 512, 1408, 3, 24),
    "quick": Size(64, 128, 10, 4, 512, 56, "1:8,5:5,8:2", 64, 128, 2, 8),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure, the bound it is held to, and whether it keeps it."""

    what: str
    ours: str
    other: str
    figure: str
    bound: str
    met: bool | None


# ------------------------------------------------------------------------------------- checkpoints


def checkpoint(cache: Path, size: Size, *, hidden: int, intermediate: int, layers: int) -> Path:
    """A random-initialised LLaVA-1.5 folder in the layout of hub checkpoints, made once."""
    folder = cache / f"llava-{hidden}x{layers}-{size.vocab}-{size.image}"
    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a byte is a token: lengths are known
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        "{% for message in messages %}{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    head = hidden // size.heads if hidden == size.hidden else min(128, hidden)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=size.vision_hidden,
            intermediate_size=2 * size.vision_hidden,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=4,
            image_size=size.image,
            patch_size=size.patch,
            projection_dim=size.vision_hidden,
        ),
        text_config=LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // head,
            num_key_value_heads=hidden // head,
            vocab_size=size.vocab,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_index=4,
        image_seq_length=(size.image // size.patch) ** 2,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": size.image},
            crop_size={"height": size.image, "width": size.image},
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            additional_special_tokens=["<image>"],
            chat_template=template,
        ),
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    # Names and keys as on the hub, which every release of transformers reads.
    file = folder / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    tensors = {
        name.replace(old, new, 1) if name.startswith(old) and not name.startswith(new) else name: t
        for name, t in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    rope = raw["text_config"].pop("rope_parameters", None)
    if rope:
        raw["text_config"]["rope_theta"] = rope["rope_theta"]
    raw["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    images = json.loads((folder / "processor_config.json").read_text()).get("image_processor")
    if images:
        images["image_processor_type"] = "CLIPImageProcessor"
        (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=1))
    (folder / "done").touch()
    return folder


def main_checkpoint(cache: Path, size: Size) -> Path:
    """The checkpoint that most sections measure on."""
    return checkpoint(
        cache, size, hidden=size.hidden, intermediate=size.intermediate, layers=size.layers
    )


def bundles(cache: Path, size: Size, dialect: str) -> tuple[Path, Path]:
    """(pruned, unpruned) bundles of the main checkpoint, weights linked."""
    from trio_deploy.export import export
    from trio_deploy.schedule import Schedule

    source = main_checkpoint(cache, size)
    result = []
    for name, schedule in (("pruned", Schedule.parse(size.schedule)), ("unpruned", Schedule())):
        out = cache / f"{source.name}-{dialect}-{name}"
        export(
            source,
            out,
            schedule=schedule,
            dialect=dialect,
            dtype="float32",
            link_weights=True,
            force=True,
            progress=False,
        )
        result.append(out)
    return result[0], result[1]


def pictures(size: int, seed: int) -> list[Any]:
    """New pictures for a run: coarse colours with noise on them."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    result = []
    for _ in range(IMAGES):
        coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        base = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
        noisy = base + rng.normal(0, 12, base.shape)
        result.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return result


def prompt_text() -> str:
    """As many characters, each a token, as text tokens are wanted."""
    return ("What is in these pictures, and which of them shows the most? " * 4)[:TEXT_TOKENS]


# --------------------------------------------------------------------------------------- measuring


def interleave(
    runs: int, contenders: dict[str, Callable[[int], Any]], warm_up: int = 2
) -> dict[str, list[Any]]:
    """Results of each contender's runs; one after the other within a run, order reversed each."""
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for run in range(-warm_up, runs):
        order = list(contenders) if run % 2 else list(reversed(contenders))
        for name in order:
            result = contenders[name](run + warm_up)
            if run >= 0:
                results[name].append(result)
    return results


def summary(generations: list[Any]) -> dict[str, float]:
    """Medians in seconds: prefill (embedding, segments, selections), selections, first token."""

    def stage(prefixes: tuple[str, ...]) -> float:
        return median(
            sum(s for name, s in g.timings.items() if name.startswith(prefixes))
            for g in generations
        )

    return {
        "prefill_s": stage(("embed", "prefill_", "select_")),
        "select_s": stage(("select_",)),
        "vision_s": stage(("vision", "preprocess")),
        "first_token_s": median(g.first_token_s for g in generations),
        "tokens_per_s": median(g.tokens_per_s for g in generations),
        "kv_mib": median(g.kv_bytes for g in generations) / 2**20,
    }


def pipeline(bundle: Path, runtime: str, threads: int, precision: str | None = None) -> Any:
    from trio_deploy.runtime.pipeline import TrioPipeline

    return TrioPipeline.from_bundle(bundle, runtime, threads=threads, precision=precision)


def answer(pipe: Any, size: Size, new_tokens: int) -> Callable[[int], Any]:
    """A contender that answers about new pictures; checks that lengths are what they should be."""

    def run(seed: int) -> Any:
        content = [{"type": "image"}] * IMAGES + [{"type": "text", "text": prompt_text()}]
        result = pipe.generate(
            pictures(size.image, seed),
            [{"role": "user", "content": content}],
            max_new_tokens=new_tokens,
        )
        assert result.visual_tokens == size.visual, result.visual_tokens
        assert result.prompt_tokens == size.visual + TEXT_TOKENS, result.prompt_tokens
        return result

    return run


def peak_memory(
    bundle: Path, runtime: str, threads: int, precision: str | None, size: str
) -> float:
    """MiB at most resident in a fresh process that loads a bundle and answers twice."""
    command = [
        sys.executable,
        __file__,
        "--child-peak",
        json.dumps([str(bundle), runtime, threads, precision]),
        "--size",
        size,
    ]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(out.stderr)
    return float(out.stdout.split()[-1])


def own_peak_mib() -> float:
    """MiB this process has had resident at most.

    Not getrusage's figure: a child's maxrss starts at what its parent held when it was forked.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child_peak(arguments: str, size: Size) -> None:
    """What `peak_memory` starts."""
    bundle, runtime, threads, precision = json.loads(arguments)
    run = answer(pipeline(Path(bundle), runtime, threads, precision), size, 4)
    for seed in range(2):
        run(seed)
    print(own_peak_mib())


def child_export(out: str) -> None:
    """What `bench_export` starts: `trio export --graphs-only`, and the memory it took."""
    from trio_deploy import cli

    arguments = ["--model", "llava-next-7b", "--graphs-only", "--out", out]
    with contextlib.redirect_stdout(sys.stderr):
        status = cli.main(["export", *arguments])
    print(own_peak_mib())
    sys.exit(status)


# ---------------------------------------------------------------------------------------- sections


def bench_prefill(
    cache: Path, size: Size, name: str, threads: int, runtime: str, precisions: list[str | None]
) -> tuple[dict[str, Any], list[Row]]:
    """Pruned against unpruned prefill, the selections' share and peak memory."""
    dialect = "ort" if runtime == "onnxruntime" else "primitive"
    pruned, unpruned = bundles(cache, size, dialect)
    contenders = {}
    for precision in precisions:
        for kind, bundle in (("pruned", pruned), ("unpruned", unpruned)):
            pipe = pipeline(bundle, runtime, threads, precision)
            contenders[f"{kind} {precision or 'float32'}"] = answer(pipe, size, 1)
    results = {key: summary(value) for key, value in interleave(size.runs, contenders).items()}
    del contenders, pipe
    rows = []
    for precision in precisions:
        label = precision or "float32"
        ours, other = results[f"pruned {label}"], results[f"unpruned {label}"]
        for kind, bundle in (("pruned", pruned), ("unpruned", unpruned)):
            mib = peak_memory(bundle, runtime, threads, precision, name)
            results[f"{kind} {label}"]["peak_mib"] = mib
        ratio, share = other["prefill_s"] / ours["prefill_s"], ours["select_s"] / ours["prefill_s"]
        bound = 4.5 if precision == "bfloat16" else 6.0
        rows += [
            Row(
                f"{runtime} {label}: prefill, pruned against unpruned",
                f"{ours['prefill_s']:.3f} s",
                f"{other['prefill_s']:.3f} s",
                f"{ratio:.2f}x",
                f"≥ {bound}x",
                ratio >= bound,
            ),
            Row(
                f"{runtime} {label}: saliency and selection, share of the pruned prefill",
                f"{ours['select_s']:.3f} s",
                f"{ours['prefill_s']:.3f} s",
                f"{share:.1%}",
                "≤ 10 %" if runtime == "onnxruntime" else "",
                share <= 0.1 if runtime == "onnxruntime" else None,
            ),
            Row(
                f"{runtime} {label}: peak memory, pruned against unpruned",
                f"{ours['peak_mib']:.0f} MiB",
                f"{other['peak_mib']:.0f} MiB",
                f"{ours['peak_mib'] / other['peak_mib']:.2f}",
                "≤ 1" if runtime == "onnxruntime" else "",
                ours["peak_mib"] <= other["peak_mib"] if runtime == "onnxruntime" else None,
            ),
        ]
    return results, rows


def bench_decode(cache: Path, size: Size, threads: int) -> tuple[dict[str, Any], list[Row]]:
    """Tokens a second after the first: pruned, unpruned, and transformers on the same weights."""
    import torch

    pruned, unpruned = bundles(cache, size, "ort")
    step = transformers_decode(main_checkpoint(cache, size), size, threads)
    contenders = {
        "pruned": answer(pipeline(pruned, "onnxruntime", threads), size, size.new_tokens),
        "unpruned": answer(pipeline(unpruned, "onnxruntime", threads), size, size.new_tokens),
        "transformers": step,
    }
    with torch.inference_mode():
        raw = interleave(max(2, size.runs // 2), contenders, warm_up=1)
    speeds = {
        name: median(run if name == "transformers" else run.tokens_per_s for run in runs)
        for name, runs in raw.items()
    }
    kv = {name: median(run.kv_bytes for run in raw[name]) for name in ("pruned", "unpruned")}
    rows = [
        Row(
            f"decode, pruned against {name} (onnxruntime float32)",
            f"{speeds['pruned']:.2f} tokens/s",
            f"{speeds[name]:.2f} tokens/s",
            f"{speeds['pruned'] / speeds[name]:.2f}x",
            "≥ 1x",
            speeds["pruned"] >= speeds[name],
        )
        for name in ("unpruned", "transformers")
    ]
    return {"tokens_per_s": speeds, "kv_bytes": kv}, rows


def transformers_decode(folder: Path, size: Size, threads: int) -> Callable[[int], float]:
    """Tokens a second of the bare loop over transformers' own model, without `generate`."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.set_num_threads(threads)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(
        folder, image_processor=CLIPImageProcessorPil.from_pretrained(folder)
    )

    def run(seed: int) -> float:
        text = "<image>" * IMAGES + prompt_text()
        inputs = processor(images=pictures(size.image, seed), text=text, return_tensors="pt")
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(size.new_tokens - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return (size.new_tokens - 1) / (time.perf_counter() - start)

    return run


def bench_saliency(cache: Path, size: Size, threads: int) -> tuple[dict[str, Any], list[Row]]:
    """A whole select stage (saliency, suppression, compaction) against an autograd probe.

    The probe: one transformers decoder layer forward on all tokens, final norm, the language-model
    head on all positions, cross-entropy, and the gradient of the layer's input, parameters frozen.
    """
    import numpy as np
    import torch
    from transformers import LlavaForConditionalGeneration

    from trio_deploy.export import export
    from trio_deploy.runtime.engine import open_engine

    source = checkpoint(
        cache,
        size,
        hidden=size.saliency_hidden,
        intermediate=size.saliency_intermediate,
        layers=2,
    )
    keep = max(1, round(size.visual * 0.111))
    bundle = export(
        source,
        cache / f"{source.name}-saliency",
        schedule=f"1:{keep}",
        dtype="float32",
        dialect="ort",
        link_weights=True,
        force=True,
        progress=False,
    )
    engine = open_engine(bundle.graph("select_1"), threads=threads)
    total, width = size.visual + TEXT_TOKENS, size.saliency_hidden
    rng = np.random.default_rng(0)
    # Rows like those of a picture: neighbours resemble each other, so that suppression has work.
    centres = rng.standard_normal((max(8, size.visual // 12), width))
    rows = centres[rng.integers(0, len(centres), total)]
    rows = (rows + 0.4 * rng.standard_normal(rows.shape)).astype(np.float32)
    visual = np.zeros((1, total), bool)
    visual[0, 1 : 1 + size.visual] = True
    feeds = {
        "hidden_states": rows[None],
        "position_ids": np.arange(total, dtype=np.int64)[None],
        "lengths": np.array([total]),
        "visual_mask": visual,
        "keep": np.array([keep]),
        "width": np.array([TEXT_TOKENS + keep]),
    }
    torch.set_num_threads(threads)
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    text, head = model.model.language_model.requires_grad_(False), model.lm_head
    head.requires_grad_(False)
    probes = 4

    def autograd(_: int) -> tuple[float, Any]:
        start = time.perf_counter()
        x = torch.from_numpy(rows[None]).requires_grad_(True)
        rope = text.rotary_emb(x, torch.arange(total)[None])
        out = text.layers[1](x, position_embeddings=rope, attention_mask=None)
        out = out[0] if isinstance(out, tuple) else out
        logits = head(text.norm(out)).float()[0, total - probes : total]
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(-1).detach())
        (gradient,) = torch.autograd.grad(loss, x)
        saliency = gradient[0].norm(dim=-1)
        return time.perf_counter() - start, saliency.numpy()

    def analytic(_: int) -> tuple[float, Any]:
        start = time.perf_counter()
        out = engine.run(feeds)
        return time.perf_counter() - start, out["saliency"][0]

    raw = interleave(size.runs, {"analytic": analytic, "autograd": autograd})
    ours = median(seconds for seconds, _ in raw["analytic"])
    other = median(seconds for seconds, _ in raw["autograd"])
    a, b = raw["analytic"][0][1][visual[0]], raw["autograd"][0][1][visual[0]]
    # The analytic one is scaled by a power of two and free of cancellation: compare shapes.
    correlation = float(np.corrcoef(a / np.linalg.norm(a), b / np.linalg.norm(b))[0, 1])
    row = Row(
        f"select stage (saliency and suppression) against the autograd probe, d = {width}",
        f"{ours:.3f} s",
        f"{other:.3f} s",
        f"{other / ours:.1f}x",
        "≥ 10x",
        other / ours >= 10,
    )
    figures = {"select_s": ours, "autograd_s": other, "correlation": correlation, "keep": keep}
    return figures, [row]


def bench_export(cache: Path, size: Size) -> tuple[dict[str, Any], list[Row]]:
    """Full-size graphs without weights, from a fresh process; and what --link-weights writes."""
    from trio_deploy.bundle import Bundle
    from trio_deploy.export import export

    seconds, peaks = [], []
    for _ in range(3):
        out = Path(tempfile.mkdtemp(dir=cache)) / "bundle"
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, __file__, "--child-export", str(out)], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - start)
        if process.returncode:
            raise RuntimeError(process.stderr)
        peaks.append(float(process.stdout.split()[-1]))
        stages = Bundle.load(out).stages
        shutil.rmtree(out.parent)
    source = main_checkpoint(cache, size)
    linked = export(
        source,
        cache / "linked",
        schedule=size.schedule,
        dtype="float32",
        link_weights=True,
        force=True,
        progress=False,
    )
    own = {path.stat().st_ino for path in source.iterdir()}
    files = list((linked.path / "weights").iterdir())
    written = sum(f.stat().st_size for f in files if f.stat().st_ino not in own)
    held = sum(f.stat().st_size for f in files)
    took, peak = median(seconds), max(peaks)
    rows = [
        Row(
            "all graphs of llava-next-7b (--graphs-only), time of the command",
            f"{took:.2f} s",
            "",
            f"{len(stages)} graphs",
            "< 5 s",
            took < 5,
        ),
        Row(
            "the same, peak memory",
            f"{peak:.0f} MiB",
            "",
            "",
            "< 500 MiB",
            peak < 500,
        ),
        Row(
            "weight bytes written with --link-weights",
            f"{written} B",
            f"{held / 2**20:.1f} MiB of weights",
            "",
            "0 B",
            written == 0,
        ),
    ]
    figures = {"graphs_only_s": seconds, "graphs_only_mib": peaks, "linked_bytes_written": written}
    return figures, rows


def bench_genai(
    cache: Path, size: Size, threads: int, python: str
) -> tuple[dict[str, Any], list[Row]] | str:
    """Time to the first token against OpenVINO GenAI's VLMPipeline, both in bfloat16.

    Returns:
        A message instead of figures where GenAI or optimum-intel is not installed.
    """
    probe = "import openvino_genai, optimum.intel, openvino_tokenizers"
    check = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    if check.returncode:
        reason = check.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return (
            f"skipped: {Path(python).name} has no OpenVINO GenAI ({reason[0]}); pip install "
            "openvino-genai optimum-intel into an environment of its own and pass its interpreter "
            "as --genai-python"
        )
    source = main_checkpoint(cache, size)
    converted = cache / f"{source.name}-genai"
    if not (converted / "openvino_language_model.xml").is_file():
        command = [python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        options = ["--task", "image-text-to-text", "--weight-format", "fp16"]
        out = subprocess.run(
            [*command, "--model", str(source), *options, str(converted)],
            capture_output=True,
            text=True,
        )
        if out.returncode:
            last = (out.stderr.strip().splitlines() or ["no message"])[-1]
            return f"skipped: optimum-intel did not convert the checkpoint ({last})"
    # GenAI reads this file alone, which newer transformers fold into processor_config.json.
    shutil.copy(source / "preprocessor_config.json", converted)
    arguments = json.dumps([str(converted), threads, size.image])
    child = subprocess.Popen(
        [python, __file__, "--child-genai", arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    ask, reply = child.stdin, child.stdout

    def genai(seed: int) -> dict[str, Any]:
        print(seed, file=ask, flush=True)
        for line in reply:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError("the GenAI process ended")

    pruned, _ = bundles(cache, size, "primitive")
    pipe = pipeline(pruned, "openvino", threads, "bfloat16")
    try:
        raw = interleave(size.runs, {"pruned": answer(pipe, size, 1), "genai": genai})
    finally:
        with contextlib.suppress(BrokenPipeError):
            ask.close()
        child.wait(30)
    ours = median(run.first_token_s for run in raw["pruned"])
    other = median(run["first_token_s"] for run in raw["genai"])
    row = Row(
        "time to first token, pruned (openvino bfloat16) against OpenVINO GenAI bfloat16",
        f"{ours:.3f} s",
        f"{other:.3f} s",
        f"{other / ours:.2f}x",
        "≥ 4x",
        other / ours >= 4,
    )
    figures = {
        "pruned": summary(raw["pruned"]),
        "genai_first_token_s": other,
        "genai_input_tokens": raw["genai"][0]["input_tokens"],
        "genai_version": raw["genai"][0]["version"],
    }
    return figures, [row]


def child_genai(arguments: str) -> None:
    """What `bench_genai` starts, in GenAI's environment: answers once for each line it reads."""
    import numpy as np
    import openvino
    import openvino_genai

    folder, threads, image = json.loads(arguments)
    pipe = openvino_genai.VLMPipeline(
        folder, "CPU", INFERENCE_PRECISION_HINT="bf16", INFERENCE_NUM_THREADS=threads
    )
    for line in sys.stdin:
        tensors = [openvino.Tensor(np.asarray(p)[None]) for p in pictures(image, int(line))]
        start = time.perf_counter()
        result = pipe.generate(prompt_text(), images=tensors, max_new_tokens=1)
        wall = time.perf_counter() - start
        metrics = result.perf_metrics
        reply = {
            "first_token_s": metrics.get_ttft().mean / 1000,
            "wall_s": wall,
            "input_tokens": metrics.get_num_input_tokens(),
            "version": openvino_genai.__version__,
        }
        print(json.dumps(reply), flush=True)


# ------------------------------------------------------------------------------------------ output


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    versions = {}
    for name in ("trio-deploy", "onnxruntime", "openvino", "torch", "transformers", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
    }


def markdown(report: dict[str, Any], rows: list[Row]) -> str:
    """The table, with what it was measured on."""
    on, size = report["machine"], report["size"]
    lines = [
        "# Speed and size",
        "",
        f"Command: `{report['command']}`.",
        "",
        f"Machine: {on['cpu']}, {on['cores']} cores, {on['threads']} threads used, "
        f"{on['memory_gib']} GiB; {on['system']}; "
        + ", ".join(f"{k} {v}" for k, v in on["versions"].items())
        + ".",
        f"Load average before and after: {report['load_before']:.2f}, {report['load_after']:.2f}.",
        "",
        f"Model: random-initialised LLaVA-1.5, d = {size['hidden']}, {size['layers']} layers, "
        f"{size['heads']} heads, vocabulary {size['vocab']}, {report['visual_tokens']} visual + "
        f"{TEXT_TOKENS} text tokens; pruned to {size['schedule']} (layer:tokens). "
        f"Medians of {size['runs']} interleaved runs after warm-up, new pictures in each.",
        "",
        "| what | ours | against | figure | to reach | reached |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        met = {True: "yes", False: "**no**", None: ""}[row.met]
        lines.append(
            f"| {row.what} | {row.ours} | {row.other} | {row.figure} | {row.bound} | {met} |"
        )
    for name, message in report["skipped"].items():
        lines += ["", f"{name}: {message}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--quick", action="store_const", const="quick", dest="size")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for core.json and core.md")
    parser.add_argument("--cache", type=Path, help="where checkpoints are kept between runs")
    parser.add_argument("--genai-python", default=sys.executable)
    parser.add_argument("--child-peak", help=argparse.SUPPRESS)
    parser.add_argument("--child-export", help=argparse.SUPPRESS)
    parser.add_argument("--child-genai", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.child_peak:
        child_peak(args.child_peak, size)
        return 0
    if args.child_export:
        child_export(args.child_export)
    if args.child_genai:
        child_genai(args.child_genai)
        return 0
    wanted = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"unknown section {min(unknown)}: choose from {', '.join(SECTIONS)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.ExitStack() as stack:
        cache = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache.mkdir(parents=True, exist_ok=True)
        sections: dict[str, Callable[[], tuple[dict[str, Any], list[Row]] | str]] = {
            "ort": lambda: bench_prefill(
                cache, size, args.size, args.threads, "onnxruntime", [None]
            ),
            "openvino": lambda: bench_prefill(
                cache, size, args.size, args.threads, "openvino", ["float32", "bfloat16"]
            ),
            "genai": lambda: bench_genai(cache, size, args.threads, args.genai_python),
            "saliency": lambda: bench_saliency(cache, size, args.threads),
            "export": lambda: bench_export(cache, size),
            "decode": lambda: bench_decode(cache, size, args.threads),
        }
        command = "python scripts/bench_core.py"
        if args.size != "full":
            command += f" --size {args.size}"
        if args.only:
            command += f" --only {args.only}"
        report: dict[str, Any] = {
            "command": command,
            "machine": machine(args.threads),
            "size": asdict(size),
            "visual_tokens": size.visual,
            "load_before": os.getloadavg()[0],
            "figures": {},
            "skipped": {},
        }
        rows: list[Row] = []
        for name in wanted:
            print(f"{name} …", file=sys.stderr, flush=True)
            result = sections[name]()
            if isinstance(result, str):
                report["skipped"][name] = result
                continue
            report["figures"][name], lines = result
            # Bounds are about the full size alone; at the others, fixed costs rule.
            rows += lines if args.size == "full" else [replace(r, met=None) for r in lines]
    report["load_after"] = os.getloadavg()[0]
    report["rows"] = [asdict(row) for row in rows]
    table = markdown(report, rows)
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "core.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "core.md").write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
