// MLA over gathered tokens of FP8 caches, for up to 64 query rows a CTA; kernels_cu/DESIGN.md tells the schedule. Four
// warpgroups:
//   0    scores: S = Q K^T, softmax, P
//   1, 2 values: O += P V, half of the columns each
//   3    converters: read the rows of each tile's tokens as they are stored, and write them as fp16
#include "decode/gathered_fp8/wide_convert.h"
#include "decode/gathered_fp8/wide_scores.h"
#include "decode/gathered_fp8/wide_values.h"

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_gathered_fp8_wide(const __grid_constant__ mla::GatherParams params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const Items items(params, shared + Smem::claim, [&] { initialise_barriers(smem); });
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup == 0) {
        registers_decrease<kScoresRegisters>();
        ScoresRole scores(params, smem);
        for (i32 item = items.first(); item < items.end(); item += items.step()) scores.run_item(item);
        scores.store_pending();
    } else if (warpgroup <= kValueWarpgroups) {
        registers_increase<kValuesRegisters>();
        ValuesRole values(params, smem);
        for (i32 item = items.first(); item < items.end(); item += items.step()) values.run_item(item);
    } else {
        registers_decrease<kConvertersRegisters>();
        Converter(params, items, smem).run();
    }
}
