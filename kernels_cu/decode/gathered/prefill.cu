// Sparse prefill for up to 64 query rows a CTA, where all columns are latent; kernels_cu/DESIGN.md tells the schedule. Four
// warpgroups:
//   0    scores: S = Q K^T, softmax, P
//   1, 2 values: O += P V, half of the columns each
//   3    loaders: gather queries and KV tiles
#include "decode/gathered/prefill_load.h"
#include "decode/gathered/prefill_scores.h"
#include "decode/gathered/prefill_values.h"

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_gathered_prefill(const __grid_constant__ mla::GatherParams params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const Items items(params, shared + WideSmem::claim, [&] { initialise_barriers(smem); });
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup == 0) {
        registers_increase<kScoresRegisters>();
        ScoresRole scores(params, smem);
        for (i32 item = items.first(); item < items.end(); item += items.step()) scores.run_item(item);
        if (kIsClustered) cluster_sync();
    } else if (warpgroup <= kValueWarpgroups) {
        registers_increase<kValuesRegisters>();
        ValuesRole values(params, smem);
        for (i32 item = items.first(); item < items.end(); item += items.step()) values.run_item(item);
        if constexpr (kIsClustered) merge_outputs(params);
    } else {
        registers_decrease<kLoadersRegisters>();
        TokenLoader(params, items, smem).run();
        if (kIsClustered) cluster_sync();
    }
    if (kIsClustered) leave_cluster();
}
