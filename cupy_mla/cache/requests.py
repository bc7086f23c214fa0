"""The requests of a paged cache, without their tokens."""

from __future__ import annotations

from ..call.shard import Shard
from .allocator import PageAllocator


class Requests:
    """Requests, their lengths, and the pages that they hold or share.

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
    """

    def __init__(
        self, num_pages: int, page_size: int, max_requests: int, max_pages_per_seq: int, shard: Shard | None = None
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_requests = max_requests
        self.max_pages_per_seq = max_pages_per_seq
        self._allocator = PageAllocator(num_pages, page_size, max_requests, max_pages_per_seq, shard)

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds."""
        return len(self._allocator.free_pages)

    @property
    def requests(self) -> tuple[int, ...]:
        """The requests that exist, oldest first."""
        return self._allocator.requests

    def length(self, request: int) -> int:
        """Tokens of a request; on all ranks, of a cache that is sharded.

        Raises
        ------
        InvalidArgumentError
            There is no such request.
        """
        return self._allocator.length(request)

    def allocate(self) -> int:
        """A new, empty request. It takes no page until tokens are appended.

        Raises
        ------
        OutOfRequestsError
            There are ``max_requests`` already.
        """
        return self._allocator.allocate()

    def fork(self, request: int, num_tokens: int | None = None) -> int:
        """A new request that starts with the first ``num_tokens`` tokens of another (all of them if not given).

        The pages are shared, also a partly filled last one: nothing is copied until one of the two writes to it.

        Raises
        ------
        InvalidArgumentError
            There is no such request, or it has fewer tokens.
        OutOfRequestsError
            There are ``max_requests`` already.
        """
        return self._allocator.fork(request, num_tokens)

    def truncate(self, request: int, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of a request, e.g. after drafted tokens were rejected.

        Raises
        ------
        InvalidArgumentError
            There is no such request, or it has fewer tokens.
        """
        self._allocator.truncate(request, num_tokens)

    def free(self, request: int) -> None:
        """Give up a request; its pages become free when no fork holds them.

        Raises
        ------
        InvalidArgumentError
            There is no such request (any more).
        """
        self._allocator.free(request)
