// The scores warpgroup of the narrow kernel for gathered tokens: S^T = K Q^T, softmax, P; it is up to two tiles ahead of PV.
#pragma once
#include "decode/gathered/narrow_load.h"
#include "decode/gathered/narrow_query.h"
#include "decode/gathered/narrow_softmax.h"

namespace mla {

class ScoresRole {
public:
    MLA_DEVICE ScoresRole(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), thread_(thread), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads),
          softmax_(params, smem, thread) {}

    // Items that have tiles. Q of the next is on its way once QK of an item's last tile is done.
    MLA_DEVICE void run(const Items& items) {
        i32 item;
        BlockWork work = first_work(params_, items, item);
        if (work.has_tiles()) copy_query(work);
        while (work.has_tiles()) {
            const BlockWork next = next_work(params_, items, item);
            run_item(work, next);
            work = next;
        }
    }

private:
    using Softmax = NarrowSoftmax<Smem>;

    // Rows that do not exist are zeros. All warps are done with the Q before: the barrier of the last tile's P followed.
    MLA_DEVICE void copy_query(const BlockWork& work) const {
        const u32 chunk = thread_ % kChunksPerBoxRow;
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
            const u32 row_in_block = thread_ / kChunksPerBoxRow + pass * kRowsPerPass;
            copy_query_chunks(params_, work, smem_, row_in_block, chunk);
        }
    }

    MLA_DEVICE void run_item(const BlockWork& work, const BlockWork& next) {
        copy_async_wait();
        fence_async_proxy();
        softmax_.barrier();  // Q is complete before any warp's wgmma reads it
        Softmax::Rows rows(work);
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            float scores[kFragment];
            multiply_tile(smem_, ring_, scores);
            const u32 valid = kByRequest ? kAllValid : read_valid(smem_, ring_, warp_, lane_);  // while QK runs
            wgmma_wait<0>();
            wgmma_pin(scores);
#pragma unroll
            for (u32 i = 0; i < kFragment; ++i) scores[i] *= params_.scale_log2;
            if constexpr (kByRequest)
                softmax_.hide_unseen(work, tile, scores);
            else if (valid != kAllValid)
                softmax_.hide(valid, scores);
            softmax_.add_tile<Operand>(tile == work.tile_begin, scores, rows);
            ring_.advance();
            if (tile + 1 < work.tile_end) continue;
            if (next.has_tiles()) copy_query(next);
            softmax_.finish(work, rows);
        }
    }

    const GatherParams& params_;
    u32 smem_, thread_, warp_, lane_;
    Softmax softmax_;
    GroupRing ring_;
};

}  // namespace mla
