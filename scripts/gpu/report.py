"""Results of the GPU check: the bounds on speed, and the page of all results."""

from __future__ import annotations

import re
from typing import Any

NEW_TOKENS = 64


def speed_bounds(
    unpruned: dict[str, Any], pruned: dict[str, Any], decode_bytes: int, bandwidth: float
) -> list[tuple[str, bool, str, float]]:
    """Compare speeds with their bounds: name, whether it is met, the figure as text, its value.

    Args:
        unpruned, pruned: cases of `trio bench`'s JSON, generating `NEW_TOKENS` tokens.
        decode_bytes: bytes of the weights that a decode step reads.
        bandwidth: bytes read and written per second of a copy.
    """

    def whole(case: dict[str, Any]) -> float:
        later = (NEW_TOKENS - 1) / case["tokens_per_s"]["median"]
        return float(case["first_token_s"]["median"] + later)

    prefill = unpruned["prefill_s"]["median"] / pruned["prefill_s"]["median"]
    share = pruned["groups_s"]["selection"]["median"] / pruned["prefill_s"]["median"]
    end_to_end = whole(unpruned) / whole(pruned)
    floor = decode_bytes / bandwidth
    step = 1 / pruned["tokens_per_s"]["median"]
    return [
        ("prefill", prefill >= 4.5, f"{prefill:.2f}x faster than unpruned (bound 4.5x)", prefill),
        ("selection", share <= 0.05, f"{share:.1%} of the prefill (bound 5 %)", share),
        (
            "end to end",
            end_to_end >= 2.14,
            f"{end_to_end:.2f}x faster with {NEW_TOKENS} new tokens (bound 2.14x)",
            end_to_end,
        ),
        (
            "decode",
            step <= 1.15 * floor,
            f"{1e3 * step:.2f} ms per token, {step / floor:.2f} times the {1e3 * floor:.2f} ms "
            "that reading the weights takes at the bandwidth of a copy (bound 1.15)",
            step / floor,
        ),
    ]


def to_markdown(found: dict[str, Any]) -> str:
    """The report in Markdown, of the results so far."""
    about = [f"Compute capability {found['compute_capability']}"] * ("compute_capability" in found)
    if "driver" in found:
        about.append(f"CUDA {found['driver']} by its driver, {found['memory_gib']} GiB")
    if "tensorrt" in found:
        about.append(f"TensorRT {found['tensorrt']}, {found['dialect']} graphs")
    if "copy_gb_per_s" in found:
        about.append(f"a copy in its memory reads and writes {found['copy_gb_per_s']:.0f} GB/s")
    lines = [
        f"# {found['gpu']}",
        "",
        "Command: `scripts/gpu_check.sh`.",
        "",
        f"{'; '.join(about) or 'Nothing is known of its TensorRT'}.",
        "",
        "| check | holds | found |",
        "|---|---|---|",
    ]
    for name, check in found["checks"].items():
        lines.append(
            f"| {name} | {'yes' if check['passed'] else '**no**'} | {_cell(check['text'])} |"
        )
    large = found.get("large", {})
    rows = [(case["name"], "TensorRT", case) for case in large.get("bench", {}).get("cases", [])]
    torch = large.get("torch") or {}
    rows += [
        (kind, f"torch, {torch['device']}, {torch[kind]['dtype']}", torch[kind])
        for kind in ("transformers", "oracle")
        if kind in torch
    ]
    if rows:
        lines += ["", f"## {large['name']}, random weights, {large['decode_layout']} decode", ""]
        lines += ["| case | with | prefill | first token | tokens/s |", "|---|---|---|---|---|"]
        for name, by, case in rows:
            prefill, first, rate = (
                case[key]["median"] for key in ("prefill_s", "first_token_s", "tokens_per_s")
            )
            lines.append(
                f"| {name} | {by} | {1e3 * prefill:.1f} ms | {1e3 * first:.1f} ms | {rate:.1f} |"
            )
    return "\n".join(lines) + "\n"


def slug(name: str) -> str:
    """A GPU's name in file names, such as nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
