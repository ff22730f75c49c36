"""The menu of schemes, and how one matrix is stored under each.

A scheme says how many bits the matrices of the decoder layers have, as whole numbers or floats. The
output head is in whole numbers of 8 bit, since 4 move more tokens there than anywhere else; so are
the copies of a layer's matrices that selections compute with, since it is their rounding that
decides which tokens are kept, and a table of embeddings that serves as the head. Everything else
stays float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import (
    LEAST_SCALE,
    QuantisedMatrix,
    block_count,
    dequantised,
    in_8_bit,
    in_blocks,
    round_to_nearest,
)
from trio_deploy.quant.narrow_floats import (
    BLOCK,
    from_e2m1,
    from_e4m3,
    round_to_e2m1,
    round_to_e4m3,
)
from trio_deploy.quant.packing import Form, pack, unpack
from trio_deploy.quant.stored_weight import FLOATS, LABELS, Coding, Kind, Part, StoredWeight

#: Blocks of matrices in 8 bit, where they have any: the first that divides a row.
_BLOCKS_OF_8 = (128, 64)

#: How rounding to nearest computes codes: a bundle names it, so that a change can be told.
ROUNDING = 1
#: The same of how codes of quantised checkpoints are read.
READING = 1


@dataclass(frozen=True)
class StoredMatrix:
    """How a quantised checkpoint holds a matrix.

    Attributes:
        bits: 4 or 8.
        block: entries along K that share a scale.
        symmetric: whether it needs no zero points.
    """

    bits: int
    block: int
    symmetric: bool


@dataclass(frozen=True)
class Scheme:
    """A line of the menu.

    Attributes:
        name: as users write it.
        bits: of the matrices of decoder layers, 4 or 8.
        blocks: entries that share a scale; the first that divides a row; none: a row.
        kind: of the codes of decoder layers. Floats are computed by NVIDIA's GPUs alone.
        capability: compute capability from which on GPUs have the codes' type; "": any device.
        tensorrt: version from which on TensorRT has it.
        inputs: the greatest magnitude of what a matrix is multiplied by, by canonical name, where
            that is rounded too; None: it is not known, as in plans.
        stored: matrices that a checkpoint holds quantised, by canonical name: they keep their
            codes, other matrices of decoder layers stay float, and a float head is rounded. None:
            all are rounded.
    """

    name: str
    bits: int
    blocks: tuple[int, ...]
    kind: Kind = "int"
    capability: str = ""
    tensorrt: str = ""
    inputs: Mapping[str, float] | None = None
    stored: Mapping[str, StoredMatrix] | None = None

    @property
    def label(self) -> str:
        """`int4`, as of `Coding`."""
        return f"{self.kind}{self.bits}"

    @property
    def rounds_inputs(self) -> bool:
        """Whether what a matrix is multiplied by is rounded in graphs, by a scale of its own."""
        return self.label == "fp8"


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, _BLOCKS_OF_8),
        Scheme("int4", 4, (128, 64)),
        Scheme("int4-g32", 4, (32,)),
        Scheme("fp8", 8, (), "fp", "8.9", "10.0"),
        Scheme("nvfp4", 4, (BLOCK,), "fp", "10.0", "10.8"),
    )
}

#: Schemes that every device can compute with.
WHOLE_NUMBERS = tuple(name for name, scheme in SCHEMES.items() if scheme.kind == "int")

NO_SCHEME = "none"
"""What users write to leave weights float where a recipe or target says otherwise."""


def scheme_named(name: str) -> Scheme:
    """A scheme of the menu.

    Raises:
        TrioError: there is none of that name.
    """
    if name not in SCHEMES:
        raise TrioError(f"unknown quantisation {name!r}: choose one of {', '.join(SCHEMES)}, none")
    return SCHEMES[name]


def scheme_of(stored: Mapping[str, StoredMatrix]) -> Scheme:
    """The scheme of a checkpoint's quantised matrices, with the name of what they are like."""
    bits = min(matrix.bits for matrix in stored.values())
    block = min(matrix.block for matrix in stored.values() if matrix.bits == bits)
    if bits == 8:
        return replace(SCHEMES["int8"], stored=stored)
    return replace(SCHEMES["int4" if block > 32 else "int4-g32"], blocks=(block,), stored=stored)


