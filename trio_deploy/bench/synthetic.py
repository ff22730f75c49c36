"""Checkpoints and bundles with random weights: the cost of a product does not depend on values.

Checkpoints are written tensor by tensor in the hub's layout, without torch, so that any size that
fits on the disk can be measured, and transformers and optimum-intel read them like any other.
"""

from __future__ import annotations

import json
import math
import os
import shutil
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
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.clip_images import clip_processor_files
from trio_deploy.families.registry import get_family, parse_config
from trio_deploy.quant.stored_weight import Part
from trio_deploy.runtimes.registry import default_target

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_STD = 0.02  # what transformers initialises Llama and CLIP with
_CHUNK = 1 << 22  # numbers drawn at a time
_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_IMAGE_TOKEN = _SPECIAL.index("<image>")
_BYTES = 256
_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


TOWERS = {
    "clip-l-336": {
        "image": 336,
        "patch": 14,
        "vision_d": 1024,
        "vision_layers": 24,
        "vision_mlp": 4096,
        "vision_heads": 16,
    },
}
"""Sizes of towers by name: OpenAI's CLIP ViT-L/14 for pictures of 336 pixels, as in LLaVA-1.5."""


@dataclass(frozen=True)
class Size:
    """A LLaVA-1.5 of any size; 0: the usual proportion.

    Attributes:
        d: hidden size of the language model.
        mlp: size of its MLP (2.75 d, rounded up to a multiple of 64).
        heads: number of query heads (64 features per head).
        kv_heads: number of key/value heads (equal to `heads`).
        image, patch: pixels per side of a picture and of a patch.
        vision_d, vision_layers: hidden size and layers of the CLIP tower.
        vision_mlp, vision_heads: size of its MLP (2 vision_d) and number of its heads (4).
        context: maximum number of positions.
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

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `d=1024,layers=16,vocab=32000`; sizes that are not named keep their defaults.

        `tower=NAME` stands for the sizes of a tower of `TOWERS`.

        Raises:
            TrioError: an unknown name, a value that is no positive integer, or sizes that do not
                fit together.
        """
        known = [item.name for item in fields(cls)]
        values: dict[str, int] = {}
        tower: dict[str, int] = {}
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
        if self.vocab < len(_SPECIAL) + _BYTES:
            raise TrioError(f"--size: vocab must be {len(_SPECIAL) + _BYTES} or more")
        if self.vision_layers < 2:
            raise TrioError(
                "--size: vision_layers must be 2 or more: features come from the last but one"
            )

    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        full = self.filled()
        vision = {
            "hidden_size": full.vision_d,
            "intermediate_size": full.vision_mlp,
            "num_hidden_layers": full.vision_layers,
            "num_attention_heads": full.vision_heads,
        }
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
        return llava.config_json(
            vision,
            text,
            tile=full.image,
            patch=full.patch,
            image_token_index=_IMAGE_TOKEN,
            image_seq_length=(full.image // full.patch) ** 2,
        )

    @property
    def name(self) -> str:
        """Name of the model, for folders and titles."""
        full = self.filled()
        default = Size(d=full.d, heads=full.heads).filled()
        usual = {"heads": Size(d=full.d).filled().heads, "vision_mlp": 2 * full.vision_d}
        parts = [f"llava-d{full.d}-l{full.layers}-v{full.vocab}"]
        tower = next((n for n, of in TOWERS.items() if of.items() <= vars(full).items()), None)
        parts += [tower] if tower else []
        for item in fields(self):
            if item.name in ("d", "layers", "vocab", *TOWERS.get(tower or "", ())):
                continue
            value = getattr(full, item.name)
            if value != usual.get(item.name, getattr(default, item.name)):
                parts.append(f"{item.name.replace('_', '')}{value}")
        return "-".join(parts)


def model_of(text: str) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Read --size: (name, config.json, preprocessor_config.json or None for CLIP's own).

    A recipe gives the sizes of its architecture; the image token is that of this module's
    tokenizer.

    Raises:
        TrioError: neither a recipe nor sizes.
    """
    if "=" not in text:
        found = resolve(text, weights_needed=False)
        settings = found.recipe.preprocessing if found.recipe else None
        config = {k: v for k, v in found.raw_config.items() if k != "image_token_id"}
        return found.name, config | {"image_token_index": _IMAGE_TOKEN}, settings or None
    size = Size.parse(text)
    return size.name, size.config(), None


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
        _tokenizer(unfinished / "tokenizer.json")
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def _hub_parts(config: ModelConfig, dtype: str) -> list[Part]:
    """List every tensor by its name on the hub, those that no graph reads included."""
    from trio_deploy.graphs.weights import canonical_tensors  # needs the extra `export`

    vision, read = config.clip, config.clip.feature_layers
    # As if features came from the last layer, so that the layers above the feature layer exist.
    whole = replace(vision, feature_layers=(*read[:-1], vision.num_layers))
    shapes = canonical_tensors(replace(config, vision=whole))
    shapes |= {
        f"vision_tower.post_layernorm.{part}": (vision.hidden_size,) for part in ("weight", "bias")
    }
    return [Part(_hub_name(name), shape, dtype) for name, shape in shapes.items()]


def _hub_name(name: str) -> str:
    for ours, theirs in (
        ("vision_tower.", "vision_tower.vision_model."),
        ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


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
    if "norm" in name.split(".")[-2]:
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
    files = clip_processor_files(parsed)
    if preprocessing:
        files["preprocessor_config.json"] = preprocessing
    special = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    architecture = get_family(parsed.family).architecture
    processor = architecture.replace("ForConditionalGeneration", "Processor")
    files["processor_config.json"] |= {"processor_class": processor, "image_token": "<image>"}
    return {
        **files,
        "config.json": config | {"torch_dtype": dtype},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
        "chat_template.json": {"chat_template": _TEMPLATE},
        "tokenizer_config.json": {
            **special,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": processor,
            "additional_special_tokens": ["<image>"],
            "image_token": "<image>",
            "chat_template": _TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": parsed.text.max_positions,
        },
        "special_tokens_map.json": {**special, "additional_special_tokens": ["<image>"]},
    }


def _tokenizer(file: Path) -> None:
    """Write a tokenizer.json with one token per byte, so that lengths are known."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
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
    """

    size: str
    schedule: str | None = None
    dtype: str | None = None
    dialect: str | None = None


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
    from trio_deploy.export.job import export_model  # needs the extra `export`

    bundle = export_model(
        checkpoint,
        folder / f"{checkpoint.name}-{model.dialect or Path(str(target)).stem}",
        schedule=model.schedule,
        budget=None if model.schedule else budget,
        dtype=dtype,
        dialect=model.dialect,
        target=str(target),
        link_weights=True,
        force=True,
        progress=False,
    )
    return bundle, checkpoint
