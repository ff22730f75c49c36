"""Recipes (export/*.yaml: what can be exported) and targets (engines/*.yaml: where it can run).

Both are data that users copy, edit and pass by path; every key is checked here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from trio_deploy.checkpoint import image_settings, read_json
from trio_deploy.errors import TrioError
from trio_deploy.models import Preprocessor, parse_config
from trio_deploy.schedule import Schedule, is_budget

_PACKAGE = Path(__file__).parent

#: `checkpoint: package:data/tiny` in a recipe is a folder inside the installed package.
_IN_PACKAGE = "package:"

PROBES = ("last", "shifted")
POSITIONS = ("renumber", "original")
RUNTIMES = ("onnxruntime", "openvino", "tensorrt")
DTYPES = ("float32", "float16", "bfloat16")

#: Which dialects of the graphs a runtime reads.
DIALECTS = {
    "onnxruntime": ("ort", "onnx", "primitive"),
    "openvino": ("primitive",),
    "tensorrt": ("onnx", "primitive"),
}

#: In which float types a runtime runs graphs: ONNX Runtime has no bfloat16 arithmetic on CPUs, and
#: its Python interface hands no bfloat16 over, whatever the provider.
GRAPH_DTYPES = {
    "onnxruntime": ("float32", "float16"),
    "openvino": DTYPES,
    "tensorrt": DTYPES,
}

#: Execution providers of ONNX Runtime, in short.
PROVIDERS = ("cpu", "cuda")

_RECIPE_KEYS = (
    "description",
    "hub_id",
    "checkpoint",
    "architecture",
    "preprocessing",
    "schedules",
    "probe",
    "positions",
    "threshold",
    "chat_template",
)
_TARGET_KEYS = ("description", "runtime", "provider", "dialect", "dtype", "precision")
_TENSORRT_KEYS = (
    "tensorrt",
    "decode_layout",
    "compute_capability",
    "memory_gib",
    "reserved_gib",
    "workspace_gib",
    "limits",
)

#: TensorRT's parser reads the `onnx` dialect (Attention, RotaryEmbedding, TensorScatter) from here.
ONNX_DIALECT_SINCE = (10, 15)
OLDEST_TENSORRT = (8, 6)
DECODE_LAYOUTS = ("separate", "shared")


@dataclass(frozen=True)
class Recipe:
    """What export needs to know about a model, apart from its weights.

    Attributes:
        name: the file's name without its ending.
        hub_id: of the checkpoint on the Hugging Face hub, where it is there.
        checkpoint: a local checkpoint folder, where the recipe names one.
        architecture: a config.json with every size written out.
        schedules: budget, as the recipe writes it ("0.111"), or a name → schedule.
        probe: `last` or `shifted`, which positions the proxy loss looks at.
        positions: `renumber` or `original`, position ids after pruning.
        threshold: cosine similarity from which a kept token suppresses another.
        preprocessing: a preprocessor_config.json.
        chat_template: Jinja, for checkpoints that come without one.
    """

    name: str
    hub_id: str | None
    architecture: dict[str, Any]
    schedules: dict[str, Schedule]
    probe: str = "last"
    positions: str = "renumber"
    threshold: float = 0.8
    preprocessing: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    checkpoint: Path | None = None
    description: str = ""


@dataclass(frozen=True)
class Limits:
    """What engines of a target are built for; what lies beyond is refused when it is asked for.

    Attributes:
        max_batch, max_images: rows at once, and images a row.
        max_text_tokens, max_visual_tokens: of a row's prompt.
        max_new_tokens: generated for a row.
        max_budget: the largest share of visual tokens that a request may ask for.
        typical_*: what the engines are tuned for.
    """

    max_batch: int = 1
    max_images: int = 1
    max_text_tokens: int = 512
    max_visual_tokens: int = 4096
    max_new_tokens: int = 256
    max_budget: float = 1.0
    typical_batch: int = 1
    typical_text_tokens: int = 64
    typical_visual_tokens: int = 4096
    typical_new_tokens: int = 64


@dataclass(frozen=True)
class Target:
    """A device and the runtime on it.

    Attributes:
        name: the file's name without its ending.
        runtime: `onnxruntime`, `openvino` or `tensorrt`.
        dialect: of the graphs: `ort`, `onnx` or `primitive`.
        dtype: of graphs and weights.
        precision: in which the runtime computes matrix products, where it can choose; else dtype.
        provider: ONNX Runtime's, `cpu` or `cuda`; None for other runtimes.
        tensorrt: version on the device, `10.3`; this and all that follows for TensorRT alone.
        decode_layout: `separate` (a decode engine of all layers) or `shared` (the engines of the
            segments decode too, and weights are on the device once); None: by the dialect.
        compute_capability: of the GPU, `8.7`; None where any will do.
        memory_gib: of the device; None where it is not known.
        reserved_gib: of it, what the system and others need.
        workspace_gib: what a layer may use as scratch memory, at most; None: as much as there is,
            which is TensorRT's default.
        limits: of requests.
    """

    name: str
    runtime: str
    dialect: str
    dtype: str
    precision: str
    description: str = ""
    provider: str | None = None
    tensorrt: str | None = None
    decode_layout: str | None = None
    compute_capability: str | None = None
    memory_gib: float | None = None
    reserved_gib: float = 0.0
    workspace_gib: float | None = None
    limits: Limits = Limits()

    @property
    def usable_gib(self) -> float | None:
        """Memory that engines and buffers may take; None where it is not known."""
        return None if self.memory_gib is None else self.memory_gib - self.reserved_gib


def recipe_folder() -> Path:
    """Where the shipped recipes lie: inside an installed package, or export/ of a checkout."""
    return _shipped("recipes", "export")


def target_folder() -> Path:
    """Where the shipped targets lie: inside an installed package, or engines/ of a checkout."""
    return _shipped("targets", "engines")


def list_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return _names(recipe_folder())


def list_targets() -> list[str]:
    """Names of the shipped targets."""
    return _names(target_folder())


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by its name or from a file.

    Raises:
        TrioError: no such recipe, an unknown or missing key, or a value that is wrong.
    """
    file = _find(name_or_path, recipe_folder(), "recipe")
    raw = _read(file, _RECIPE_KEYS)
    checkpoint = _checkpoint(file, raw)
    if checkpoint is None:
        architecture, preprocessing = raw.get("architecture"), raw.get("preprocessing", {})
    else:
        architecture = raw.get("architecture") or read_json(checkpoint / "config.json")
        preprocessing = raw.get("preprocessing") or image_settings(checkpoint)
    if not isinstance(architecture, dict) or not isinstance(preprocessing, dict):
        raise TrioError(f"{file}: `architecture` and `preprocessing` must be mappings.")
    recipe = Recipe(
        name=file.stem,
        hub_id=_text(file, raw, "hub_id"),
        architecture=architecture,
        schedules=_schedules(file, raw.get("schedules", {})),
        probe=_choice(file, raw, "probe", PROBES, "last"),
        positions=_choice(file, raw, "positions", POSITIONS, "renumber"),
        threshold=_threshold(file, raw.get("threshold", 0.8)),
        preprocessing=preprocessing,
        chat_template=_text(file, raw, "chat_template"),
        checkpoint=checkpoint,
        description=_text(file, raw, "description") or "",
    )
    try:
        config = parse_config(architecture)
        Preprocessor(preprocessing, config)
        for schedule in recipe.schedules.values():
            schedule.validate(config.text.num_layers)
    except TrioError as error:
        raise TrioError(f"{file}: {error}") from None
    return recipe


