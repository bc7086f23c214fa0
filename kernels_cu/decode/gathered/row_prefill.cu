// Sparse prefill for 32 query rows a CTA; kernels_cu/DESIGN_PREFILL.md tells the schedule. Three warpgroups:
//   0  scores: S = Q K^T with Q in registers, softmax, P
//   1  values: O^T += V^T P^T, output
//   2  loaders: gather queries and the rows of each tile's tokens, as far ahead as the ring reaches
#include "decode/gathered/narrow_load.h"
#include "decode/gathered/narrow_values.h"
#include "decode/gathered/row_scores.h"
#include "decode/gathered/narrow_roles.h"

extern "C" __global__ void __maxnreg__(mla::kEntryRegisters)
mla_gathered_row_prefill(const __grid_constant__ mla::GatherParams params) {
    extern __shared__ __align__(1024) mla::u8 shared[];
    mla::run_narrow_roles<mla::TokenLoader>(params, shared);
}
