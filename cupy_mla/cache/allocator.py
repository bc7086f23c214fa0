"""Which page of a cache belongs to which request: the bookkeeping, in NumPy on the host.

A forked request shares its parent's pages, counted per page; whoever writes to a shared page first takes a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..call.arguments import as_integer
from ..call.shard import Shard
from ..errors import InvalidArgumentError, MlaError
from ..schedule.pieces import ceil_div

_UNUSED_PAGE = 0  # past the end of a request; a page that exists, for kernels that look ahead
_NO_SLOT = -1  # of a token that lies on another rank


class OutOfPagesError(MlaError, RuntimeError):
    """Not enough free pages. Nothing was changed: free or truncate a request and try again.

    Attributes
    ----------
    needed, free, total
        Pages that the call needs, pages that are free, pages of the cache.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"the call needs {needed} more pages, {free} of the cache's {total} are free: "
            "free or truncate requests, or make a cache with a larger num_pages"
        )
        self.needed = needed
        self.free = free
        self.total = total

    def __reduce__(self) -> tuple[type[OutOfPagesError], tuple[int, int, int]]:
        return type(self), (self.needed, self.free, self.total)


class OutOfRequestsError(MlaError, RuntimeError):
    """All ``max_requests`` places are taken. Nothing was changed."""

    def __init__(self, max_requests: int) -> None:
        super().__init__(
            f"all {max_requests} requests are in use: free one, or make a cache with a larger max_requests"
        )
        self.max_requests = max_requests

    def __reduce__(self) -> tuple[type[OutOfRequestsError], tuple[int]]:
        return type(self), (self.max_requests,)


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy-on-write of a request's last, partly filled page."""

    row: int
    page_index: int
    old: int
    new: int


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """What an append does, worked out before anything is changed.

    Attributes
    ----------
    rows, new_lengths, new_seqlens
        Of the requests: where each is kept here, its length afterwards, and how much of that lies in this cache.
    fresh_pages, copies
        Pages that are taken.
    slots, positions
        Of the new tokens: page * page_size + offset (-1: another rank's), and the place in the request.
    """

    rows: npt.NDArray[np.int64]
    new_lengths: npt.NDArray[np.int64]
    new_seqlens: npt.NDArray[np.int64]
    fresh_pages: list[int]
    copies: list[PageCopy]
    slots: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]

    @property
    def is_sharded(self) -> bool:
        """Whether requests are longer than what lies in this cache."""
        return self.new_seqlens is not self.new_lengths