def recipe_for(hub_id: str) -> Recipe | None:
    """The shipped recipe of a model on the hub, None where there is none."""
    folder = recipe_folder()
    for name in list_recipes():
        if _read(folder / f"{name}.yaml", _RECIPE_KEYS).get("hub_id") == hub_id:
            return load_recipe(name)
    return None


def load_target(name_or_path: str | Path) -> Target:
    """Read a target by its name or from a file.

    Raises:
        TrioError: no such target, an unknown or missing key, or a value that is wrong.
    """
    file = _find(name_or_path, target_folder(), "target")
    raw = _read(file, _TARGET_KEYS + _TENSORRT_KEYS)
    runtime = _choice(file, raw, "runtime", RUNTIMES)
    if runtime == "tensorrt":
        return _tensorrt_target(file, raw)
    for key in _TENSORRT_KEYS:
        if key in raw:
            raise TrioError(f"{file}: {key} belongs to TensorRT, not to {runtime}.")
    dtype = _choice(file, raw, "dtype", DTYPES)
    provider = None
    if runtime == "onnxruntime":
        provider = _choice(file, raw, "provider", PROVIDERS, "cpu")
    elif "provider" in raw:
        raise TrioError(f"{file}: a provider belongs to ONNX Runtime, not to {runtime}.")
    return Target(
        name=file.stem,
        runtime=runtime,
        dialect=_choice(file, raw, "dialect", DIALECTS[runtime]),
        dtype=dtype,
        precision=_choice(file, raw, "precision", DTYPES, dtype),
        description=_text(file, raw, "description") or "",
        provider=provider,
    )


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) of `10.3` or `8.6.1.post1`.

    Raises:
        TrioError: not of this form.
    """
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise TrioError(f"{text!r} is no version of TensorRT: write it as 10.3")
    return int(match[1]), int(match[2])


def tensorrt_dialects(version: str) -> tuple[str, ...]:
    """Dialects that a version of TensorRT reads, the better one first."""
    newest = parse_version(version) >= ONNX_DIALECT_SINCE
    return ("onnx", "primitive") if newest else ("primitive",)


def _tensorrt_target(file: Path, raw: Mapping[str, Any]) -> Target:
    if "provider" in raw:
        raise TrioError(f"{file}: a provider belongs to ONNX Runtime, not to tensorrt.")
    version = raw.get("tensorrt")
    if not isinstance(version, str):
        raise TrioError(
            f"{file}: the key 'tensorrt' must give a version in quotes, like \"10.3\", not "
            f"{version!r}."
        )
    try:
        known = parse_version(version)
    except TrioError as error:
        raise TrioError(f"{file}: {error}.") from None
    if known < OLDEST_TENSORRT:
        raise TrioError(f"{file}: TensorRT {version} is too old; 8.6 is the oldest that will do.")
    dialects = tensorrt_dialects(version)
    dialect = _choice(file, raw, "dialect", DIALECTS["tensorrt"], dialects[0])
    if dialect not in dialects:
        raise TrioError(
            f"{file}: TensorRT {version} does not read the {dialect} dialect, which needs 10.15: "
            f"choose {' or '.join(dialects)}."
        )
    layout = _choice(
        file, raw, "decode_layout", DECODE_LAYOUTS, "separate" if dialect == "onnx" else "shared"
    )
    if dialect == "onnx" and layout == "shared":
        raise TrioError(
            f"{file}: the onnx dialect decodes with an engine of its own: choose decode_layout "
            "separate, or dialect primitive, whose segments can decode too."
        )
    dtype = _choice(file, raw, "dtype", DTYPES)
    capability = raw.get("compute_capability")
    if capability is not None and not (
        isinstance(capability, str) and re.fullmatch(r"\d+\.\d", capability)
    ):
        raise TrioError(
            f'{file}: compute_capability must be in quotes, like "8.7", not {capability!r}.'
        )
    memory = _number(file, raw, "memory_gib", None)
    reserved = _number(file, raw, "reserved_gib", 0.0)
    assert reserved is not None
    if memory is not None and reserved >= memory:
        raise TrioError(f"{file}: reserved_gib {reserved:g} leaves nothing of {memory:g} GiB.")
    workspace = _number(file, raw, "workspace_gib", None)
    if workspace == 0:
        raise TrioError(
            f"{file}: workspace_gib 0 leaves no scratch memory: leave it out for TensorRT's "
            "default, all of the device's memory"
        )
    return Target(
        name=file.stem,
        runtime="tensorrt",
        dialect=dialect,
        dtype=dtype,
        precision=_choice(file, raw, "precision", DTYPES, dtype),
        description=_text(file, raw, "description") or "",
        tensorrt=version,
        decode_layout=layout,
        compute_capability=capability,
        memory_gib=memory,
        reserved_gib=reserved,
        workspace_gib=workspace,
        limits=_limits(file, raw.get("limits", {})),
    )


def _number(file: Path, raw: Mapping[str, Any], key: str, default: float | None) -> float | None:
    value = raw.get(key, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise TrioError(f"{file}: {key} must be a number of GiB, not {value!r}.")
    return float(value)


def _limits(file: Path, raw: Any) -> Limits:
    if not isinstance(raw, dict):
        raise TrioError(f"{file}: `limits` must be a mapping.")
    known = {entry.name: entry.default for entry in fields(Limits)}
    for key, value in raw.items():
        if key not in known:
            raise TrioError(
                f"{file}: unknown limit {key!r}.{_nearest(str(key), known)} "
                f"Known are {', '.join(known)}."
            )
        if key == "max_budget":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise TrioError(f"{file}: max_budget must be above 0 and at most 1, not {value!r}.")
        elif type(value) is not int or value < (0 if "visual" in key or "images" in key else 1):
            raise TrioError(f"{file}: {key} must be a positive whole number, not {value!r}.")
    limits = Limits(**raw)
    for name in ("batch", "text_tokens", "visual_tokens", "new_tokens"):
        typical, most = getattr(limits, f"typical_{name}"), getattr(limits, f"max_{name}")
        if f"typical_{name}" not in raw:
            limits = replace(limits, **{f"typical_{name}": min(typical, most)})
        elif typical > most:
            raise TrioError(f"{file}: typical_{name} {typical} exceeds max_{name} {most}.")
    return limits


def _shipped(installed: str, checkout: str) -> Path:
    inside = _PACKAGE / installed
    return inside if inside.is_dir() else _PACKAGE.parent / checkout


def _names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def _find(name_or_path: str | Path, folder: Path, kind: str) -> Path:
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    names = _names(folder)
    if text in names:
        return folder / f"{text}.yaml"
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise TrioError(f"There is no {kind} file at {path}.")
    raise TrioError(
        f"There is no {kind} called {text!r}.{_nearest(text, names)} Known are {', '.join(names)}; "
        f"a {kind} of your own is passed as the path of its .yaml file."
    )


def _nearest(text: str, known: Collection[str]) -> str:
    """What may have been meant: names that have all of its words, else the one most like it."""
    words = set(re.split(r"[-_. ]+", text.lower())) - {""}
    near = [name for name in known if words and words <= set(re.split(r"[-_. ]+", name.lower()))]
    if not 1 <= len(near) <= 3:
        near = difflib.get_close_matches(text, list(known), n=1, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _read(file: Path, keys: Collection[str]) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrioError(f"cannot read {file}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrioError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise TrioError(f"{file} must hold keys and values.")
    for key in raw:
        if key not in keys:
            raise TrioError(
                f"{file}: unknown key {key!r}.{_nearest(str(key), keys)} "
                f"Known are {', '.join(keys)}."
            )
    return raw


def _choice(
    file: Path, raw: Mapping[str, Any], key: str, choices: Collection[str], default: str = ""
) -> str:
    value = raw.get(key) or default
    if not value:
        raise TrioError(f"{file}: the key {key!r} is missing; one of {', '.join(choices)}.")
    if value not in choices:
        raise TrioError(
            f"{file}: {key} {value!r} is not possible here.{_nearest(str(value), choices)} "
            f"Choose from {', '.join(choices)}."
        )
    return str(value)


def _text(file: Path, raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise TrioError(f"{file}: {key} must be text, not {value!r}.")
    return value


def _threshold(file: Path, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise TrioError(
            f"{file}: threshold must be a cosine similarity above 0 and at most 1, not {value!r}."
        )
    return float(value)


def _schedules(file: Path, raw: Any) -> dict[str, Schedule]:
    if not isinstance(raw, dict):
        raise TrioError(f"{file}: `schedules` must map budgets to lists of pruning points.")
    schedules = {}
    for budget, points in raw.items():
        try:
            if is_budget(str(budget)) and not 0 < float(budget) <= 1:
                raise ValueError
        except (TypeError, ValueError):
            raise TrioError(
                f"{file}: the budget {budget!r} in `schedules` must be a share above 0 and at "
                "most 1, or a name that begins with a letter."
            ) from None
        try:
            schedules[str(budget)] = Schedule.from_json(points)
        except TrioError as error:
            raise TrioError(f"{file}, schedule {budget}: {error}") from None
    return schedules


def _checkpoint(file: Path, raw: Mapping[str, Any]) -> Path | None:
    value = _text(file, raw, "checkpoint")
    if value is None:
        return None
    if value.startswith(_IN_PACKAGE):
        folder = _PACKAGE / value.removeprefix(_IN_PACKAGE)
    else:
        folder = file.parent / Path(value).expanduser()
    if not folder.is_dir():
        raise TrioError(f"{file}: there is no checkpoint folder at {folder}.")
    return folder
