"""Checks of values that lie on the device: lengths, and the pages that they use."""

from __future__ import annotations

import numpy as np

from ..arrays.exchange import as_numpy
from ..errors import InvalidArgumentError
from .problem import DecodeInputs, DecodeProblem, PagedKeys, Queries


def validate_values(
    problem: DecodeProblem, inputs: DecodeInputs, stream: int | None = None, max_seqlen_k: int | None = None
) -> None:
    """Read lengths and page numbers back to the host and check them. Waits for the device.

    Parameters
    ----------
    problem, inputs
        What `describe_decode` returned.
    stream
        Stream that produces the values. None: the current stream of the arrays' framework.
    max_seqlen_k
        Largest length of the plan, in tokens. None: what the block table can hold.

    Raises
    ------
    InvalidArgumentError
        ``cache_seqlens[i]`` is negative or longer than the block table or the plan allows, or not what the rank has of
        ``total_seqlens[i]`` tokens, ``block_table[i, j]`` is used by request i and is no page of the cache, or
        ``cu_seqlens_q[i]`` does not start at 0, falls, or passes ``total_q``.
    """
    keys = problem.keys
    lengths = as_numpy(inputs.cache_seqlens, stream).astype(np.int64)
    most = keys.max_seqlen_k
    reason = f"{keys.max_pages_per_seq} pages of {keys.page_size} tokens"
    if max_seqlen_k is not None and max_seqlen_k < most:
        most, reason = max_seqlen_k, "max_seqlen_k of the plan"
    wrong = np.flatnonzero((lengths < 0) | (lengths > most))
    if wrong.size:
        request = int(wrong[0])
        raise InvalidArgumentError(f"cache_seqlens[{request}]", f"0 to {most} ({reason})", str(lengths[request]))
    if inputs.total_seqlens is not None:
        _validate_shares(keys, lengths, as_numpy(inputs.total_seqlens, stream))
    pages = as_numpy(inputs.block_table, stream)
    used = -(-lengths // keys.page_size)
    in_use = np.arange(keys.max_pages_per_seq) < used[:, None]
    wrong_pages = np.argwhere(in_use & ((pages < 0) | (pages >= inputs.num_pages)))
    if wrong_pages.size:
        request, column = (int(index) for index in wrong_pages[0])
        raise InvalidArgumentError(
            f"block_table[{request}, {column}]",
            f"a page of the cache, 0 to {inputs.num_pages - 1} (request {request} has {lengths[request]} tokens)",
            str(pages[request, column]),
        )
    if inputs.cu_seqlens_q is not None:
        _validate_starts(problem.queries, as_numpy(inputs.cu_seqlens_q, stream).astype(np.int64))


def _validate_shares(keys: PagedKeys, lengths: np.ndarray, totals: np.ndarray) -> None:
    shard = keys.shard
    assert shard is not None  # else there are no totals
    shares = shard.count(np.maximum(totals.astype(np.int64), 0))
    for request in np.flatnonzero((lengths != shares) | (totals < 0))[:1]:
        total = f"total_seqlens[{request}]"
        if totals[request] < 0:
            raise InvalidArgumentError(total, "0 or more", str(totals[request]))
        share = f"{shares[request]}, the tokens of rank {shard.rank} of {shard.world} of {total} = {totals[request]}"
        raise InvalidArgumentError(f"cache_seqlens[{request}]", share, str(lengths[request]))


def _validate_starts(queries: Queries, starts: np.ndarray) -> None:
    if starts[0] != 0:
        raise InvalidArgumentError("cu_seqlens_q[0]", "0", str(starts[0]))
    counts = np.diff(starts)
    wrong = np.flatnonzero((counts < 0) | (counts > queries.seqlen_q))
    if wrong.size:
        request = int(wrong[0])
        raise InvalidArgumentError(
            f"cu_seqlens_q[{request + 1}]",
            f"{starts[request]} to {starts[request] + queries.seqlen_q} "
            f"(request {request} may have 0 to {queries.seqlen_q} queries)",
            str(starts[request + 1]),
        )
    if starts[-1] > queries.total_q:
        raise InvalidArgumentError(
            f"cu_seqlens_q[{queries.batch}]", f"at most {queries.total_q}, the rows of q", str(starts[-1])
        )
