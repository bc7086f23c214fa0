// Dense MLA decode for 16 or 32 query rows a CTA, operands swapped; kernels_cu/DESIGN.md tells the schedule. 160 threads:
//   warps 0-3  consumers: S^T = K Q^T, softmax, O^T += V^T P^T
//   warp 4     producer: asks TMA for KV boxes, as far ahead as the ring reaches
#include "decode/entry.h"
#include "decode/narrow/load.h"
#include "decode/narrow/consumer.h"

namespace mla {

// By one thread: a lane for each slot, each with its fence, takes 0.5 us longer.
MLA_DEVICE void initialise_barriers(u32 smem) {
    for (u32 slot = 0; slot < NarrowSmem::slots; ++slot) {
        mbarrier_init(full_barrier(smem, slot), kFullArrivals);
        mbarrier_init(empty_barrier(smem, slot), kEmptyArrivals);
    }
    mbarrier_init_fence();
}

}  // namespace mla

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_decode_narrow(const __grid_constant__ mla::TensorMap kv_latent, const __grid_constant__ mla::TensorMap kv_rope,
                  const __grid_constant__ mla::DecodeParams params) {
    using namespace mla;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 smem = shared_address(shared);
    const i32* part_begin = enter(params, shared + NarrowSmem::claim, [&] {
        initialise_barriers(smem);
        prefetch_maps(&kv_latent, &kv_rope);
    });
    i32 item = part_begin[0];
    const i32 item_end = part_begin[1];
    BlockWork work{};
    if (item < item_end) work = load_block_work(params, item);

    if (__shfl_sync(kFullWarp, threadIdx.x / kWarpThreads, 0) == kConsumerWarps) {
        // Walks exactly the tiles that the consumers walk: both skip items whose block does not exist or sees no tile.
        BoxLoader loader(&kv_latent, &kv_rope, params, smem, threadIdx.x % kWarpThreads);
        if (params.plan_is_settled && item < item_end && work.has_tiles()) loader.prefetch_short_item(work);
        pdl_wait();
        while (item < item_end) {
            if (work.has_tiles()) loader.load_item(work);
            if (++item < item_end) work = load_block_work(params, item);
        }
    } else {
        ConsumerRole consumer(params, smem, threadIdx.x);
        while (item < item_end) {
            if (work.exists()) consumer.run_item(work);
            if (++item < item_end) work = load_block_work(params, item);
        }
        pdl_wait();  // whoever waits for this kernel waits for those before it, too
    }
}