def same_scheme(stored: Mapping[str, StoredMatrix], asked: str | None) -> str:
    """The name of the scheme of a checkpoint's quantised matrices.

    Args:
        asked: the scheme that was asked for; None: whatever there is.

    Raises:
        TrioError: another one was asked for.
    """
    scheme = scheme_of(stored).name
    if asked not in (None, scheme):
        raise TrioError(
            f"--quantize {asked} cannot be had of a checkpoint that is quantised as {scheme}: "
            "leave --quantize out, or use the float checkpoint it was made from"
        )
    return scheme


def selections_of(
    asked: str | None, usual: Sequence[str | None], scheme: str | None, stored: bool
) -> str:
    """What selections compute with beside quantised weights, `int8` or `float`.

    Args:
        asked: the option; None: what is usual.
        usual: what a recipe and a target say, the first of which counts.
        scheme: by which weights are quantised; None: they are float.
        stored: whether the checkpoint holds them quantised, whose float values nobody has.

    Raises:
        TrioError: something is asked for that there is not.
    """
    if asked is not None and scheme is None:
        raise TrioError(
            "--selections says what selections compute with beside quantised weights: name a "
            "scheme by --quantize, or leave --selections out"
        )
    if asked == "float" and stored:
        raise TrioError(
            "--selections float takes the values that matrices had before they were quantised, "
            "which a checkpoint that is quantised already does not have: leave it out, or use the "
            "float checkpoint it was made from"
        )
    named = next(filter(None, (asked, *usual)), "int8")
    return "int8" if stored else named


