"""Kernels that use no Hopper instruction, compiled for the CPU by g++ and run as they are (tests/host_cuda)."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cupy_mla.gpu.jit.source import kernels_root
from cupy_mla.kernels.combine import MERGE_STATES_THREADS
from cupy_mla.kernels.family import ALL_COLUMNS, ColumnParts, scale_defines
from cupy_mla.kernels.planner import plan_params, plan_sections, read_plan
from cupy_mla.schedule.make import Schedule
from cupy_mla.schedule.shape import ScheduleShape

HOST_CUDA = Path(__file__).parent / "host_cuda"
OPTIONS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile kernels for the CPU")


# fp16 partial results with a power of two for each part of a row's columns; with one for all, which is in the row's
# lse; and with one for each half, which has an lse of its own (kernels_cu/core/partial_format.h).
SCALED, MARKED, HALVES = "Scaled", "Marked", "Halves"
SCALE_COLUMNS, SCALE_PARTS = 16, 3
HALF_COLUMNS = 256
_SCALES = {
    SCALED: ColumnParts(SCALE_COLUMNS, SCALE_PARTS),
    MARKED: ALL_COLUMNS,
    HALVES: ColumnParts(HALF_COLUMNS, 2, in_lse=True),
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="host_kernels_")  # removed at exit


@functools.cache
def library(tag: str = "Bf16", copy: int = 0) -> ctypes.CDLL:
    """The kernels; mla_merge_states is for the type of this tag, mla_combine for bf16, or for `SCALED`,
    `MARKED` or `HALVES`.

    Threads that run kernels at the same time each need a copy of their own.
    """
    if copy:
        return ctypes.CDLL(shutil.copy(library(tag)._name, Path(_folder().name) / f"kernels_{tag}_{copy}.so"))
    path = Path(_folder().name) / f"kernels_{tag}.so"
    includes = ("-I", str(HOST_CUDA), "-I", str(kernels_root()), "-include", str(HOST_CUDA / "cuda_on_host.h"))
    defines = [f"-DMERGE_STATES_DTYPE={tag}"]
    if tag in _SCALES:
        defines = ["-DMERGE_STATES_DTYPE=Fp16", *(f"-D{name}={value}" for name, value in scale_defines(_SCALES[tag]))]
    command = ["g++", *OPTIONS, *defines, *includes, str(HOST_CUDA / "kernels.cpp"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


def struct_layout(name: str, fields: int) -> tuple[int, ...]:
    """sizeof a struct and the offsets of its fields, as the C++ compiler sees them."""
    get = library().struct_layout
    return tuple(get(name.encode(), index) for index in range(fields + 1))


def kernel_constant(name: str) -> int:
    """A constant of the kernels, by its name in Python."""
    return int(library().kernel_constant(name.encode()))


def claimed_part(second: bool, half: int, other: int, spare: int, half_before: int, other_before: int) -> int:
    """What a CTA takes: kernels_cu/core/claimed_part.h."""
    return int(library().host_claimed_part(ctypes.c_bool(second), half, other, spare, half_before, other_before))


def _address(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


GUARD_INTS = 64
GUARD = 0x5A5A5A5A


def mark_for(exponent: int, tag: str = MARKED) -> tuple[int, float]:
    """The mark of a row's lse for partial results of which, stored as they usually are, no thread's sum
    reaches 2^(exponent - 126), and what they are multiplied by then.
    """
    kernels = library(tag)
    kernels.host_factor_of.restype = ctypes.c_float
    mark = int(kernels.host_mark_for(exponent))
    return mark, float(kernels.host_factor_of(mark))


def power_in_lse(lse: float) -> float:
    """What the merge multiplies partial results by."""
    function = library(MARKED).host_power_in_lse
    function.restype = ctypes.c_float
    return float(function(ctypes.c_float(lse)))


def run_plan(
    shape: ScheduleShape,
    cache_seqlens: np.ndarray | None,
    cu_seqlens_q: np.ndarray | None = None,
    reverse: bool = False,
    into: np.ndarray | None = None,
    extra_lengths: np.ndarray | None = None,
) -> Schedule:
    """mla_plan; fails when it writes past the plan. The whole buffer is copied to ``into`` if given."""
    total = plan_sections(shape).total_ints
    plan = np.full(total + GUARD_INTS, GUARD, np.int32)
    lengths = None if cache_seqlens is None else np.asarray(cache_seqlens, np.int32)
    offsets = None if cu_seqlens_q is None else np.asarray(cu_seqlens_q, np.int32)
    extra = None if extra_lengths is None else np.asarray(extra_lengths, np.int32)
    params = plan_params(shape)
    arrays = (lengths, offsets, extra, plan, params)
    library().host_plan(*map(_address, arrays), ctypes.c_bool(reverse))
    assert (plan[total:] == GUARD).all(), "written past the plan"
    if into is not None:
        into[:] = plan[:total]
    return read_plan(plan[:total], shape)


def run_combine(tag: str, params: np.ndarray, grid: int, block: int) -> None:
    """mla_combine for bf16, with partial results of a type."""
    library(tag).host_combine(_address(params), grid, block)


def run_combine_gathered(tag: str, params: np.ndarray, grid: int, block: int) -> None:
    """mla_combine_gathered for bf16, with partial results of a type."""
    library(tag).host_combine_gathered(_address(params), grid, block)


def run_merge_states(tag: str, params: np.ndarray, grid: int, block: int = MERGE_STATES_THREADS) -> None:
    """mla_merge_states for a type."""
    library(tag).host_merge_states(_address(params), grid, block)


def run_local_slots(params: np.ndarray, grid: int, block: int, reverse: bool = False) -> None:
    """mla_local_slots, its threads in either order."""
    library().host_local_slots(_address(params), grid, block, ctypes.c_bool(reverse))


def run_push(params: np.ndarray, grid: int, block: int, rank: int) -> None:
    """mla_push of a rank, among threads that run those of the others; odd ones go through their threads in reverse."""
    library("Bf16", rank).host_push(_address(params), grid, block, ctypes.c_bool(rank % 2))


def run_push_merge(tag: str, params: np.ndarray, grid: int, block: int, rank: int) -> None:
    """mla_push_merge for a type, likewise."""
    library(tag, rank).host_push_merge(_address(params), grid, block, ctypes.c_bool(rank % 2))


def run_combine_push(tag: str, pieces: np.ndarray, params: np.ndarray, grid: int, block: int, rank: int) -> None:
    """mla_combine_push for bf16, with partial results of a type, likewise."""
    arrays = _address(pieces), _address(params)
    library(tag, rank).host_combine_push(*arrays, grid, block, ctypes.c_bool(rank % 2))


def run_slots(params: np.ndarray, grid: int, block: int) -> None:
    """mla_slots."""
    library().host_slots(_address(params), grid, block)
