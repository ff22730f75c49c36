"""Checkpoints and bundles with random weights: the cost of a product does not depend on values.

Checkpoints are written tensor by tensor in the hub's layout, without torch, so that any size that
fits on the disk can be measured, and transformers and optimum-intel read them like any other.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trio_deploy.bench.environment import machine
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.weights import Layout, byte_bar, plan_layout
from trio_deploy.checkpoint.resolve import resolve
from trio_deploy.checkpoint.safetensors import INDEX, SINGLE
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.recipe import list_recipes
from trio_deploy.errors import TrioError
from trio_deploy.families import llava
from trio_deploy.families.base import ModelConfig, TowerSizes
from trio_deploy.families.preprocessing import with_max_pixels
from trio_deploy.families.registry import family_of, get_family, parse_config
from trio_deploy.quant.schemes import NO_SCHEME
from trio_deploy.quant.stored_weight import Part
from trio_deploy.runtimes.registry import default_target

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STD = 0.02  # what transformers initialises Llama and CLIP with
_CHUNK = 1 << 22  # numbers drawn at a time
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")  # followed by the family's own
_IMAGE_KEYS = ("image_token_id", "image_token_index")  # the first counts where both are there
_BYTES = 256
_TEMPLATE = (
    "{%% for message in messages %%}{%% if message['content'] is string %%}"
    "{{ message['content'] }}{%% else %%}{%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}"
    "{%% endfor %%}{%% endif %%}{%% endfor %%}"
)


def _tower(family: str, image: int, patch: int, *sizes: int) -> dict[str, Any]:
    names = ("vision_d", "vision_layers", "vision_mlp", "vision_heads")
    return {
        "family": family,
        "image": image,
        "patch": patch,
        **dict(zip(names, sizes, strict=True)),
    }


TOWERS = {
    "clip-l-336": _tower("llava", 336, 14, 1024, 24, 4096, 16),
    "qwen2-vl": _tower("qwen2_vl", 1008, 14, 1280, 32, 5120, 16),
    "qwen2.5-vl": _tower("qwen2_5_vl", 1008, 14, 1280, 32, 3420, 16),
    "qwen3-vl-2b": _tower("qwen3_vl", 1152, 16, 1024, 24, 4096, 16),
}
"""Towers by name: family and sizes. OpenAI's CLIP ViT-L/14 for pictures of 336 pixels, as in
LLaVA-1.5; those of Qwen2-VL and Qwen2.5-VL (all sizes) and of Qwen3-VL-2B, for pictures of at most
1,296 visual tokens."""


@dataclass(frozen=True)
class Size:
    """A model of any size; 0: the usual proportion.

    Attributes:
        d: hidden size of the language model.
        mlp: size of its MLP (2.75 d, rounded up to a multiple of 64).
        heads: number of query heads (64 features per head).
        kv_heads: number of key/value heads (equal to `heads`).
        image, patch: pixels per side of a picture, at most where pictures have any size, and of a
            patch.
        vision_d, vision_layers: hidden size and layers of the vision tower.
        vision_mlp, vision_heads: size of its MLP (2 vision_d) and number of its heads (4).
        context: maximum number of positions.
        family: model family; a tower brings it.
    """

    d: int = 1024
    layers: int = 16
    vocab: int = 32000
    mlp: int = 0
    heads: int = 0
    kv_heads: int = 0
    image: int = 336
    patch: int = 14
    vision_d: int = 256
    vision_layers: int = 3
    vision_mlp: int = 0
    vision_heads: int = 0
    context: int = 4096
    family: str = llava.FAMILY.name

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `d=1024,layers=16,vocab=32000`; sizes that are not named keep their defaults.

        `tower=NAME` stands for the sizes of a tower of `TOWERS`.

        Raises:
            TrioError: an unknown name, a value that is no positive integer, or sizes that do not
                fit together.
        """
        known = [item.name for item in fields(cls) if item.name != "family"]
        values: dict[str, int] = {}
        tower: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name == "tower":
                if value not in TOWERS:
                    raise TrioError(f"--size {part}: the towers are {', '.join(TOWERS)}")
                tower = TOWERS[value]
                continue
            if name not in known:
                raise TrioError(
                    f"--size does not know {name!r}: write name=number, of {', '.join(known)}, "
                    f"or tower=name, of {', '.join(TOWERS)}, or "
                    f"a recipe ({', '.join(list_recipes())})"
                )
            if not value.isascii() or not value.isdigit() or int(value) < 1:
                raise TrioError(f"--size {part}: the value must be a positive integer")
            values[name] = int(value)
        size = cls(**{**tower, **values}).filled()
        size._check()
        return size

    def filled(self) -> Size:
        """The size with the usual proportion for every 0."""
        heads = self.heads or max(1, self.d // 64)
        return replace(
            self,
            mlp=self.mlp or math.ceil(2.75 * self.d / 64) * 64,
            heads=heads,
            kv_heads=self.kv_heads or heads,
            vision_mlp=self.vision_mlp or 2 * self.vision_d,
            vision_heads=self.vision_heads or 4,
        )

    def _check(self) -> None:
        for what, whole, part in (
            ("d must be an even multiple of heads", self.d, 2 * self.heads),
            ("heads must be a multiple of kv_heads", self.heads, self.kv_heads),
            ("image must be a multiple of patch", self.image, self.patch),
            ("vision_d must be a multiple of vision_heads", self.vision_d, self.vision_heads),
        ):
            if whole % part:
                raise TrioError(f"--size: {what}")
        special = len(_special(self.family))
        if self.vocab < special + _BYTES:
            raise TrioError(f"--size: vocab must be {special + _BYTES} or more")
        if self.vision_layers < 2:
            raise TrioError(
                "--size: vision_layers must be 2 or more: features come from the last but one"
            )
        try:
            parse_config(self.config())
        except TrioError as error:
            raise TrioError(f"--size: these sizes do not fit together: {error}") from None

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        full = self.filled()
        tower = TowerSizes(
            full.vision_d,
            full.vision_layers,
            full.vision_mlp,
            full.vision_heads,
            full.image,
            full.patch,
        )
        text = {
            "hidden_size": full.d,
            "intermediate_size": full.mlp,
            "num_hidden_layers": full.layers,
            "num_attention_heads": full.heads,
            "num_key_value_heads": full.kv_heads,
            "head_dim": full.d // full.heads,
            "vocab_size": full.vocab,
            "max_position_embeddings": full.context,
        }
        return get_family(self.family).hub.config(tower, text) | _token_ids(self.family)

    def preprocessing(self) -> dict[str, Any] | None:
        """preprocessor_config.json where pictures have any size: up to `image` pixels per side."""
        config = parse_config(self.config())
        if config.pixels is None:
            return None
        most = self.image**2
        config = replace(config, pixels=(min(config.pixels[0], most), most))
        return get_family(self.family).hub.files(config)["preprocessor_config.json"]

    @property
    def name(self) -> str:
        """Name of the model, for folders and titles."""
        full = self.filled()
        default = Size(d=full.d, heads=full.heads).filled()
        usual = {"heads": Size(d=full.d).filled().heads, "vision_mlp": 2 * full.vision_d}
        family = self.family.replace("_", "-")
        parts = [f"{family}-d{full.d}-l{full.layers}-v{full.vocab}"]
        tower = next((n for n, of in TOWERS.items() if of.items() <= vars(full).items()), None)
        parts += [tower] if tower else []
        for item in fields(self):
            if item.name in ("d", "layers", "vocab", "family", *TOWERS.get(tower or "", ())):
                continue
            value = getattr(full, item.name)
            if value != usual.get(item.name, getattr(default, item.name)):
                parts.append(f"{item.name.replace('_', '')}{value}")
        return "-".join(parts)


def _special(family: str) -> list[str]:
    """Special tokens of a family's tokenizer, by their ids."""
    return [*_SPECIAL, *get_family(family).hub.tokens.values()]


def _token_ids(family: str) -> dict[str, int]:
    """Keys of config.json with the ids of a family's own special tokens."""
    return {key: at for at, key in enumerate(get_family(family).hub.tokens, len(_SPECIAL))}


def model_of(text: str) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Read --size: (name, config.json, preprocessor_config.json or None for the family's own).

    A recipe gives the sizes of its architecture and pictures; the special tokens are those of this
    module's tokenizer.

    Raises:
        TrioError: neither a recipe nor sizes.
    """
    if "=" in text:
        size = Size.parse(text)
        return size.name, size.config(), size.preprocessing()
    found = resolve(text, weights_needed=False)
    config = {k: v for k, v in found.raw_config.items() if k not in _IMAGE_KEYS}
    config |= _token_ids(family_of(config).name)
    if found.recipe is None or not found.recipe.preprocessing:
        return found.name, config, None
    most = found.recipe.max_pixels
    settings = with_max_pixels(found.recipe.preprocessing, parse_config(config), most)
    return found.name, config, settings


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    preprocessing: dict[str, Any] | None = None,
    *,
    dtype: str = "float32",
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a checkpoint folder with random weights, unless it exists already.

    Raises:
        TrioError: the disk or the memory has no room for it.
    """
    if (folder / "config.json").is_file():
        return folder
    parsed = parse_config(config)
    layout = plan_layout(_hub_parts(parsed, dtype))
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if layout.nbytes > free:
        raise TrioError(
            f"random weights of this size take {layout.nbytes / 2**30:.1f} GiB and {folder.parent} "
            f"has {free / 2**30:.1f} GiB free: choose a smaller --size, another --cache or "
            "--dtype float16"
        )
    memory = machine(None)["memory_gib"]
    if memory and layout.nbytes > memory * 2**30:
        raise TrioError(
            f"random weights of this size take {layout.nbytes / 2**30:.1f} GiB and this machine "
            f"has {memory} GiB of memory: choose a smaller --size or --dtype float16"
        )
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        _write_weights(unfinished, layout, seed, progress)
        for name, content in _small_files(config, parsed, preprocessing, dtype).items():
            (unfinished / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        _tokenizer(unfinished / "tokenizer.json", _special(parsed.family))
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def _hub_parts(config: ModelConfig, dtype: str) -> list[Part]:
    """List every tensor by its name on the hub, those that no graph reads included."""
    from trio_deploy.graphs.weights import canonical_tensors  # needs the extra `export`

    hub = get_family(config.family).hub
    shapes = canonical_tensors(hub.whole(config)) | hub.unread(config)
    return [Part(hub.name(name), shape, dtype) for name, shape in shapes.items()]


def _write_weights(folder: Path, layout: Layout, seed: int, progress: bool) -> None:
    rng = np.random.default_rng(seed)
    places: dict[str, str] = {}
    with byte_bar(layout.nbytes, "random weights", progress) as bar:
        for shard in layout.shards:
            file = SINGLE if len(layout.shards) == 1 else Path(shard.file).name
            with (folder / file).open("wb") as out:
                out.write(shard.header)
                for name in shard.names:
                    places[name] = file
                    target = _DTYPES[layout.places[name].dtype]
                    left = math.prod(layout.places[name].shape)
                    while left:
                        count = min(left, _CHUNK)
                        left -= count
                        out.write(_numbers(rng, name, count).astype(target).tobytes())
                        bar.update(count * target.itemsize)
    if len(layout.shards) > 1:
        index = {"metadata": {"total_size": layout.nbytes}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _numbers(rng: np.random.Generator, name: str, count: int) -> np.ndarray:
    """Ones for norms, zeros for biases, normally distributed numbers for the rest."""
    module = name.split(".")[-2]
    if "norm" in module or module.startswith("ln_"):
        return np.full(count, name.endswith("weight"), np.float32)
    if name.endswith("bias"):
        return np.zeros(count, np.float32)
    return rng.standard_normal(count, np.float32) * np.float32(_STD)


def _small_files(
    config: dict[str, Any],
    parsed: ModelConfig,
    preprocessing: dict[str, Any] | None,
    dtype: str,
) -> dict[str, Any]:
    """The JSON files of a hub checkpoint, by name."""
    family = get_family(parsed.family)
    files = family.hub.files(parsed)
    if preprocessing:
        files["preprocessor_config.json"] = preprocessing
    special = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    own = list(family.hub.tokens.values())
    template = _TEMPLATE % family.hub.picture
    processor = family.architecture.replace("ForConditionalGeneration", "Processor")
    files["processor_config.json"] |= {"processor_class": processor, "image_token": own[0]}
    return {
        **files,
        "config.json": config | {"torch_dtype": dtype},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
        "chat_template.json": {"chat_template": template},
        "tokenizer_config.json": {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": processor,
            "additional_special_tokens": own,
            "image_token": own[0],
            "chat_template": template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": parsed.text.max_positions,
        },
        "special_tokens_map.json": {**special, "additional_special_tokens": own},
    }


def _tokenizer(file: Path, special: Sequence[str]) -> None:
    """Write a tokenizer.json with one token per byte, so that lengths are known."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.save(str(file))


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights and the bundle to export of it.

    Attributes:
        size: `d=1024,layers=16,vocab=32000`, or a recipe whose sizes are taken.
        schedule: pruning points; None: those of the first budget.
        dtype: float type of the weights; None: float32.
        dialect: dialect of the graphs; None: the target's.
        quantize: scheme of the weights; None: they are float.
        selections: what selections compute with beside quantised weights, as of `ExportOptions`.
    """

    size: str
    schedule: str | None = None
    dtype: str | None = None
    dialect: str | None = None
    quantize: str | None = None
    selections: str | None = None


def make_bundle(
    model: RandomModel,
    folder: Path,
    options: RuntimeOptions,
    budget: float | None = None,
    *,
    progress: bool = True,
) -> tuple[Bundle, Path]:
    """Export a bundle with random weights; returns it and the folder of its checkpoint.

    Args:
        folder: holds checkpoints and bundles of sizes; a checkpoint that exists is taken.
        options: how the bundle will be run.
        budget: of the schedule, if the model has none.

    Raises:
        TrioError: as `model_of`, `write_checkpoint` and `export_model`.
    """
    name, config, preprocessing = model_of(model.size)
    dtype = model.dtype or "float32"
    checkpoint = write_checkpoint(
        folder / (name if dtype == "float32" else f"{name}-{dtype}"),
        config,
        preprocessing,
        dtype=dtype,
        progress=progress,
    )
    target = options.target or default_target(options.runtime)
    made_for = model.dialect or Path(str(target)).stem
    from trio_deploy.export.job import export_model  # needs the extra `export`

    bundle = export_model(
        checkpoint,
        folder
        / "-".join(filter(None, (checkpoint.name, made_for, model.quantize, model.selections))),
        schedule=model.schedule,
        budget=None if model.schedule else budget,
        dtype=dtype,
        dialect=model.dialect,
        target=str(target),
        quantize=model.quantize or NO_SCHEME,
        selections=model.selections,
        link_weights=model.quantize is None,
        force=True,
        progress=False,
    )
    return bundle, checkpoint
