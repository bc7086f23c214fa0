// Dense MLA decode for up to 64 query rows a CTA; kernels_cu/DESIGN.md tells the schedule. Three warpgroups:
//   0    scores: S = Q K^T, softmax, P
//   1, 2 values: O += P V, half of the columns each; warps of the first also ask TMA for the KV tiles
#include "decode/entry.h"
#include "decode/wide/end_mask.h"
#include "decode/wide/load.h"
#include "decode/wide/scores.h"
#include "decode/wide/values.h"

namespace mla {

// What the roles are part of: decode/wide/scores.h.
struct DenseWide {
    using Params = DecodeParams;
    using Mask = EndMask;
    using Results = NoResults;
    using Out = WideOutput<DecodeParams, false>;
    static constexpr bool kDividesOutput = !kRefines;
};

// The first warps of the first values warpgroup. From the special register each time: no register is left to keep it in.
MLA_DEVICE bool is_loader_warp() {
    return threadIdx.x / kWarpThreads - kWarpgroupWarps < kLoaderWarps;
}

}  // namespace mla

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_decode_wide(const __grid_constant__ mla::TensorMap kv_latent, const __grid_constant__ mla::TensorMap kv_rope,
                const __grid_constant__ mla::DecodeParams params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const i32* part_begin = enter(params, shared + WideSmem::claim, [&] {
        initialise_barriers(smem, kLoaderWarps);  // and the bytes to come
        prefetch_maps(&kv_latent, &kv_rope);
    });
    const i32 bounds[2] = {part_begin[0], part_begin[1]};
    const auto bound = [&](i32 side) { return kHasRegisters ? bounds[side] : part_begin[side]; };
    pdl_wait();
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup == 0) {
        registers_increase<kScoresRegisters>();
        ScoresRole<DenseWide> scores(params, smem);
        for (i32 item = bound(0); item < bound(1); ++item) scores.run_item(item);
    } else {
        registers_decrease<kValuesRegisters>();
        ValuesRole<DenseWide> values(params, smem);
        TileLoader loader(&kv_latent, &kv_rope, params, smem, reinterpret_cast<LoaderState*>(shared + WideSmem::loader));
        if (is_loader_warp()) {
            loader.start(bound(0), bound(1));
            for (u32 stage = 0; stage < kStages; ++stage) loader.load_next(stage);
        }
        for (i32 item = bound(0); item < bound(1); ++item) {
            values.run_item(item, [&](const RingPosition& done) {
                if (!is_loader_warp()) return;
                mbarrier_wait(tile_empty(smem, done.stage), done.parity);
                loader.load_next(done.stage);
            });
        }
    }
}
