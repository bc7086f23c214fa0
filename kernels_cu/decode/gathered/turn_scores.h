// A scores warpgroup of the narrow prefill kernel, one of two that take tiles in turn, across items: S^T = K Q^T, softmax, P. QK
// of a tile runs beside the softmax of the tile before.
#pragma once
#include "decode/gathered/narrow_load.h"
#include "decode/gathered/narrow_query.h"
#include "decode/gathered/turn_softmax.h"

namespace mla {

class ScoresRole {
    using Softmax = TurnSoftmax<Smem>;

public:
    // `thread` counts the warpgroup's threads.
    MLA_DEVICE ScoresRole(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), warp_(thread / kWarpThreads),
          which_(__shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0)), softmax_(params, smem, thread, which_) {
        if (which_ != 0) ring_.advance();
    }

    MLA_DEVICE void run(const Items& items) {
        i32 item = items.first();
        for (BlockWork work = next_work(params_, items, item); work.has_tiles(); work = next_work(params_, items, item))
            run_item(work);
    }

private:
    MLA_DEVICE void run_item(const BlockWork& work) {
        const u32 tiles = work.tile_end - work.tile_begin;
        const u32 first = which_ ^ turn_;  // of this warpgroup's tiles
        turn_ = (turn_ + tiles) % 2;
        const bool has_last = turn_ != which_;
        mbarrier_wait(query_full_barrier(smem_), query_parity_);  // also without a tile: no phase may be missed
        query_parity_ ^= 1;
        if (first < tiles) {
            Softmax::Rows rows(work);
            for (u32 tile = first; tile < tiles; tile += 2) {
                const bool is_own_last = tile + 2 >= tiles;
                float scores[kFragment];
                multiply_tile(smem_, ring_, scores);
                const u32 valid = read_valid(smem_, ring_, warp_, threadIdx.x % kWarpThreads);  // while QK runs
                wgmma_wait<0>();
                wgmma_pin(scores);
                if (is_own_last) release_query();
#pragma unroll
                for (u32 i = 0; i < kFragment; ++i) scores[i] *= params_.scale_log2;
                if (valid != kAllValid) hide_absent_tokens(valid, threadIdx.x % kWarpThreads, scores);
                softmax_.add_tile(tile == 0, is_own_last && !has_last, scores, rows);
                ring_.advance();
                ring_.advance();
            }
            if (has_last) softmax_.finish(work, tiles > 1, rows);
        } else {
            release_query();
        }
        softmax_.next_item();
    }

    // This warp has no more QK of the item.
    MLA_DEVICE void release_query() const {
        __syncwarp();
        if (threadIdx.x % kWarpThreads == 0) mbarrier_arrive(query_empty_barrier(smem_));
    }

    const GatherParams& params_;
    u32 smem_, warp_, which_;
    u32 turn_ = 0;  // whose the next tile is
    u32 query_parity_ = 0;
    Softmax softmax_;
    GroupRing ring_;
};

}  // namespace mla
