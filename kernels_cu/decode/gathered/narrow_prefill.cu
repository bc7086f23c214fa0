// Sparse prefill for 16 query rows a CTA, operands swapped; kernels_cu/DESIGN_PREFILL.md tells the schedule. Four warpgroups:
//   0, 1  scores, a tile each in turn: S^T = K Q^T, softmax, P
//   2     values: O^T += V^T P^T, output
//   3     loaders: gather the rows of each tile's tokens, as far ahead as the ring reaches, and queries
#include "decode/gathered/narrow_load.h"
#include "decode/gathered/narrow_values.h"
#include "decode/gathered/turn_scores.h"
#include "decode/gathered/narrow_roles.h"

extern "C" __global__ void __maxnreg__(mla::kEntryRegisters)
mla_gathered_narrow_prefill(const __grid_constant__ mla::GatherParams params) {
    extern __shared__ __align__(1024) mla::u8 shared[];
    mla::run_narrow_roles<mla::TokenLoader>(params, shared);
}
