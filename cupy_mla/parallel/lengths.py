"""What each rank has of requests whose tokens are shared out along the sequence."""

from __future__ import annotations

from typing import Any

from ..call.arguments import shard_of


def local_lengths(lengths: Any, world: int, rank: int, interleave: int = 1) -> Any:
    """Tokens that one rank has of each request: ``cache_seqlens`` of its shard.

    Only arithmetic of the array's own framework, on its device: it may be captured in a CUDA graph, and traced by
    ``torch.compile`` and ``jax.jit``.

    Parameters
    ----------
    lengths
        Tokens of each request on all ranks: an integer array of torch, JAX, CuPy or NumPy; or one number.
    world, rank, interleave
        Ranks that share the cache, which of them, and tokens in a row that lie on the same rank.

    Returns
    -------
    Of the type and shape of ``lengths``.

    Raises
    ------
    InvalidArgumentError
        ``world``, ``rank`` or ``interleave`` is no integer or out of range; ``argument`` is ``cp_world``, ``cp_rank``
        or ``cp_interleave``.

    Examples
    --------
    >>> import numpy as np
    >>> local_lengths(np.array([0, 5, 64, 100], np.int32), world=2, rank=1, interleave=16)
    array([ 0,  0, 32, 48], dtype=int32)
    """
    return shard_of(world, rank, interleave).count(lengths)