def quantised_weight(name: str, shape: Sequence[int], coding: Coding) -> StoredWeight:
    """A matrix [N, K] as its codes `<name>.int4`, `<name>.int4.scale` and what `coding` adds.

    Zero points are `<name>.int4.zero`; what blocks have added is `<name>.int4.offset`; the scale of
    a whole matrix is `<name>.fp4.matrix`.
    """
    rows, columns = shape
    blocks, codes = block_count(columns, coding.block), f"{name}.{coding.label}"
    if coding.form == "blocks":
        bytes_per_block = coding.block * coding.bits // 8
        first = Part(codes, (rows, blocks, bytes_per_block), "uint8")
        scales: tuple[int, ...] = (rows, blocks)
    elif coding.label == "fp8":
        first, scales = Part(codes, (rows, columns), LABELS["fp8"]), (rows,)
    elif coding.bits == 8:
        first = Part(codes, (rows * blocks, columns // blocks), "int8")
        scales = (rows * blocks,)
    else:
        first, scales = Part(codes, (rows, columns), LABELS[coding.label]), (rows, blocks)
    parts = [first, Part(f"{codes}.scale", scales, coding.scale_dtype)]
    if coding.asymmetric and coding.form == "blocks":
        parts.append(Part(f"{codes}.zero", (rows, (blocks * coding.bits + 7) // 8), "uint8"))
    elif coding.asymmetric:
        parts.append(Part(f"{codes}.offset", (rows, blocks), coding.scale_dtype))
    elif coding.label == "fp4":
        parts.append(Part(f"{codes}.matrix", (), "float32"))
    return StoredWeight(name, (rows, columns), tuple(parts), coding)


def encode(
    rows: np.ndarray, coding: Coding, of_matrix: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Round some rows of a matrix, floats [n, K]: its codes as bytes, and its scales.

    Args:
        of_matrix: the scale of the whole matrix, where `coding` has one.

    Raises:
        TrioError: a value is not finite.
    """
    if of_matrix is not None:
        return round_to_e2m1(rows, of_matrix)
    kind = FLOATS[coding.scale_dtype]
    if coding.kind == "fp":
        return round_to_e4m3(rows, kind)
    packed = pack(round_to_nearest(rows, coding.bits, coding.block, kind), coding.form)
    return packed["codes"], packed["scale"].astype(kind)


def stored_arrays(matrix: QuantisedMatrix, coding: Coding) -> list[np.ndarray]:
    """The arrays of the parts of a checkpoint's matrix, which keeps its values.

    Raises:
        TrioError: a scale does not fit into the type of scales.
    """
    rows, columns = matrix.codes.shape
    if coding.bits == 8 and matrix.bits == 4:
        matrix = in_8_bit(matrix)
    if coding.block < matrix.block or matrix.block >= columns:
        matrix = in_blocks(matrix, coding.block)
    kind, offset = FLOATS[coding.scale_dtype], None
    with np.errstate(over="ignore"):
        most = matrix.scale.max().astype(kind)
    if not np.isfinite(most.astype(np.float32)):
        raise TrioError(
            f"a scale is more than {coding.scale_dtype} can hold: choose --dtype float32"
        )
    if coding.form == "signed":
        if matrix.zero is not None:
            offset = matrix.scale * (matrix.offset - matrix.zero.astype(np.float32))
        elif coding.asymmetric:
            offset = np.zeros_like(matrix.scale)
        matrix = replace(matrix, zero=None)
        if coding.bits == 8 and matrix.block < columns:
            flat = (rows * matrix.scale.shape[1], matrix.block)
            matrix = replace(
                matrix, codes=matrix.codes.reshape(flat), scale=matrix.scale.reshape(-1, 1)
            )
    elif coding.asymmetric and matrix.zero is None:
        matrix = replace(matrix, zero=np.full(matrix.scale.shape, matrix.offset, np.uint8))
    packed = pack(matrix, coding.form)
    arrays = [packed["codes"], np.maximum(packed["scale"], LEAST_SCALE).astype(kind)]
    if coding.asymmetric:
        arrays.append(packed["zero"] if offset is None else offset.astype(kind))
    return arrays


def values_of(arrays: Mapping[str, np.ndarray], label: str, columns: int) -> np.ndarray:
    """The values of a quantised matrix, float32 [N, K], from the arrays of its parts.

    Args:
        arrays: `codes`, `scale`, and the others that there are by the end of their names.
        label: as of `Coding`.
        columns: K.
    """
    codes, scale = arrays["codes"], arrays["scale"]
    if label == "fp8":
        return from_e4m3(codes, scale)
    if label == "fp4":
        return from_e2m1(codes, scale, arrays["matrix"])
    others = {name: arrays[name] for name in ("zero", "offset") if name in arrays}
    return decode(codes, scale, int(label.removeprefix("int")), columns, **others)


def decode(
    codes: np.ndarray,
    scale: np.ndarray,
    bits: int,
    columns: int,
    *,
    zero: np.ndarray | None = None,
    offset: np.ndarray | None = None,
) -> np.ndarray:
    """The values of a matrix in whole numbers, float32 [N, K], from the arrays of its parts.

    Args:
        codes: as stored: bytes [N, ⌈K/b⌉, b·bits/8] in blocks, else [N, K] or [N, K/2], or in
            8 bit [N·K/b, b].
        scale: in any float type.
        bits, columns: of the matrix, K columns.
        zero: zero points, in blocks.
        offset: what blocks have added, [N, K/b].
    """
    form: Form = "blocks" if codes.ndim == 3 else "signed"
    arrays = {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})
    values = dequantised(unpack(arrays, form, columns, bits)).reshape(-1, columns)
    if offset is not None:
        block = columns // offset.shape[1]
        values += np.repeat(offset.astype(np.float32), block, axis=1)
    return values


def coding_of(scheme: Scheme, bits: int, columns: int, form: Form, dtype: str) -> Coding:
    """How a matrix with rows of K entries is stored under a scheme.

    In `signed` codes of 8 bit each row has a scale, in float32, the one type that DequantizeLinear
    takes before opset 19; a row of 4 bit that is no whole number of blocks has 8 bit instead. In
    `blocks` the last block may be short.

    Args:
        bits: of this matrix, in whole numbers: the scheme's, or 8 for the head and selections.
        dtype: the graph's float type.
    """
    blocks = scheme.blocks if f"int{bits}" == scheme.label else _BLOCKS_OF_8
    whole = next((block for block in blocks if columns % block == 0), None)
    if form == "blocks":
        return Coding(bits, whole or blocks[0], form, dtype)
    if bits == 8 or whole is None:
        return Coding(8, columns, form, "float32")
    return Coding(bits, whole, form, dtype)


def _float_coding(scheme: Scheme, columns: int, dtype: str) -> Coding | None:
    """How a matrix is stored under a scheme of floats; None: no block divides its rows."""
    if not scheme.blocks:
        return Coding(scheme.bits, columns, "signed", dtype, kind="fp")
    block = next((block for block in scheme.blocks if columns % block == 0), None)
    if block is None:
        return None
    return Coding(scheme.bits, block, "signed", LABELS["fp8"], kind="fp")


def layer_coding(
    scheme: Scheme, name: str, columns: int, selects: bool, form: Form, dtype: str
) -> Coding | None:
    """How a matrix of a decoder layer is stored; None: float.

    Args:
        name: canonical name.
        selects: whether a selection computes with it, in 8 bit at least.
        dtype: the graph's float type.
    """
    least = 8 if selects else 4
    if scheme.kind == "fp":
        own = None if selects else _float_coding(scheme, columns, dtype)
        return own or coding_of(scheme, 8, columns, form, dtype)
    if scheme.stored is None:
        return coding_of(scheme, max(least, scheme.bits), columns, form, dtype)
    matrix = scheme.stored.get(name)
    return None if matrix is None else coding_of_stored(matrix, least, columns, form, dtype)


def head_coding(
    scheme: Scheme, name: str, columns: int, selects: bool, form: Form, dtype: str
) -> Coding | None:
    """How the output head is stored, as `layer_coding`: in 8 bit, if it was float."""
    if scheme.stored is None or name not in scheme.stored:
        return coding_of(scheme, 8, columns, form, dtype)
    return layer_coding(scheme, name, columns, selects, form, dtype)


def coding_of_stored(
    matrix: StoredMatrix, least: int, columns: int, form: Form, dtype: str
) -> Coding:
    """How a checkpoint's matrix is stored: to the same values.

    Codes of 4 bit become codes of 8 bit without zero points where 4 bit cannot be had: less the
    zero point they lie between -15 and 15.

    Args:
        least: bits.
        dtype: the graph's float type.

    Raises:
        TrioError: operators have no blocks of that size.
    """
    whole_row = matrix.block >= columns
    sizes = (128, 64, 32, 16)
    fitting = (b for b in sizes if (columns if whole_row else matrix.block) % b == 0)
    block = next(fitting, None)
    bits = max(least, matrix.bits)
    if form == "signed" and (bits == 8 or block is None):
        block = columns if whole_row else matrix.block
        return Coding(8, block, form, "float32", matrix.bits == 8 and not matrix.symmetric)
    if block is None and whole_row:
        block = sizes[0]  # the last may be short
    if block is None:
        raise TrioError(
            f"the checkpoint has blocks of {matrix.block}, and operators those of 16 and more, in "
            "powers of 2: use another checkpoint"
        )
    return Coding(bits, block, form, dtype, bits == matrix.bits and not matrix.symmetric)


#: Ends of the names of parts beside codes.
BESIDE_CODES = (".scale", ".zero", ".offset", ".matrix")


def split_name(name: str) -> tuple[str, str] | None:
    """The weight and the label that the name of a part with codes tells; None for other parts."""
    weight, _, label = name.rpartition(".")
    return (weight, label) if label in LABELS else None


def bits_of(label: str) -> int:
    """Bits per code: `int4`, 4."""
    return int(label[-1])


def coded_part(part: Part) -> tuple[str, tuple[int, ...]]:
    """How a part lies in a .safetensors file, which has no type of 4 bit: its type and shape."""
    if part.dtype in (LABELS["int4"], LABELS["fp4"]):
        return "uint8", (*part.shape[:-1], math.ceil(part.shape[-1] / 2))
    return part.dtype, part.shape