class PageAllocator:
    """Requests, their lengths and their pages: all of a `PagedKVCache` but the tokens.

    Parameters
    ----------
    num_pages
        Pages to share out.
    page_size
        Tokens per page.
    max_requests
        Requests that may exist at once.
    max_pages_per_seq
        Most pages of a request.
    shard
        Which tokens of each request lie in this cache; None: all.

    Attributes
    ----------
    free_pages
        Pages that nobody holds; the last is the next to be taken.
    references
        Holders of each page.
    tables_changed
        How often an append has changed the pages of a request.
    """

    def __init__(
        self, num_pages: int, page_size: int, max_requests: int, max_pages_per_seq: int, shard: Shard | None = None
    ) -> None:
        self.shard = shard
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_requests = max_requests
        self.max_pages_per_seq = max_pages_per_seq
        # Reversed, because pages are taken from the end: page 0 is used first.
        self.free_pages = list(range(num_pages - 1, -1, -1))
        self._free_rows = list(range(max_requests - 1, -1, -1))
        self.references = np.zeros(num_pages, np.int32)
        self.tables_changed = 0
        self._table = np.full((max_requests, max_pages_per_seq), _UNUSED_PAGE, np.int32)
        self._lengths = np.zeros(max_requests, np.int64)
        self._rows: dict[int, int] = {}
        self._next_request = 0

    @property
    def requests(self) -> tuple[int, ...]:
        """The requests that exist, oldest first."""
        return tuple(self._rows)

    def length(self, request: int) -> int:
        """As `PagedKVCache.length`."""
        return int(self._lengths[self._row(request, "request")])

    def allocate(self) -> int:
        """As `PagedKVCache.allocate`.

        Raises
        ------
        OutOfRequestsError
            There are ``max_requests`` already.
        """
        if not self._free_rows:
            raise OutOfRequestsError(self.max_requests)
        request = self._next_request
        self._next_request += 1
        self._rows[request] = self._free_rows.pop()
        return request

    def fork(self, request: int, num_tokens: int | None = None) -> int:
        """As `PagedKVCache.fork`."""
        row = self._row(request, "request")
        length = self._shorter_length(row, request, num_tokens)
        child = self.allocate()
        child_row = self._rows[child]
        pages = self._table[row, : self._pages_for(length)]
        self._table[child_row, : pages.size] = pages
        self.references[pages] += 1
        self._lengths[child_row] = length
        return child

    def truncate(self, request: int, num_tokens: int) -> None:
        """As `PagedKVCache.truncate`."""
        row = self._row(request, "request")
        length = self._shorter_length(row, request, num_tokens)
        first, last = self._pages_for(length), self._pages_for(int(self._lengths[row]))
        self._release(self._table[row, first:last])
        self._table[row, first:last] = _UNUSED_PAGE
        self._lengths[row] = length

    def free(self, request: int) -> None:
        """As `PagedKVCache.free`."""
        self.truncate(request, 0)
        self._free_rows.append(self._rows.pop(request))

    def block_table(self, requests: Sequence[int] | None) -> npt.NDArray[np.int32]:
        """Pages of a batch of requests, in this order (None: of all), [batch, max_pages_per_seq].

        Raises
        ------
        InvalidArgumentError
            There is no such request.
        """
        return self._table[self._batch_rows(requests)]

    def cache_seqlens(self, requests: Sequence[int] | None) -> npt.NDArray[np.int32]:
        """What this cache has of a batch of requests, as `total_seqlens`."""
        held: npt.NDArray[np.int64] = self._held(self._lengths[self._batch_rows(requests)])
        return held.astype(np.int32)

    def total_seqlens(self, requests: Sequence[int] | None) -> npt.NDArray[np.int32]:
        """Lengths of a batch of requests, in this order (None: of all), [batch].

        Raises
        ------
        InvalidArgumentError
            There is no such request.
        """
        return self._lengths[self._batch_rows(requests)].astype(np.int32)

    def plan_append(self, requests: Sequence[int], token_counts: Sequence[int] | None, num_tokens: int) -> AppendPlan:
        """What an append of ``num_tokens`` tokens will do. Only `commit` makes it so.

        Parameters
        ----------
        requests
            The requests, each at most once.
        token_counts
            New tokens of each; None: the same number for each.
        num_tokens
            All new tokens.

        Raises
        ------
        InvalidArgumentError
            An unknown or repeated request, counts that do not add up, or a request that would get longer than
            ``max_pages_per_seq`` pages.
        OutOfPagesError
            Too few free pages.
        """
        requests = as_list(requests, "requests", "requests, e.g. [request]")
        rows = self._distinct_rows(requests)
        counts = _settled_counts(token_counts, len(requests), num_tokens)
        positions = self._lengths[rows]
        new_lengths = positions + counts
        lengths, new_seqlens = self._held(positions), self._held(new_lengths)
        capacity = self.max_pages_per_seq * self.page_size
        for index in np.flatnonzero(new_seqlens > capacity)[:1]:
            raise InvalidArgumentError(
                "kv_new",
                f"at most {capacity} tokens in a request (max_pages_per_seq * page_size)",
                f"{new_seqlens[index]} in request {requests[index]}",
            )
        pages_before, pages_after = ceil_div(lengths, self.page_size), ceil_div(new_seqlens, self.page_size)
        shared = self._shared_last_pages(rows, lengths, new_seqlens - lengths)
        num_fresh = int((pages_after - pages_before).sum())
        needed = num_fresh + len(shared)
        if needed > len(self.free_pages):
            raise OutOfPagesError(needed, len(self.free_pages), self.num_pages)
        taken = self.free_pages[len(self.free_pages) - needed :][::-1]
        fresh_pages, copy_pages = taken[:num_fresh], taken[num_fresh:]

        # Entries past a request's end may hold anything: writing them before the append is certain harms nobody.
        begin = 0
        for index in np.flatnonzero(pages_after > pages_before):
            first, last = int(pages_before[index]), int(pages_after[index])
            self._table[rows[index], first:last] = fresh_pages[begin : begin + last - first]
            begin += last - first
        last_index = np.minimum(lengths // self.page_size, self.max_pages_per_seq - 1)
        last_page = self._table[rows, last_index].astype(np.int64)
        copies = []
        for index, new in zip(shared, copy_pages, strict=True):
            copies.append(PageCopy(int(rows[index]), int(last_index[index]), int(last_page[index]), new))
            last_page[index] = new
        slots, places = self._places(rows, positions, counts, last_index, last_page)
        return AppendPlan(rows, new_lengths, new_seqlens, fresh_pages, copies, slots, places)

    def commit(self, plan: AppendPlan) -> None:
        """Do what a plan says; nothing may have changed since it was made."""
        needed = len(plan.fresh_pages) + len(plan.copies)
        self.tables_changed += needed > 0
        del self.free_pages[len(self.free_pages) - needed :]
        self.references[plan.fresh_pages] = 1
        for copy in plan.copies:
            self._table[copy.row, copy.page_index] = copy.new
            self.references[copy.old] -= 1
            self.references[copy.new] = 1
        self._lengths[plan.rows] = plan.new_lengths

    def _held(self, lengths: Any) -> Any:
        """What of requests of these lengths lies in this cache."""
        return lengths if self.shard is None else self.shard.count(lengths)

    def _pages_for(self, num_tokens: int) -> int:
        return ceil_div(int(self._held(num_tokens)), self.page_size)

    def _row(self, request: int, argument: str) -> int:
        try:
            return self._rows[request]
        except (KeyError, TypeError):  # also of what cannot be a key
            raise InvalidArgumentError(argument, "a request that exists", repr(request)) from None

    def _batch_rows(self, requests: Sequence[int] | None) -> npt.NDArray[np.int64]:
        chosen = self._rows if requests is None else as_list(requests, "requests", "requests, e.g. [request]")
        return np.array([self._row(request, "requests") for request in chosen], np.int64)

    def _distinct_rows(self, requests: Sequence[int]) -> npt.NDArray[np.int64]:
        rows = self._batch_rows(requests)
        if len(set(requests)) != len(requests):
            raise InvalidArgumentError("requests", "each request at most once", str(list(requests)))
        return rows

    def _shorter_length(self, row: int, request: int, num_tokens: int | None) -> int:
        length = int(self._lengths[row])
        if num_tokens is None:
            return length
        num_tokens = as_integer(num_tokens, "num_tokens")
        if not 0 <= num_tokens <= length:
            raise InvalidArgumentError("num_tokens", f"0 to {length}, the length of request {request}", str(num_tokens))
        return num_tokens

    def _release(self, pages: npt.NDArray[np.int32]) -> None:
        """One holder fewer for each page (a request holds a page at most once)."""
        self.references[pages] -= 1
        self.free_pages.extend(pages[self.references[pages] == 0].tolist())

    def _shared_last_pages(
        self, rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> list[int]:
        """Which requests (as indices into ``rows``) need a copy of their partly filled last page.

        Of several holders of one page that are appended to together, the last that is left writes in place.
        """
        partial = np.flatnonzero((lengths % self.page_size != 0) & (counts > 0))
        pages = self._table[rows[partial], lengths[partial] // self.page_size]
        copied: list[int] = []
        holders: dict[int, int] = {}
        several = self.references[pages] > 1
        for index, page in zip(partial[several].tolist(), pages[several].tolist(), strict=True):
            left = holders.get(page, int(self.references[page]))
            if left > 1:
                copied.append(index)
                holders[page] = left - 1
        return copied

    def _places(
        self,
        rows: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        last_index: npt.NDArray[np.int64],
        last_page: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Slot (page * page_size + offset, or -1) and place in its request of every new token, int64 [num_tokens]."""
        request = np.repeat(np.arange(rows.size), counts)
        first_token = np.cumsum(counts) - counts
        position = np.arange(request.size) - first_token[request] + lengths[request]
        held = self._held(position)
        # A token of another rank may come where no page is left for one of this rank.
        page_index = np.minimum(held // self.page_size, self.max_pages_per_seq - 1)
        page = np.where(page_index == last_index[request], last_page[request], self._table[rows[request], page_index])
        slots = page * self.page_size + held % self.page_size
        return slots if self.shard is None else np.where(self.shard.has(position), slots, _NO_SLOT), position


def as_list(values: Any, name: str, what: str) -> list[Any]:
    """A list of any sequence.

    Raises
    ------
    InvalidArgumentError
        It is none: a number, text, or None.
    """
    if not isinstance(values, str):
        try:
            return list(values)
        except TypeError:
            pass
    raise InvalidArgumentError(name, f"a list of {what}", f"{type(values).__name__} {values!r}")


def as_counts(counts: Any) -> list[int]:
    """Numbers of tokens, one for each request.

    Raises
    ------
    InvalidArgumentError
        They are no list of integers.
    """
    return [as_integer(count, "counts") for count in as_list(counts, "counts", "numbers of tokens")]


def _settled_counts(counts: Sequence[int] | None, batch: int, num_tokens: int) -> npt.NDArray[np.int64]:
    if counts is None:
        if num_tokens % max(1, batch) != 0 or (batch == 0 and num_tokens > 0):
            raise InvalidArgumentError(
                "kv_new", f"a multiple of {batch} tokens, one per request (or counts given)", str(num_tokens)
            )
        return np.full(batch, num_tokens // max(1, batch), np.int64)
    numbers = as_counts(counts)
    if len(numbers) != batch or any(count < 0 for count in numbers) or sum(numbers) != num_tokens:
        raise InvalidArgumentError(
            "counts", f"{batch} non-negative numbers that add up to {num_tokens} tokens", str(numbers)
        )
    return np.array(numbers, np.int64)
