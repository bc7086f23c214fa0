// MLA over gathered tokens of FP8 caches, for 16 or 32 query rows a CTA, operands swapped; kernels_cu/DESIGN.md tells the
// schedule. Three warpgroups:
//   0  scores: stored rows to K and V, S^T = K Q^T, softmax, P
//   1  values: O^T += V^T P^T, output
//   2  loaders: bring the rows of each tile's tokens as they are stored, as far ahead as the ring reaches
#include "decode/gathered_fp8/narrow_load.h"
#include "decode/gathered_fp8/narrow_scores.h"
#include "decode/gathered_fp8/narrow_values.h"

namespace mla {

template <int Registers>
MLA_DEVICE void take_registers() {
    if constexpr (Registers > kEntryRegisters)
        registers_increase<Registers>();
    else
        registers_decrease<Registers>();
}

}  // namespace mla

extern "C" __global__ void __maxnreg__(mla::kEntryRegisters)
mla_gathered_fp8_narrow(const __grid_constant__ mla::GatherParams params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const Items items(params, shared + Smem::claim, [&] { initialise_barriers(smem); });
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);
    const u32 thread = threadIdx.x % kWarpgroupThreads;

    if (warpgroup == kScoresWarpgroup) {
        take_registers<kScoresRegisters>();
        ScoresRole(params, smem, thread).run(items);
    } else if (warpgroup == kValuesWarpgroup) {
        take_registers<kValuesRegisters>();
        ValuesRole(params, smem, thread).run(items);
    } else {
        take_registers<kLoadersRegisters>();
        RowLoader(params, items, smem, thread).run();
    }
}
