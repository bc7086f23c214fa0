// What a CTA of a kernel for e4m3 caches does: the roles of its warpgroups.
//   0 (and 1)  scores: Q K^T, softmax, P, as `Scores` does it; two of them take turns
//   next two   values: O^T += V^T P^T, half of the columns each
//   last       its first warp asks TMA for the KV tiles
#pragma once
#include "decode/entry.h"
#include "decode/fp8/load.h"
#include "decode/fp8/values.h"

namespace mla {

// The part's items, read once.
class KeptBounds {
public:
    MLA_DEVICE explicit KeptBounds(const i32* part_begin) : begin_(part_begin[0]), end_(part_begin[1]) {}
    MLA_DEVICE i32 operator()(i32 side) const { return side == 0 ? begin_ : end_; }

private:
    i32 begin_, end_;
};

template <class Scores, class Bound>
MLA_DEVICE void run_fp8_role(const TensorMap* kv_latent, const TensorMap* kv_rope, const Fp8Params& params, u32 smem,
                             Bound bound) {
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup < kScoresWarpgroups) {
        registers_increase<kScoresRegisters>();
        Scores scores(params, smem, warpgroup);
        for_each_item(bound, [&](i32 item) { scores.run_item(item); });
    } else if (warpgroup < kScoresWarpgroups + kValueWarpgroups) {
        if constexpr (kValuesRegisters > kEntryRegisters) registers_increase<kValuesRegisters>();
        ValuesRole values(params, smem, warpgroup - kScoresWarpgroups);
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

template <class Scores>
MLA_DEVICE void run_fp8_roles(const TensorMap* kv_latent, const TensorMap* kv_rope, const Fp8Params& params, u8* shared) {
    const u32 smem = shared_address(shared);
    const i32* part_begin = enter<!kLaunchesLate>(params, shared + Fp8Smem::claim, [&] {
        initialise_barriers(smem);
        prefetch_maps(kv_latent, kv_rope);
    });
    // Kept they cost registers, which 16 rows have.
    if constexpr (kRows == 16)
        run_fp8_role<Scores>(kv_latent, kv_rope, params, smem, KeptBounds(part_begin));
    else
        run_fp8_role<Scores>(kv_latent, kv_rope, params, smem, PartBounds(params.plan, part_begin, shared + Fp8Smem::claim));
}

}  // namespace mla
