// Dense MLA decode over an e4m3 cache for 64 query rows a CTA; kernels_cu/DESIGN.md tells the schedule. Warpgroups:
//   0    scores: S = Q K^T, softmax, P
//   1, 2 values: O^T += V^T P^T, half of the columns each; a warp of the first also asks TMA for the KV tiles
#include "decode/entry.h"
#include "decode/fp8/values.h"
#include "decode/fp8/wide_load.h"
#include "decode/fp8/wide_scores.h"

namespace mla {

// The first of the first values warpgroup. From the special register each time: no register is left to keep it in.
MLA_DEVICE bool is_loader_warp() { return threadIdx.x / kWarpThreads == kWarpgroupWarps; }

// The values warpgroups, which have nothing to do yet, load half of the queries of the first item with tiles.
MLA_DEVICE void help_with_query(const Fp8Params& params, u32 smem, i32 item, i32 item_end) {
    BlockWork work{};
    for (; item < item_end && !work.has_tiles(); ++item) work = load_block_work(params, item);
    if (!work.has_tiles()) return;
    u32 thread = threadIdx.x;
    pin_register(thread);  // else the scores warps keep, all along, what both make of it
    const u32 pass = kScoresPasses + (thread / kWarpgroupThreads - 1) * kHelperPasses;
    const bool outlier = Fp8Query::load_split(params, work, smem, thread % kWarpgroupThreads, pass, pass + kHelperPasses);
    fence_async_proxy();
    named_barrier_or(kQueryBarrier, kThreads, outlier);
}

}  // namespace mla

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_decode_fp8_wide(const __grid_constant__ mla::TensorMap kv_latent, const __grid_constant__ mla::TensorMap kv_rope,
                    const __grid_constant__ mla::Fp8Params params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const i32* part_begin = enter(params, shared + Fp8Smem::claim, [&] {
        initialise_barriers(smem);
        prefetch_maps(&kv_latent, &kv_rope);
    });
    // The number of this CTA's part lies in the word that a claim leaves unused: no registers are left to keep it in.
    volatile i32* const part = reinterpret_cast<volatile i32*>(shared + Fp8Smem::claim) + 1;
    if (threadIdx.x == 0) *part = static_cast<i32>(part_begin - plan_part_begin(params.plan));
    __syncthreads();
    const auto items_begin = [&](i32 parts_further) { return plan_part_begin(params.plan)[*part + parts_further]; };
    pdl_wait();
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup == 0) {
        registers_decrease<kScoresRegisters>();
        WideScoresRole scores(params, smem);
        for (i32 item = items_begin(0); item < items_begin(1); ++item) scores.run_item(item);
    } else {
        registers_increase<kValuesRegisters>();
        ValuesRole values(params, smem);
        const WideLoader loader(&kv_latent, &kv_rope, params, smem);
        if (is_loader_warp()) {
            loader.start(items_begin(0), items_begin(1));
            for (u32 stage = 0; stage < kStages; ++stage) loader.load_next(stage);
        }
        help_with_query(params, smem, items_begin(0), items_begin(1));
        for (i32 item = items_begin(0); item < items_begin(1); ++item) {
            values.run_item(item, [&](const RingPosition<kStages>& done) {
                if (!is_loader_warp()) return;
                mbarrier_wait(barrier_of(smem, Fp8Smem::tile_empty, done.index()), done.parity());
                loader.load_next(done.index());
            });
        }
    }
}
