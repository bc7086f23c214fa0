// MLA over gathered tokens, for up to 64 query rows a CTA; kernels_cu/DESIGN.md tells the schedule. Three warpgroups:
//   0    scores: S = Q K^T, softmax, P
//   1, 2 values: O += P V, half of the columns each; and all of their warps gather queries and KV tiles
#include "decode/gathered/gatherer.h"
#include "decode/gathered/output.h"
#include "decode/gathered/request_mask.h"
#include "decode/gathered/results.h"
#include "decode/gathered/valid_mask.h"
#include "decode/gathered/work.h"
#include "decode/wide/scores.h"
#include "decode/wide/values.h"

namespace mla {

#if MLA_BY_REQUEST
using TokenMask = RequestMask;
#else
using TokenMask = ValidMask<WideSmem>;
#endif

// What the roles are part of: decode/wide/scores.h.
struct GatheredWide {
    using Params = GatherParams;
    using Mask = TokenMask;
    using Results = SinkAndLargest;
    using Out = GatheredOutput;
    static constexpr bool kDividesOutput = !kRefines && !kIsClustered;  // warps that merge have no registers for it
};

}  // namespace mla

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_gathered_wide(const __grid_constant__ mla::GatherParams params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const Items items(params, shared + WideSmem::claim, [&] { initialise_barriers(smem, kGatherArrivals); });
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup == 0) {
        registers_increase<kScoresRegisters>();
        ScoresRole<GatheredWide> scores(params, smem);
        for (i32 item = items.first(); item < items.end(); item += items.step()) scores.run_item(item);
        if (kIsClustered) cluster_sync();
    } else {
        registers_decrease<kValuesRegisters>();
        ValuesRole<GatheredWide> values(params, smem);
        Gatherer gatherer(params, items, smem, shared);
        gatherer.start();
        for (u32 stage = 0; stage < kStages; ++stage) gatherer.load_next(stage);
        for (i32 item = items.first(); item < items.end(); item += items.step()) {
            values.run_item(item, [&](const RingPosition& done) {
                mbarrier_wait(tile_empty(smem, done.stage), done.parity);
                gatherer.load_next(done.stage);
            });
        }
        if constexpr (kIsClustered) merge_outputs(params);
    }
    if (kIsClustered) leave_cluster();
}
