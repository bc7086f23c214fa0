"""Which kernel serves a problem: of those that can, the one that should take the least time, or the one asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..call.options import AUTO
from ..errors import InvalidArgumentError
from ..schedule.pieces import ceil_div
from .cost import Load
from .family import DecodeFamily, KernelConfig
from .fp8 import (
    FP8_EXACT16,
    FP8_EXACT32,
    FP8_EXACT64,
    FP8_QUERY16,
    FP8_QUERY32,
    FP8_QUERY64,
    FP8_SPLIT16,
    FP8_SPLIT32,
    FP8_SPLIT64,
    FP8_TURNS16,
)
from .gathered import GATHERED_WIDE64, gathered_config
from .gathered_fp8 import GATHERED_FP8_NARROW16, GATHERED_FP8_NARROW32
from .gathered_fp8_wide import GATHERED_FP8_WIDE64
from .gathered_narrow import GATHERED_NARROW16, GATHERED_NARROW32
from .narrow import NARROW16, NARROW32
from .row_tiles import ROW_TILES16, ROW_TILES32
from .token_pages import (
    ROW_PAGES16,
    ROW_PAGES32,
    ROW_PAGES64,
    TOKEN_PAGES_NARROW16,
    TOKEN_PAGES_NARROW32,
    TOKEN_PAGES_WIDE64,
)
from .wide import WIDE64

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

# Of dense decoding: over 16-bit caches, and over FP8 ones.
DENSE_FAMILIES: tuple[DecodeFamily, ...] = (
    *(NARROW16, NARROW32, WIDE64),
    *(TOKEN_PAGES_NARROW16, TOKEN_PAGES_NARROW32, TOKEN_PAGES_WIDE64),
)
FP8_FAMILIES: tuple[DecodeFamily, ...] = (
    *(FP8_SPLIT16, FP8_SPLIT32, FP8_SPLIT64, FP8_EXACT16, FP8_EXACT32, FP8_EXACT64, FP8_TURNS16),
    *(FP8_QUERY16, FP8_QUERY32, FP8_QUERY64),
    *(ROW_PAGES16, ROW_PAGES32, ROW_PAGES64),
    *(ROW_TILES16, ROW_TILES32),
)
FAMILIES = (*DENSE_FAMILIES, *FP8_FAMILIES)
# Of gathered tokens, by rows.
GATHERED_DENSE_FAMILIES: tuple[DecodeFamily, ...] = (GATHERED_NARROW16, GATHERED_NARROW32, GATHERED_WIDE64)
GATHERED_FP8_FAMILIES: tuple[DecodeFamily, ...] = (GATHERED_FP8_NARROW16, GATHERED_FP8_NARROW32, GATHERED_FP8_WIDE64)
GATHERED_FAMILIES = (*GATHERED_DENSE_FAMILIES, *GATHERED_FP8_FAMILIES)
KERNELS = (AUTO, *(family.name for family in FAMILIES))


def check_named(
    kernel: str, problem: DecodeProblem | SparseProblem, families: tuple[DecodeFamily, ...] = FAMILIES
) -> None:
    """That a kernel that is asked for by its name serves a problem, as it is asked where nothing runs on a GPU.

    Raises
    ------
    InvalidArgumentError
        It does not, or there is none of this name.
    """
    if check_kernel(kernel, families) != AUTO:
        serving(families, problem, kernel)


def check_kernel(kernel: str, families: tuple[DecodeFamily, ...] = FAMILIES) -> str:
    """A kernel's name, if there is one of that name; the same are refused on every backend.

    Raises
    ------
    InvalidArgumentError
        No kernel has this name.
    """
    names = AUTO, *(family.name for family in families)
    if kernel not in names:
        raise InvalidArgumentError("kernel", f"one of {', '.join(names)}", repr(kernel))
    return kernel


def choose_config(
    problem: DecodeProblem,
    num_sms: int,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
    kernel: str = AUTO,
) -> KernelConfig:
    """The configuration that serves a problem.

    Rows are the query heads and tokens that share a kv head. With a fixed split, which promises the same bits in any
    batch, they alone decide; of ragged queries those of one token, as how many tokens a request has, on average or at
    most, depends on the batch.

    Parameters
    ----------
    problem
        Shapes and settings.
    num_sms
        Multiprocessors of the GPU.
    max_seqlen_k
        Largest length there will be, in tokens; None: what the block table can hold.
    fixed_split_tokens
        The fixed split, if there is one.
    kernel
        One of ``KERNELS``.

    Raises
    ------
    InvalidArgumentError
        ``kernel`` is none of them or cannot serve the problem, or none of them can.
    """
    able = serving(FAMILIES, problem, check_kernel(kernel))
    # Pages of one token: gathered if they can be, which takes a fifth of the time
    # (kernels_cu/TRIED_GATHERED.md).
    families = [family for family in able if family.gathers] or able
    if fixed_split_tokens is not None:
        rows = problem.queries.group_heads * (1 if problem.queries.ragged else problem.queries.seqlen_q)
        block_rows = min(
            (family.rows for family in families if rows <= family.rows), default=max(family.rows for family in families)
        )
        same = [family for family in families if family.rows == block_rows]
        family = min(same, key=lambda family: family.cost.piece_time(fixed_split_tokens))
        return family.configure(problem, rows)
    load = load_of(problem, max_seqlen_k)
    family = min(families, key=lambda family: family.cost.call_time(load, family.rows, num_sms))
    return family.configure(problem, load.rows)


def choose_gathered_config(
    problem: SparseProblem,
    num_sms: int,
    *,
    planned: bool,
    fixed_split_tokens: int | None = None,
    kernel: str = AUTO,
) -> KernelConfig:
    """The configuration that serves a sparse problem. Rows are the query heads that share a kv head.

    Parameters
    ----------
    problem
        Shapes and settings.
    num_sms
        Multiprocessors of the GPU.
    planned
        Whether a plan cuts the work; else query tokens are dealt out to the CTAs.
    fixed_split_tokens
        The fixed split, if there is one: rows alone decide then.
    kernel
        ``AUTO``, or the name of a family of ``GATHERED_FAMILIES``.

    Raises
    ------
    InvalidArgumentError
        ``kernel`` is none of them or cannot serve the problem, or none of them can.
    """
    families = serving(GATHERED_FAMILIES, problem, check_kernel(kernel, GATHERED_FAMILIES))
    queries = problem.queries
    load = Load(queries.group_heads, queries.total_q * queries.num_heads_kv, problem.keys.most_tokens)
    if fixed_split_tokens is not None:
        family = next((family for family in families if load.rows <= family.rows), families[-1])
    else:
        family = min(families, key=lambda family: family.cost.call_time(load, family.rows, num_sms))
    return gathered_config(family, problem, planned)


def serving(
    families: tuple[DecodeFamily, ...], problem: DecodeProblem | SparseProblem, kernel: str
) -> list[DecodeFamily]:
    """The families that can serve a problem, all or the one of this name; at least one.

    Raises
    ------
    InvalidArgumentError
        No family serves the problem, or the one of this name does not.
    """
    reasons = {family.name: family.why_unsupported(problem) for family in families}
    chosen = [family for family in families if reasons[family.name] is None and kernel in (AUTO, family.name)]
    if chosen:
        return chosen
    able = [name for name, reason in reasons.items() if reason is None]
    expected = f"one that serves this call ({', '.join((AUTO, *able))})" if able else "a call that a kernel serves"
    why = "; ".join(f"{name} {reason}" for name, reason in reasons.items() if kernel in (AUTO, name))
    raise InvalidArgumentError("kernel", expected, why)


def load_of(problem: DecodeProblem, max_seqlen_k: int | None) -> Load:
    """What `CostModel.call_time` takes for a problem; ``max_seqlen_k`` as in `choose_config`."""
    queries = problem.queries
    tokens = ceil_div(queries.total_q, max(queries.batch, 1))  # of a request, on average when ragged
    if queries.seqlen_q <= 2 * tokens:  # else the longest request is an exception, or its length is not known
        tokens = queries.seqlen_q
    return Load(
        rows=queries.group_heads * tokens,
        requests=queries.batch * queries.num_heads_kv,
        tokens_k=problem.keys.bound(max_seqlen_k),
        token_bytes=problem.layout.token_bytes(queries.latent_dim, queries.rope_dim),
    )
