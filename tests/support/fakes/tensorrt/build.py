"""Building: the builder, its configuration and what a program gives it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import onnx

from tests.support.fakes.tensorrt.graphs import names_read, profile_problem
from tests.support.fakes.tensorrt.versions import Simulated


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self.constructed = True


class IProgressMonitor:
    def __init__(self) -> None:
        self.constructed = True


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[Any]] = {}
        self.values: dict[str, list[Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        if any(not a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise RuntimeError(f"bounds of {input} do not rise")
        self.shapes[input] = [list(min), list(opt), list(max)]

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.values[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class IBuilderConfig:
    _simulated: Simulated
    progress_monitor: Any = None

    def __init__(self) -> None:
        trt = self._simulated.module
        self.flags = {trt.BuilderFlag.TF32}
        self.pools: dict[Any, int] = {}
        self.profiles: list[Any] = []
        self.sources = (1 << len(trt.TacticSource)) - 1
        self.cache: Any = None
        self.preview: set[Any] = set()

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def get_tactic_sources(self) -> int:
        return self.sources

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        self.sources = tactic_sources
        return True

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return self._simulated.new("ITimingCache", serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.content.startswith(b"other"):
            return False
        self.cache = cache
        return True

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    num_compute_capabilities = 0

    def set_compute_capability(self, compute_capability: Any, idx: int) -> bool:
        assert idx < self.num_compute_capabilities
        self.capabilities = [*getattr(self, "capabilities", []), compute_capability.name]
        return True

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self.preview.add(feature)


class Builder:
    _simulated: Simulated

    def __init__(self, logger: Any) -> None:
        assert logger.constructed
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        return self._simulated.new("INetworkDefinition", flags)

    def create_builder_config(self) -> Any:
        return self._simulated.new("IBuilderConfig")

    def create_optimization_profile(self) -> Any:
        return self._simulated.new("IOptimizationProfile")

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        trt = self._simulated.module
        trt.last = network, config
        flags = trt.NetworkDefinitionCreationFlag
        wanted = flags.EXPLICIT_BATCH if self._simulated.old else flags.STRONGLY_TYPED
        assert network.flags == 1 << wanted, "the wrong kind of network"
        assert network.parser() is not None, "the parser is gone, and with it the weights"
        total = self._simulated.cuda.total
        workspace = config.pools.get(trt.MemoryPoolType.WORKSPACE, total)
        assert workspace > 0
        assert trt.BuilderFlag.TF32 not in config.flags
        if not self._simulated.old and not _goes_on(config.progress_monitor):
            return None
        problem = profile_problem(network, config.profiles)
        if problem:
            self._logger.log(ILogger.ERROR, problem)
            return None
        for severity, message in trt.says:
            self._logger.log(severity, message)
        needs = trt.needs.get(network.path.stem, 0)
        if needs > min(workspace, total):
            self._log_without_tactic(needs)
            return None
        self._logger.log(ILogger.INFO, f"built {network.path.name}")
        return self._serialize(network, config)

    def _log_without_tactic(self, needs: int) -> None:
        """Log in the words of TensorRT 10 that no tactic does with the memory there is."""
        self._logger.log(
            ILogger.WARNING,
            "UNSUPPORTED_STATE: Skipping tactic 0 due to insufficient memory on "
            f"requested size of {needs} detected for tactic 0x0000000000000000.",
        )
        self._logger.log(
            ILogger.ERROR,
            "Error Code 10: Internal Error (Could not find any implementation for node "
            "{ForeignNode[a...b]}.)",
        )

    def _serialize(self, network: Any, config: Any) -> bytes:
        """An engine: a checksum, then JSON. An input that no node reads is none of its inputs."""
        read = names_read(onnx.load(network.path, load_external_data=False).graph)
        content = {
            "graph": str(network.path),
            "version": self._simulated.version,
            "capabilities": getattr(config, "capabilities", None),
            "inputs": {t.name: list(t.shape) for t in network.inputs if t.name in read},
            "values": [t.name for t in network.inputs if t.is_shape_tensor],
            "shared_profiles": not self._simulated.old or bool(config.preview),
            "profiles": [{"shapes": p.shapes, "values": p.values} for p in config.profiles],
        }
        text = json.dumps(content).encode()
        return hashlib.sha256(text).digest() + text


def _goes_on(monitor: Any) -> bool:
    """Whether the program's monitor, if there is one, lets a build of two steps finish."""
    if monitor is None:
        return True
    assert monitor.constructed
    monitor.phase_start("building", None, 2)
    for step in range(2):
        if not monitor.step_complete("building", step):
            return False
    monitor.phase_finish("building")
    return True
