// What a CTA of a kernel for e4m3 caches does: the roles of its four warpgroups.
//   0    scores: Q K^T, softmax, P, as `Scores` does it
//   1, 2 values: O^T += V^T P^T, half of the columns each
//   3    its first warp asks TMA for the KV tiles
#pragma once
#include "decode/entry.h"
#include "decode/fp8/load.h"
#include "decode/fp8/values.h"

namespace mla {

template <class Scores>
MLA_DEVICE void run_fp8_roles(const TensorMap* kv_latent, const TensorMap* kv_rope, const Fp8Params& params, u8* shared) {
    const u32 smem = shared_address(shared);
    const i32* part_begin = enter(params, shared + Fp8Smem::claim, [&] {
        initialise_barriers(smem);
        prefetch_maps(kv_latent, kv_rope);
    });
    const PartBounds bound(params.plan, part_begin, shared + Fp8Smem::claim);
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup == 0) {
        registers_increase<kScoresRegisters>();
        Scores scores(params, smem);
        for_each_item(bound, [&](i32 item) { scores.run_item(item); });
    } else if (warpgroup <= kValueWarpgroups) {
        registers_increase<kValuesRegisters>();
        ValuesRole values(params, smem, warpgroup - 1);
        for_each_item(bound, [&](i32 item) { values.run_item(item); });
    } else {
        registers_decrease<kLoaderRegisters>();
        if (threadIdx.x % kWarpgroupThreads / kWarpThreads != 0) return;
        // Walks exactly the tiles that the others walk: all skip items whose block does not exist or sees no tile.
        Fp8Loader loader(kv_latent, kv_rope, params, smem);
        const i32 begin = bound(0), end = bound(1);
        for_each_item([=](i32 side) { return side == 0 ? begin : end; }, [&](i32 item) {
            const BlockWork work = load_block_work(params, item);
            if (work.has_tiles()) loader.load_item(work);
        });
    }
}

}  // namespace mla
