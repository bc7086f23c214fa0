// MLA over gathered tokens of FP8 caches, for 16 or 32 query rows a CTA, operands swapped; kernels_cu/DESIGN.md tells the
// schedule. Three warpgroups:
//   0  scores: stored rows to K and V, S^T = K Q^T, softmax, P
//   1  values: O^T += V^T P^T, output
//   2  loaders: bring the rows of each tile's tokens as they are stored, as far ahead as the ring reaches
#include "decode/gathered_fp8/narrow_load.h"
#include "decode/gathered_fp8/narrow_scores.h"
#include "decode/gathered_fp8/narrow_values.h"
#include "decode/gathered/narrow_roles.h"

extern "C" __global__ void __maxnreg__(mla::kEntryRegisters)
mla_gathered_fp8_narrow(const __grid_constant__ mla::GatherParams params) {
    extern __shared__ __align__(1024) mla::u8 shared[];
    mla::run_narrow_roles<mla::RowLoader>(params, shared);
}
