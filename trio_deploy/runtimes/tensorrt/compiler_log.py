"""What TensorRT-RTX's compiler says of an engine in its log: kernels, their tensors, and memory.

An engine cannot be loaded without a driver, so this is all that a machine without a GPU learns of
one. The log is read from messages of severity `VERBOSE` of a build with `BuildOptions.detailed`:

    Total Activation Memory: 27200000 bytes          (once per profile; the largest counts)
    Total Weights Memory: 1280000 bytes
    Layers:
    Name: …, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,-1,128], …, Datatype: Half, … }],
        Constants: […], Outputs: […], …, Metadata: [ONNX Layer: a/node][ONNX Layer: another]
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from trio_deploy.errors import TrioError

_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")
_KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?, Outputs: \[(?P<outputs>.*?)\]"
    r", (?:TacticName|ParameterType): .*?, Metadata: (?P<metadata>.*)$"
)
_TENSOR = re.compile(
    r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([^\]]*)\].*?Datatype: (\w+)"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Names:
    """The compiler's own names for what we look for; nothing documents them.

    Attributes:
        attention: beginnings of the names of kernels that are one whole attention.
        to_host: beginning of the name of a copy to the host, for which the host waits.
        launches: kinds of layers that are work on the GPU, without copies and clearing.
    """

    attention: tuple[str, ...]
    to_host: str
    launches: frozenset[str]


#: Compiler's version → its names. A new version is looked at before it is listed.
NAMES = {
    "1.7.1.116": Names(
        ("_gemm_mha", "_gemv_mha"),
        "copy_d2h",
        frozenset(("kgen", "gemm", "runtime_fusion", "correlation")),
    )
}


class LoggedTensor(msgspec.Struct, frozen=True):
    """An input, constant or output of a kernel.

    Attributes:
        sizes: -1 for a dynamic one.
        dtype: the compiler's name of the element type, such as `Half` or `Float`.
    """

    name: str
    sizes: tuple[int, ...]
    dtype: str


class Kernel(msgspec.Struct, frozen=True):
    """A layer of a compiled engine.

    Attributes:
        kind: the compiler's kind, such as `gemm`, or `kgen` for a kernel that it wrote.
        nodes: names of the graph's nodes that it computes.
    """

    name: str
    kind: str
    inputs: tuple[LoggedTensor, ...]
    constants: tuple[LoggedTensor, ...]
    outputs: tuple[LoggedTensor, ...]
    nodes: tuple[str, ...]


class CompilerReport(msgspec.Struct, frozen=True):
    """What the compiler said of one engine.

    Attributes:
        version: the compiler's.
        activation_bytes: scratch memory at the largest shapes of any profile.
        weight_bytes: weights that the engine holds.
        kernels: layers of all profiles, in the order of execution.
    """

    version: str
    activation_bytes: int
    weight_bytes: int
    kernels: tuple[Kernel, ...]

    @property
    def names(self) -> Names:
        """The compiler's names.

        Raises:
            TrioError: none are known for this version.
        """
        return names_of(self.version)

    @property
    def launches(self) -> int:
        """Number of kernels with work on the GPU; those of a loop's body count once."""
        return sum(kernel.kind in self.names.launches for kernel in self.kernels)

    @property
    def attentions(self) -> int:
        """Number of kernels that are one whole attention."""
        return sum(kernel.name.startswith(self.names.attention) for kernel in self.kernels)

    @property
    def host_waits(self) -> int:
        """Number of copies to the host, for which it waits; those of a loop's body count once."""
        return sum(kernel.name.startswith(self.names.to_host) for kernel in self.kernels)

    def scores(self, heads: int) -> list[str]:
        """Float outputs of [heads,S,S], or [1,heads,S,S] if S is dynamic: attention split up.

        Only in an engine for one row: a batch of dynamic size hides the heads.
        """
        return [
            output.name
            for kernel in self.kernels
            for output in kernel.outputs
            if output.dtype in ("Float", "Half", "BFloat16") and _is_scores(output.sizes, heads)
        ]

    def copies(self, elements: Sequence[int], inputs_and_outputs: Sequence[str]) -> list[str]:
        """Results inside the engine that have as many elements as a cache.

        Args:
            elements: sizes of the caches, which must be fixed.
            inputs_and_outputs: names of the engine's own tensors, which are none.
        """
        return [
            output.name
            for kernel in self.kernels
            for output in kernel.outputs
            if math.prod(output.sizes) in elements and output.name not in inputs_and_outputs
        ]


def names_of(version: str) -> Names:
    """The names of a compiler.

    Raises:
        TrioError: none are known for this version.
    """
    if version not in NAMES:
        raise TrioError(
            f"the compiler changed: the kernels of TensorRT-RTX {version} are not known, only "
            f"those of {', '.join(NAMES)}: look at its log, then list its names in {__name__}"
        )
    return NAMES[version]


@dataclass
class CompilerLog:
    """Collects what the messages of one build say; a `bindings.Log`."""

    _activations: list[int] = field(default_factory=list)
    _weights: list[int] = field(default_factory=list)
    _kernels: list[Kernel] = field(default_factory=list)

    def __call__(self, severity: str, message: str) -> None:
        """Read a message; any but those above is ignored."""
        if found := _MEMORY.search(message):
            known = self._activations if found[1] == "Activation" else self._weights
            known.append(int(found[2]))
        elif "LayerType: " in message:
            self._kernels += [k for line in message.splitlines() if (k := _kernel(line))]

    def report(self, version: str) -> CompilerReport:
        """The report of a build that has finished.

        Raises:
            TrioError: the log does not have the lines that are looked for.
        """
        if not (self._activations and self._weights and self._kernels):
            raise TrioError(
                f"the compiler changed: the log of TensorRT-RTX {version} does not list kernels "
                f"and memory as {__name__} reads them"
            )
        return CompilerReport(
            version, max(self._activations), max(self._weights), tuple(self._kernels)
        )


def _kernel(line: str) -> Kernel | None:
    found = _KERNEL.match(line)
    if found is None:
        return None
    inputs, constants, outputs = (
        _tensors(found[group] or "") for group in ("inputs", "constants", "outputs")
    )
    nodes = tuple(_NODE.findall(found["metadata"]))
    return Kernel(found["name"], found["kind"], inputs, constants, outputs, nodes)


def _tensors(text: str) -> tuple[LoggedTensor, ...]:
    return tuple(
        LoggedTensor(name, tuple(int(size) for size in sizes.split(",") if size), dtype)
        for name, sizes, dtype in _TENSOR.findall(text)
    )


def _is_scores(sizes: tuple[int, ...], heads: int) -> bool:
    fixed = [size for size in sizes if size >= 0]
    if len(sizes) - len(fixed) == 2:  # S is dynamic
        return heads > 1 and math.prod(fixed) == heads
    # Patches of a tower's tile; with four axes it may be a picture, of as many channels.
    return len(sizes) == 3 and sizes[0] == heads > 1 and sizes[1] == sizes[2] > 1
