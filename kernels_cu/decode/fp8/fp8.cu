// Dense MLA decode over an e4m3 cache for 16 or 32 query rows a CTA; kernels_cu/DESIGN.md tells the schedule. Warpgroups:
//   0    scores: S^T = K Q^T, softmax, P
//   1, 2 values: O^T += V^T P^T, half of the columns each
//   3    its first warp asks TMA for the KV tiles
#include "decode/entry.h"
#include "decode/fp8/load.h"
#include "decode/fp8/scores.h"
#include "decode/fp8/values.h"

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_decode_fp8(const __grid_constant__ mla::TensorMap kv_latent, const __grid_constant__ mla::TensorMap kv_rope,
               const __grid_constant__ mla::Fp8Params params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const i32* part_begin = enter(params, shared + Fp8Smem::claim, [&] {
        initialise_barriers(smem);
        prefetch_maps(&kv_latent, &kv_rope);
    });
    const PartBounds bound(params.plan, part_begin, shared + Fp8Smem::claim);
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);

    if (warpgroup == 0) {
        registers_increase<kScoresRegisters>();
        ScoresRole scores(params, smem);
        for_each_item(bound, [&](i32 item) { scores.run_item(item); });
    } else if (warpgroup <= kValueWarpgroups) {
        registers_increase<kValuesRegisters>();
        ValuesRole values(params, smem, warpgroup - 1);
        for_each_item(bound, [&](i32 item) { values.run_item(item); });
    } else {
        registers_decrease<kLoaderRegisters>();
        if (threadIdx.x % kWarpgroupThreads / kWarpThreads != 0) return;
        // Walks exactly the tiles that the others walk: all skip items whose block does not exist or sees no tile.
        Fp8Loader loader(&kv_latent, &kv_rope, params, smem);
        const i32 begin = bound(0), end = bound(1);
        for_each_item([=](i32 side) { return side == 0 ? begin : end; }, [&](i32 item) {
            const BlockWork work = load_block_work(params, item);
            if (work.has_tiles()) loader.load_item(work);
        });
    }
}
