"""Context-parallel decode: a cache that is sharded along the sequence over several GPUs.

Token t of a request lies on rank ``t // interleave % world``. Each rank attends with all heads to its own tokens;
results are merged by their lse.
"""

from .lengths import local_lengths as local_lengths
