"""The description of a bundle that `trio inspect` prints."""

from __future__ import annotations

import math
import os

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import (
    WEIGHTS,
    Manifest,
    TensorInfo,
)
from trio_deploy.checkpoint.fit import CheckpointInfo
from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.files import format_bytes
from trio_deploy.quant.schemes import BESIDE_CODES, bits_of, split_name
from trio_deploy.quant.stored_weight import ITEM_BITS


def inspect(bundle: Bundle | str | os.PathLike[str], *, interface: bool = True) -> str:
    """Describe a bundle: model, schedule, weights; with `interface`, each stage's tensors."""
    it = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    manifest, text = it.manifest, it.config.text
    graphs = {stage.name: manifest.files[stage.file].size for stage in manifest.stages}
    weights = {n: i for n, i in manifest.files.items() if n.startswith(WEIGHTS + "/")}
    revision = f" at {manifest.model.revision}" if manifest.model.revision else ""
    state = {
        "copied": "in the bundle",
        "linked": "hard links (onnx.load refuses them, ONNX Runtime takes them)",
        "planned": "missing: complete the bundle with `trio attach-weights`",
    }.get(manifest.weights, manifest.weights)
    widths = quantised_widths(manifest)
    others = {f"{known:g}": of for known, of in it.budgets.items() if of != it.schedule}
    place = f"{manifest.runtime}, {manifest.provider}" if manifest.provider else manifest.runtime
    unchecked = len(it.files_without_checksum)
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
        f"answers    {SamplingOptions.from_json(manifest.generation.sampling).describe()}",
        f"weights    {format_bytes(sum(i.size for i in weights.values()))} in {len(weights)} "
        f"file{'s' if len(weights) != 1 else ''}, {state}",
        *(f"{word:<10} {line}" for word, line in zip(("quantised", ""), widths, strict=False)),
        *_origin(manifest.checkpoint),
        f"checksums  {f'none yet of {unchecked}' if unchecked else 'of all files'}",
        f"graphs     {format_bytes(sum(graphs.values()))}",
    ]
    for stage in manifest.stages:
        lines.append(f"  {stage.file}  {format_bytes(graphs[stage.name])}")
        if not interface:
            continue
        for word, tensors in (("in ", stage.inputs), ("out", stage.outputs)):
            lines.extend(f"    {word} {line}" for line in _tensor_lines(tensors))
        if stage.looked_up:
            lines.append(f"    rows of {stage.looked_up[0]}, which the host looks up")
        if stage.weight_inputs:
            lines.append(f"    in  {len(stage.weight_inputs)} weights, which the runtime binds")
    lines.append("made with  " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()))
    return "\n".join(lines)


def quantised_widths(manifest: Manifest) -> list[str]:
    """The scheme of quantised weights, and the share of all weights that each width has."""
    quantised = manifest.quantization
    if quantised is None:
        return []
    block = f"blocks of {quantised.block}" if quantised.block else "a scale per row"
    counts: dict[str, int] = {}
    for name, place in manifest.tensors.items():
        split = split_name(name)
        if split is not None:
            own = bits_of(split[1])
            width = f"{own} bit"
            bits = ITEM_BITS[place.dtype] if place.dtype != "uint8" else own
            count = place.nbytes * 8 // bits
        elif name.endswith(BESIDE_CODES) and split_name(name.rpartition(".")[0]) is not None:
            continue
        else:
            width, count = place.dtype, math.prod(place.shape)
        counts[width] = counts.get(width, 0) + count
    total = sum(counts.values())
    shares = ", ".join(f"{count / total:.1%} in {width}" for width, count in counts.items())
    others = f"selections {quantised.selections}, head {quantised.head}"
    if quantised.selections == quantised.head:
        others = f"selections and head {quantised.head}"
    return [
        f"{quantised.scheme} ({quantised.source}), {block}, {others}",
        f"of the weights {shares}",
    ]


def _origin(made_from: CheckpointInfo | None) -> list[str]:
    """What the manifest records of the checkpoint: where the head comes from, what is left out."""
    if made_from is None:
        return []
    lines = [f"           output head: {'the embeddings' if made_from.tied else 'its own tensor'}"]
    if made_from.unused:
        more = len(made_from.unused) - 1
        names = made_from.unused[0] + (f" and {more} more" if more else "")
        lines.append(f"           left out, without a use in config.json: {names}")
    return lines


def _tensor_lines(tensors: tuple[TensorInfo, ...]) -> list[str]:
    """One line per tensor; those of a KV cache share one."""
    lines: list[str] = []
    caches: dict[str, list[str]] = {}
    for tensor in tensors:
        shape = f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
        if tensor.role == "cache":
            caches.setdefault(shape, []).append(tensor.name)
        else:
            lines.append(f"{tensor.name}: {shape}")
    lines.extend(f"{names[0]} … {names[-1]}: {shape}" for shape, names in caches.items())
    return lines
