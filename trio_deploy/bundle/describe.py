"""A bundle in words, as `trio inspect` prints it."""

from __future__ import annotations

import os
import re

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import (
    WEIGHTS,
    TensorInfo,
)
from trio_deploy.files import format_bytes


def inspect(bundle: Bundle | str | os.PathLike[str], *, interface: bool = True) -> str:
    """A bundle in words: model, schedule, weights; with `interface`, each stage's tensors."""
    it = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    manifest, text = it.manifest, it.config.text
    graphs = {stage: manifest.files[g.file].size for stage, g in manifest.graphs.items()}
    weights = {n: i for n, i in manifest.files.items() if n.startswith(WEIGHTS + "/")}
    revision = f" at {manifest.model.revision}" if manifest.model.revision else ""
    state = {
        "copied": "in the bundle",
        "linked": "hard links (onnx.load refuses them, ONNX Runtime takes them)",
        "planned": "missing: complete the bundle with `trio attach-weights`",
    }.get(manifest.weights, manifest.weights)
    others = {f"{known:g}": of for known, of in it.budgets.items() if of != it.schedule}
    place = f"{manifest.runtime}, {manifest.provider}" if manifest.provider else manifest.runtime
    lines = [
        f"{it.path}",
        f"model      {manifest.model.name} ({manifest.model.source}{revision})",
        f"           {it.config.family}: {text.num_layers} layers, hidden {text.hidden_size}, "
        f"{text.num_heads} heads, {text.num_kv_heads} key/value heads, "
        f"vocabulary {text.vocab_size}",
        f"target     {manifest.target} ({place}), dialect {manifest.dialect}, "
        f"dtype {manifest.dtype}, decode {manifest.decode}",
        f"pruning    {it.schedule}",
        *(f"{'  at ' + known:<10} {other}" for known, other in others.items()),
        f"           probe {manifest.probe}, positions {manifest.positions}, "
        f"threshold {manifest.threshold:g}",
        f"weights    {format_bytes(sum(i.size for i in weights.values()))} in {len(weights)} "
        f"file{'s' if len(weights) != 1 else ''}, {state}",
        f"checksums  {'of all files' if not it.unsealed else f'none yet of {len(it.unsealed)}'}",
        f"graphs     {format_bytes(sum(graphs.values()))}",
    ]
    for stage, graph in manifest.graphs.items():
        lines.append(f"  {graph.file}  {format_bytes(graphs[stage])}")
        if not interface:
            continue
        for word, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
            lines.extend(f"    {word} {line}" for line in _tensor_lines(tensors))
    lines.append("made with  " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    return "\n".join(lines)


def _tensor_lines(tensors: tuple[TensorInfo, ...]) -> list[str]:
    """One line a tensor; the many of a KV cache share one."""
    lines: list[str] = []
    cache: dict[str, list[int]] = {}
    for tensor in tensors:
        shape = f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
        match = re.fullmatch(r"(past|present)\.(\d+)\.(key|value)", tensor.name)
        if match:
            cache.setdefault(f"{match[1]}|{shape}", []).append(int(match[2]))
        else:
            lines.append(f"{tensor.name}: {shape}")
    for key, layers in cache.items():
        kind, shape = key.split("|")
        span = f"{min(layers)}…{max(layers)}" if min(layers) != max(layers) else f"{layers[0]}"
        lines.append(f"{kind}.{span}.key / .value: {shape}")
    return lines
