"""The runtimes by name; a module is imported when its runtime is asked for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.target import RUNTIME_KEYS, Target, find_target, read_target
from trio_deploy.config.yaml_files import nearest
from trio_deploy.errors import TrioError
from trio_deploy.files import is_folder

if TYPE_CHECKING:  # numpy and all that follows; the names of the runtimes are needed without
    from trio_deploy.bundle.bundle import Bundle
    from trio_deploy.bundle.manifest import Manifest
    from trio_deploy.runtimes.base import Engine, Runtime, RuntimeSpec

#: Name → module, which ends with `RUNTIME = RuntimeSpec(...)`. The first one is the default.
RUNTIMES = {
    "onnxruntime": "trio_deploy.runtimes.onnxruntime",
    "openvino": "trio_deploy.runtimes.openvino",
    "tensorrt": "trio_deploy.runtimes.tensorrt.runtime",
    "tensorrt-rtx": "trio_deploy.runtimes.tensorrt_rtx",
}

#: A larger number is a typing error, and would exhaust the machine.
MAX_THREADS = 1024

_OPTIONS = ("provider", "precision", "threads", "low_memory")


def runtime_spec(name: str) -> RuntimeSpec:
    """What is known about a runtime; does not import the runtime itself.

    Raises:
        TrioError: there is no such runtime.
    """
    if name not in RUNTIMES:
        raise TrioError(
            f"unknown runtime {name!r}{nearest(name, RUNTIMES)}: choose {_any_of(RUNTIMES)}"
        )
    spec: RuntimeSpec = importlib.import_module(RUNTIMES[name]).RUNTIME
    return spec


def load_target(name_or_path: str | Path | Target) -> Target:
    """Read a target by its name or from a file, and check it; a target itself is only checked.

    Raises:
        TrioError: no such target, an unknown or missing key, or a value that its runtime cannot
            take.
    """
    if isinstance(name_or_path, Target):
        return check(name_or_path)
    file = find_target(name_or_path)
    target = read_target(file)
    try:
        return check(target)
    except TrioError as error:
        raise TrioError(f"{file}: {error}") from None


def default_target(runtime: str | None = None) -> str:
    """Name of the target to export for when a runtime, or none, is asked for.

    Raises:
        TrioError: there is no such runtime, or its targets differ too much for a default.
    """
    name = runtime_spec(runtime or next(iter(RUNTIMES))).default_target
    if name is None:
        raise TrioError(f"{runtime} has no target that suits every device: pass --target")
    return name


def check(target: Target) -> Target:
    """Check a target against its runtime, and fill in what the runtime decides.

    Raises:
        TrioError: a value that the runtime cannot take.
    """
    spec = runtime_spec(target.runtime)
    defaults = {field.name: field.default for field in fields(Target)}
    for key in RUNTIME_KEYS:
        if getattr(target, key) != defaults[key] and key not in spec.target_keys:
            owners = [other.title for other in _specs() if key in other.target_keys]
            raise TrioError(f"{key} belongs to {_any_of(owners)}, not {spec.title}: leave it out")
    if target.dtype not in spec.dtypes:
        raise TrioError(
            f"{spec.title} cannot run {target.dtype} graphs: choose dtype {_any_of(spec.dtypes)}"
        )
    target = spec.check_target(target)
    readable = spec.readable_dialects(target)
    if target.dialect and target.dialect not in readable:
        raise TrioError(
            f"{spec.title} does not read the {target.dialect} dialect"
            f"{nearest(target.dialect, readable)}: choose {_any_of(readable)}"
        )
    scheme = check_scheme(target, target.quantize)
    return replace(target, dialect=target.dialect or readable[0], quantize=scheme)


def check_scheme(target: Target, scheme: str | None) -> str | None:
    """Refuse a scheme of quantised weights that a target's runtime cannot keep narrow.

    Returns:
        The scheme; None: weights are float.

    Raises:
        TrioError: it cannot, or there is no such scheme.
    """
    if not scheme:
        return None
    from trio_deploy.quant.schemes import NO_SCHEME, scheme_named  # they need numpy

    if scheme == NO_SCHEME:
        return None
    named = scheme_named(scheme)
    spec = runtime_spec(target.runtime)
    able = spec.readable_schemes(target)
    if scheme not in able:
        title = f"{spec.title}{f' {target.tensorrt}' if target.tensorrt else ''}"
        if named.capability and spec.needs_engines:
            gpus = target.compute_capabilities or (target.compute_capability or "not named",)
            title = f"{title} (compute capability {', '.join(gpus)})"
        what = scheme
        if named.capability:
            what += (
                f", which need compute capability {named.capability} and TensorRT "
                f"{named.tensorrt}, or later ones"
            )
        remedy = f"choose {_any_of(able)}" if able else "leave quantised weights out"
        raise TrioError(f"{title} does not take weights in {what}: {remedy}")
    return scheme


def rounds_inputs(scheme: str | None) -> bool:
    """Whether a scheme rounds activations, by what a calibration measured."""
    from trio_deploy.quant.schemes import SCHEMES

    return scheme in SCHEMES and SCHEMES[str(scheme)].rounds_inputs


def refuse_uncalibrated(scheme: str | None, target: Target) -> None:
    """Refuse a scheme that rounds activations where nothing was measured of them.

    Raises:
        TrioError: says how it is measured; or that the target does not take the scheme at all.
    """
    if rounds_inputs(scheme):
        check_scheme(target, scheme)
        raise TrioError(
            f"{scheme} rounds activations, too, whose greatest values have to be measured over "
            "questions like those that will be asked: run `trio export MODEL --target "
            f"{target.name} --quantize {scheme} --calibrate QUESTIONS --out OUT`, and pass its "
            "bundle to other commands; QUESTIONS is a file as for trio eval, pictures beside it"
        )


def check_options(options: RuntimeOptions, dtype: str = "float32") -> None:
    """Refuse options that the runtime does not take; with no runtime, that no runtime takes.

    Args:
        dtype: float type of the bundle; a precision equal to it asks for nothing.

    Raises:
        TrioError: says why.
    """
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise TrioError(f"threads must be 1 to {MAX_THREADS}, got {options.threads}")
    specs = list(_specs()) if options.runtime is None else [runtime_spec(options.runtime)]
    for name in _OPTIONS:
        value = getattr(options, name)
        if value in (None, False) or (name == "precision" and value == dtype):
            continue
        takers = [spec for spec in specs if name in spec.options]
        if not takers:
            reason = specs[0].refusals.get(name, "leave it out")
            raise TrioError(f"{name.replace('_', ' ')} is no option of {specs[0].title}: {reason}")
        values = list(dict.fromkeys(each for spec in takers for each in spec.options[name]))
        free = any(not spec.options[name] for spec in takers)
        if not free and not any(
            fnmatchcase(str(value).lower(), pattern.lower()) for pattern in values
        ):
            raise TrioError(
                f"unknown {name} {value!r:.40} for {_any_of([spec.title for spec in takers])}: "
                f"choose {_any_of(values)}"
            )


def complete_options(bundle: Bundle, options: RuntimeOptions) -> RuntimeOptions:
    """Fill in what a caller left open: runtime, provider and precision of the target or bundle.

    Raises:
        TrioError: there is no such target, or it is of another runtime than the one named.
    """
    target = options.target
    if isinstance(target, str):
        from trio_deploy.bundle.manifest import ENGINES
        from trio_deploy.runtimes.tensorrt.record import runtime_of

        folder = bundle.path / ENGINES / target
        if is_folder(folder):
            runtime = runtime_of(folder)
            require_runtime_of(target, runtime, options.runtime)
            return replace(options, runtime=runtime)
    # The manifest's values, since the target file of another machine may not be here.
    chosen: Manifest | Target = bundle.manifest
    if target is not None:
        chosen = target if isinstance(target, Target) else load_target(target)
        require_runtime_of(chosen.name, chosen.runtime, options.runtime)
    return _with_defaults(options, chosen)


def _with_defaults(options: RuntimeOptions, chosen: Manifest | Target) -> RuntimeOptions:
    """Fill in runtime, provider and precision of a target or bundle."""
    runtime = options.runtime or chosen.runtime
    if runtime != chosen.runtime:  # a provider or precision of another runtime
        return replace(options, runtime=runtime)
    taken = runtime_spec(runtime).options
    return replace(
        options,
        runtime=runtime,
        provider=options.provider or (chosen.provider if "provider" in taken else None),
        precision=options.precision or (chosen.precision if "precision" in taken else None),
    )


def open_runtime(options: RuntimeOptions | None = None, bundle: Bundle | None = None) -> Runtime:
    """Open a runtime, for the graphs or engines of a bundle, or for graphs on their own.

    Raises:
        TrioError: an option that the runtime does not take, a bundle that it cannot run, a runtime
            that is not installed, or no engines for it.
    """
    options = options or RuntimeOptions()
    if bundle is not None:
        options = complete_options(bundle, options)
    options = replace(options, runtime=options.runtime or next(iter(RUNTIMES)))
    spec = _able(options, "float32" if bundle is None else bundle.manifest.dtype)
    quantised = None if bundle is None else bundle.manifest.quantization
    if quantised is not None and spec.schemes and quantised.scheme not in spec.schemes:
        raise TrioError(
            f"{spec.title} cannot compute with weights in {quantised.scheme}, which NVIDIA's GPUs "
            f"have: run the bundle there, or export one with --quantize {_any_of(spec.schemes)}"
        )
    return spec.open(options, bundle)


def require_runnable(options: RuntimeOptions, target: Target) -> None:
    """Check, before a model is exported for a target, that its bundle can be run here.

    Whether there are engines, for a runtime that needs them, is not checked.

    Raises:
        TrioError: as `open_runtime`, or the target is of another runtime than the one named.
    """
    require_runtime_of(target.name, target.runtime, options.runtime)
    options = _with_defaults(options, target)
    spec = _able(options, target.dtype)
    if not spec.needs_engines:
        spec.open(options, None)


def require_runtime_of(target: str, runtime: str, asked: str | None) -> None:
    """Refuse a runtime that is asked for together with a target of another one.

    Args:
        target: name of the target; `runtime`: its runtime.
        asked: the runtime that is asked for; None: none.

    Raises:
        TrioError: the two differ.
    """
    if asked not in (None, runtime):
        raise TrioError(f"the target {target} is of {runtime}, not of {asked}: name one of the two")


def _able(options: RuntimeOptions, dtype: str) -> RuntimeSpec:
    """The runtime of completed options, which takes them and graphs of a float type.

    Raises:
        TrioError: it does not.
    """
    spec = runtime_spec(str(options.runtime))
    if dtype not in spec.dtypes:
        able = [other.default_target for other in _specs() if dtype in other.dtypes]
        raise TrioError(
            f"{spec.title} cannot run {dtype} graphs: export with --dtype {_any_of(spec.dtypes)}, "
            f"or with --target {_any_of([name for name in able if name])}"
        )
    check_options(options, dtype)
    return spec


def open_engine(path: str | os.PathLike[str], runtime: str | None = None, **options: Any) -> Engine:
    """Open one graph on its own; `options` are fields of RuntimeOptions."""
    return open_runtime(RuntimeOptions(runtime, **options)).open(Path(path))


def _specs() -> Iterator[RuntimeSpec]:
    return map(runtime_spec, RUNTIMES)


def _any_of(names: Any) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else str(last)
