"""Context-parallel decode: a cache that is sharded along the sequence over several GPUs.

Token t of a request lies on rank ``t // interleave % world``. Each rank attends with all heads to its own tokens;
results are merged by their lse.
"""

from ..cache.local_slots import local_slots as local_slots
from ..torch_compile import teach
from .decode import ContextParallelPlan as ContextParallelPlan
from .decode import cp_decode as cp_decode
from .decode import plan_cp_decode as plan_cp_decode
from .lengths import local_lengths as local_lengths
from .sparse import ContextParallelSparsePlan as ContextParallelSparsePlan
from .sparse import cp_sparse_decode as cp_sparse_decode
from .sparse import plan_cp_sparse_decode as plan_cp_sparse_decode

teach(local_slots)
