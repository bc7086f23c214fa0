"""Plans in ordinary arrays, for compilers of whole programs (torch.compile, jax.jit).

Such a compiler sees arrays, not objects; it may copy them, move them, and run later or in another process. A plan in an
array therefore holds nothing but what the planner wrote, and all else is worked out again from the arguments of each
call. (A decode may count its CTAs in it, kernels_cu/decode/claim.h; the count is back at 0 at its end.) Its size shows
what it was made for: to the bytes of the plan are added as many as a fingerprint of the problem says, so that a plan of
other shapes or settings is refused although nothing is read back from the GPU.
"""

from __future__ import annotations

import zlib

from ..call.options import DecodeOptions
from ..call.sparse_options import SparseOptions
from ..errors import PlanMismatchError
from .blueprint import Blueprint, P

_FINGERPRINTS = 1 << 15  # at most 32 KiB more; a wrong plan of the same size otherwise passes once in so many cases


def plan_array_bytes(problem: P, options: DecodeOptions | SparseOptions, kind: Blueprint[P] | None) -> int:
    """Size of the uint8 array that holds the plan of a call; the same in every process.

    Parameters
    ----------
    problem, options
        Of the call.
    kind
        What its plans are; None on the CPU.
    """
    settings = (problem.facts(), *options.of_plan_alone())
    fingerprint = zlib.crc32(repr(settings).encode()) % _FINGERPRINTS
    return (0 if kind is None else kind.plan_bytes) + fingerprint + 1


def check_plan_array(size: int, problem: P, options: DecodeOptions | SparseOptions, kind: Blueprint[P] | None) -> None:
    """Refuse a plan whose array has another size than one for this call has.

    Raises
    ------
    PlanMismatchError
        The sizes differ: the plan is for other shapes or options.
    """
    expected = plan_array_bytes(problem, options, kind)
    if size != expected:
        raise PlanMismatchError(
            "plan",
            f"a plan made with the shapes and options of this call ({expected} bytes)",
            f"one made with others ({size} bytes)",
        )
