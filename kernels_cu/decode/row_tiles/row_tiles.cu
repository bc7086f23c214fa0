// Dense MLA decode over pages of FP8 rows that hold their scales, for 16 or 32 query rows a CTA, operands swapped;
// kernels_cu/DESIGN.md tells the schedule. Warpgroups:
//   0 (and 1)  scores: S^T = K Q^T, softmax, P; two of them in turn
//   next two   values: O^T += V^T P^T, half of the columns each; output
//   last       its first warp brings the rows of each tile as they are stored
#include "decode/row_tiles/load.h"
#include "decode/row_tiles/scores.h"
#include "decode/row_tiles/values.h"
#include "decode/gathered/narrow_roles.h"

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_gathered_row_tiles(const __grid_constant__ mla::GatherParams params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const Items items(params, shared + Smem::claim, [&] { initialise_barriers(smem); });
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup < kScoresWarpgroups) {
        take_registers<kScoresRegisters>();
        ScoresRole(params, smem, threadIdx.x % kWarpgroupThreads, warpgroup).run(items);
    } else if (warpgroup < kScoresWarpgroups + kValueWarpgroups) {
        take_registers<kValuesRegisters>();
        ValuesRole(params, smem, threadIdx.x - (kScoresWarpgroups - 1) * kWarpgroupThreads).run(items);
    } else {
        take_registers<kLoadersRegisters>();
        if (threadIdx.x % kWarpgroupThreads / kWarpThreads == 0) RowTileLoader(params, smem).run(items);
    }
}
