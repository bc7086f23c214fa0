"""Checks of single arguments: scales, outputs, row strides and addresses."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np

from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView, source_of
from ..errors import InvalidArgumentError
from ..layouts import CacheLayout
from .problem import PLAN_ALIGNMENT, PLAN_DTYPE, Queries
from .shard import Shard

# What the CUDA kernels are written for.
CUDA_WIDTH_MULTIPLE = 64
CUDA_MAX_LATENT = 512
CUDA_MAX_WIDTH = 1024  # latent and rope: 32 rows of queries and a tile have room in shared memory
# What TMA asks of global addresses and strides, in bytes.
COPY_ALIGNMENT = 16
COPY_MAX_STRIDE = 2**40
NUMPY_WAY_OUT = "(the NumPy backend takes any: CPU arrays with strict=False)"
# Times log2(e), a softmax scale is a float32.
_MIN_SCALE, _MAX_SCALE = 1e-37, 1e37
KV_SCALE_DTYPE = "float32"
PARTS_OF_A_TOKEN = 2  # latent and rope, each of which may have a scale
_SMALLEST_KV_SCALE, _LARGEST_KV_SCALE = 1e-37, 1e37  # of a cache, well within float32


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python's or NumPy's, and no array."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_pair_of_numbers(value: Any) -> bool:
    """Whether a value is two of them: the scales of the latent and of the rope part."""
    return isinstance(value, (tuple, list)) and len(value) == PARTS_OF_A_TOKEN and all(map(is_number, value))


def has_scale_of_each_part(kv_scale: Any) -> bool:
    """Whether a scale, a number, an array or a view of one, is two: of the latent and of the rope part."""
    return is_pair_of_numbers(kv_scale) or tuple(getattr(kv_scale, "shape", ())) == (PARTS_OF_A_TOKEN,)


def has_rounding_ratio(kv_scale: Any) -> bool:
    """Whether a scale is two, of latent and rope part, of which the ratio may be no power of two."""
    if not is_pair_of_numbers(kv_scale):
        return has_scale_of_each_part(kv_scale)
    latent, rope = (math.frexp(scale)[0] for scale in kv_scale)
    return latent != rope


def check_softmax_scale(softmax_scale: float) -> None:
    """Refuse a scale that is not above 0 (the kernels take row maxima before they scale) and well within float32.

    Raises
    ------
    InvalidArgumentError
        It is not a number, or is below the least or above the largest scale that is served.
    """
    if not _MIN_SCALE <= softmax_scale <= _MAX_SCALE:
        raise InvalidArgumentError(
            "softmax_scale", f"a finite number above 0, {_MIN_SCALE:.0e} to {_MAX_SCALE:.0e}", str(softmax_scale)
        )


def check_kv_scale(kv_scale: float) -> float:
    """The scale of a cache as Python's number.

    Raises
    ------
    InvalidArgumentError
        It is none that float32 has room for; ``argument`` is ``kv_scale``.
    """
    value = float(kv_scale)
    if not _SMALLEST_KV_SCALE <= value <= _LARGEST_KV_SCALE:
        expected = f"{_SMALLEST_KV_SCALE:.0e} to {_LARGEST_KV_SCALE:.0e}"
        raise InvalidArgumentError("kv_scale", expected, str(value))
    return value


def check_kv_scale_array(kv_scale: ArrayView, *, of_parts: bool = False) -> None:
    """Refuse an array that is not the scale of a cache, or where there may be one for each part those of the parts.

    Raises
    ------
    InvalidArgumentError
        It is not one float32, nor two where there may be; ``argument`` is ``kv_scale``.
    """
    shapes = ((), (1,), (PARTS_OF_A_TOKEN,)) if of_parts else ((), (1,))
    if kv_scale.dtype != KV_SCALE_DTYPE or kv_scale.shape not in shapes:
        got = f"{kv_scale.dtype} {list(kv_scale.shape)}"
        two = ", or two, of latent and rope" if of_parts else ""
        raise InvalidArgumentError("kv_scale", f"a number, or one {KV_SCALE_DTYPE} in an array{two}", got)
    if of_parts and kv_scale.shape == (PARTS_OF_A_TOKEN,) and kv_scale.strides != (1,):
        raise InvalidArgumentError("kv_scale", "a contiguous array", f"strides {kv_scale.strides}")


def scale_value(kv_scale: Any, layout: CacheLayout) -> float:
    """The scale of a cache where it is a number; 1 where it is an array, or there is none.

    Raises
    ------
    InvalidArgumentError
        It is missing, the layout has none, or it is none that float32 has room for; ``argument`` is ``kv_scale``.
    """
    if layout.needs_scale:
        if kv_scale is None:
            expected = f"a number, or one {KV_SCALE_DTYPE}, for the layout {layout.name}"
            raise InvalidArgumentError("kv_scale", expected, "None")
    elif kv_scale is not None:
        raise InvalidArgumentError("kv_scale", f"None: the layout {layout.name} has no scale", type(kv_scale).__name__)
    return check_kv_scale(kv_scale) if is_number(kv_scale) else 1.0


def scale_values(kv_scale: Any, layout: CacheLayout) -> tuple[float, float]:
    """The scales of the latent and the rope part of a cache, as `scale_value` has one; a pair of numbers are two.

    Raises
    ------
    InvalidArgumentError
        It is missing, the layout has none, or a number is none that float32 has room for; ``argument`` is ``kv_scale``.
    """
    if layout.needs_scale and is_pair_of_numbers(kv_scale):
        latent, rope = map(check_kv_scale, kv_scale)
        return latent, rope
    value = scale_value(kv_scale, layout)
    return value, value


def check_output(
    array: ArrayView,
    name: str,
    expected_shape: tuple[int, ...],
    dtype: str,
    location: tuple[str, int],
    *,
    contiguous_rows: bool = False,
) -> None:
    """Refuse an array that a result cannot be written to.

    Parameters
    ----------
    array
        View of what the caller gave.
    name
        Its name, ``"out"`` or ``"lse"``.
    expected_shape, dtype
        What it has to be.
    location
        Device and number that q is on (`DecodeInputs.location`).
    contiguous_rows
        Whether the last dimension has to be contiguous and, on CUDA, the rows aligned for 16-byte stores, in whichever
        direction and how far apart they may lie.

    Raises
    ------
    InvalidArgumentError
        Shape, type, device, strides or alignment are wrong, its elements overlap, or it must not be written.
    """
    if array.shape != expected_shape:
        raise InvalidArgumentError(name, f"shape {list(expected_shape)}", str(list(array.shape)))
    if array.dtype != dtype:
        raise InvalidArgumentError(name, dtype, array.dtype)
    if array.location != location:
        raise InvalidArgumentError(name, f"an array on q's device, {place_name(location)}", place_name(array.location))
    check_no_overlap(array, name)
    owner = source_of(array)
    if isinstance(owner, np.ndarray):
        if not owner.flags.writeable:
            raise InvalidArgumentError(name, "a writable array", "a read-only one")
    elif type(owner).__module__.startswith("jax"):
        raise InvalidArgumentError(name, "a writable array", "a JAX array, which is immutable")
    if contiguous_rows:
        check_rows(array.shape, array.strides, array.itemsize, False, name)
        if array.device != CUDA or 0 in array.shape:
            return
        if any(
            extent > 1 and step * array.itemsize % COPY_ALIGNMENT
            for extent, step in zip(array.shape[:-1], array.strides[:-1], strict=True)
        ):
            elements = COPY_ALIGNMENT // array.itemsize
            expected = f"strides that are multiples of {elements} elements ({COPY_ALIGNMENT} bytes)"
            raise InvalidArgumentError(name, expected, f"strides {array.strides}")
        if array.pointer % COPY_ALIGNMENT:
            raise misaligned(name, array.pointer, COPY_ALIGNMENT)
    elif array.device == CUDA and array.pointer % array.itemsize:
        raise misaligned(name, array.pointer, array.itemsize)


def check_no_overlap(array: ArrayView, name: str) -> None:
    """Refuse an array to be written whose elements share memory with each other, as far as its strides show.

    Raises
    ------
    InvalidArgumentError
        They do, or the axes interleave in a way that no view of an ordinary array has; ``argument`` is ``name``.
    """
    if 0 in array.shape:
        return
    span = 1  # elements from the first to the last of the axes so far
    for step, extent in sorted((abs(step), extent) for step, extent in zip(array.strides, array.shape, strict=True)):
        if extent > 1 and step < span:
            raise InvalidArgumentError(name, "elements that do not overlap", f"strides {array.strides}")
        span += (extent - 1) * step


def check_rows(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, by_tma: bool, name: str) -> None:
    """Refuse rows that are not contiguous, or as far apart as TMA cannot take them where it does.

    Raises
    ------
    InvalidArgumentError
        Rows are of that kind; ``argument`` is ``name``.
    """
    if 0 in shape:
        return  # strides of an array without elements may be anything
    if shape[-1] > 1 and strides[-1] != 1:
        raise InvalidArgumentError(name, "a contiguous last dimension", f"strides {strides}")
    if not by_tma:
        return
    for extent, step in zip(shape[:-1], strides[:-1], strict=True):
        if extent > 1 and (step * itemsize % COPY_ALIGNMENT or not 0 <= step * itemsize < COPY_MAX_STRIDE):
            raise InvalidArgumentError(
                name,
                f"strides that are multiples of {COPY_ALIGNMENT // itemsize} elements ({COPY_ALIGNMENT} bytes), "
                f"not negative and below {COPY_MAX_STRIDE} bytes",
                f"strides {strides}",
            )


def check_cuda_widths(queries: Queries) -> None:
    """Refuse widths that no CUDA kernel is written for.

    Raises
    ------
    InvalidArgumentError
        The latent or the rope width is no multiple of 64, or too large.
    """
    if queries.latent_dim % CUDA_WIDTH_MULTIPLE or queries.latent_dim > CUDA_MAX_LATENT:
        raise InvalidArgumentError(
            "head_dim_v",
            f"a multiple of {CUDA_WIDTH_MULTIPLE} up to {CUDA_MAX_LATENT} {NUMPY_WAY_OUT}",
            str(queries.latent_dim),
        )
    if queries.rope_dim % CUDA_WIDTH_MULTIPLE:
        raise InvalidArgumentError(
            "q", f"a rope width that is a multiple of {CUDA_WIDTH_MULTIPLE} {NUMPY_WAY_OUT}", str(queries.rope_dim)
        )
    if queries.head_dim_qk > CUDA_MAX_WIDTH:
        raise InvalidArgumentError("q", f"a width up to {CUDA_MAX_WIDTH} {NUMPY_WAY_OUT}", str(queries.head_dim_qk))


def settled_strides(array: ArrayView) -> tuple[int, ...]:
    """The strides, with those of axes of extent 1 (which mean nothing, and may be anything) as if contiguous."""
    strides = list(array.strides)
    step = 1
    for axis in range(array.ndim - 1, -1, -1):
        if array.shape[axis] == 1:
            strides[axis] = step
        step = strides[axis] * array.shape[axis]
    return tuple(strides)


def check_plan_view(plan: ArrayView, location: tuple[str, int]) -> None:
    """Refuse an array that cannot hold a plan.

    Raises
    ------
    InvalidArgumentError
        Its type, rank, strides, device or alignment are wrong.
    """
    if plan.dtype != PLAN_DTYPE or plan.ndim != 1 or plan.strides != (1,) or plan.location != location:
        raise InvalidArgumentError(
            "plan",
            f"an array from plan_decode, {PLAN_DTYPE}, on {place_name(location)}",
            f"{plan.dtype} {list(plan.shape)} on {place_name(plan.location)}",
        )
    if plan.device == CUDA and plan.pointer % PLAN_ALIGNMENT:
        raise misaligned("plan", plan.pointer, PLAN_ALIGNMENT)


def misaligned(name: str, pointer: int, alignment: int) -> InvalidArgumentError:
    """What to raise for an address that is no multiple of ``alignment`` bytes."""
    return InvalidArgumentError(name, f"an address that is a multiple of {alignment} bytes", hex(pointer))


def place_name(location: tuple[str, int]) -> str:
    """A device and its number in words."""
    device, device_id = location
    return f"{device}:{device_id}" if device == CUDA else device


def as_integer(value: Any, name: str) -> int:
    """An integer of any type as int.

    Raises
    ------
    InvalidArgumentError
        It is none; ``argument`` is ``name``.
    """
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise InvalidArgumentError(name, "an integer", f"{type(value).__name__} {value!r}")


def as_number(value: Any, name: str) -> float:
    """A real number of any type as float; infinity for one that float cannot hold.

    Raises
    ------
    InvalidArgumentError
        It is none; ``argument`` is ``name``.
    """
    # By its type alone: to ask an array on a GPU for its value would wait for it.
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise InvalidArgumentError(name, "a number", type(value).__name__)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_boolean(value: Any, name: str) -> bool:
    """A truth value of any type as bool.

    Raises
    ------
    InvalidArgumentError
        It is none; ``argument`` is ``name``.
    """
    if isinstance(value, np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise InvalidArgumentError(name, "True or False", f"{type(value).__name__} {value!r}")


def as_text(value: Any, name: str) -> str:
    """A string.

    Raises
    ------
    InvalidArgumentError
        It is none; ``argument`` is ``name``.
    """
    if isinstance(value, str):
        return str(value)  # of a type derived from it, too
    raise InvalidArgumentError(name, "a string", f"{type(value).__name__} {value!r}")


def sharded_places(
    given: tuple[int, int, int], totals: ArrayView | None, causal: bool, batch: int, seqlen_q: int
) -> tuple[int, int, int]:
    """World, rank and interleave of a sharded cache where a mask goes by them, else those of a whole one.

    Raises
    ------
    InvalidArgumentError
        The lengths of whole requests are missing, or not one for each; ``argument`` is ``total_seqlens``.
    """
    if totals is not None and totals.shape != (batch,):
        raise InvalidArgumentError("total_seqlens", f"shape [{batch}], one per request", str(list(totals.shape)))
    if given[0] == 1 or not causal or seqlen_q <= 1:
        return 1, 0, 1
    if totals is None:
        expected = f"an array: a causal mask goes by places in whole requests (cp_world is {given[0]})"
        raise InvalidArgumentError("total_seqlens", expected, "None")
    return given


def shard_of(world: Any, rank: Any, interleave: Any) -> Shard:
    """A shard of numbers of any integer type.

    Raises
    ------
    InvalidArgumentError
        One is no integer or out of range; ``argument`` is ``cp_world``, ``cp_rank`` or ``cp_interleave``.
    """
    return Shard(as_integer(world, "cp_world"), as_integer(rank, "cp_rank"), as_integer(interleave, "cp_interleave"))
