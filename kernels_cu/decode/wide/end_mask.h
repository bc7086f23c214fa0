// The mask of dense decode: a row sees the keys before some end.
#pragma once
#include "decode/masks.h"
#include "decode/wide/row_places.h"
#include "decode/wide/smem.h"
#include "decode/wide/softmax.h"
#include "ptx/warp.h"

namespace mla {

class EndMask {
public:
    // This thread's rows are at `row` and row + 8 of the matrices.
    MLA_DEVICE void open(const DecodeParams& params, const BlockWork& work, u32 row) {
        const i32 first_key = work.tile_begin * kTileTokens;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            ends_[half] = row_visible_end(params, work, row_at(work, row + half * 8)) - first_key;
    }

    MLA_DEVICE void next_tile() {
        ends_[0] -= kTileTokens;
        ends_[1] -= kTileTokens;
    }

    // Hides keys that a row may not see. The tile in which a row's keys end may hold the sequence's end too.
    MLA_DEVICE void apply(const DecodeParams& params, i32 item, i32 tiles_left, u32 smem, u32 stage,
                          float (&scores)[kThreadScores]) {
        if (kTileTokens <= ends_[0]) return;  // the second row sees no less
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 end = ends_[half] - static_cast<i32>(threadIdx.x % 4) * 2;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float& score = scores[score_index(half, i)];
                score = i / 2 * 8 + i % 2 < end ? score : minus_infinity();
            }
        }
        i32 sequence_end = ends_[0];
        if (kCausal) {  // rare, and no register is left to keep it in
            const BlockWork work = load_block_work(params, item);
            sequence_end = work.seqlen_k - (work.tile_end - tiles_left) * kTileTokens;
        }
        clear_dead_values(stage_address(smem, stage), sequence_end);
    }

private:
    // V rows past the sequence's end may be NaN or left over from another tile, and 0 * NaN is NaN.
    static MLA_DEVICE void clear_dead_values(u32 tile, i32 first_dead) {
        constexpr u32 kChunksPerRow = kBoxRowBytes / 16;
        constexpr u32 kRowsPerPass = kWarpgroupThreads / kChunksPerRow;
        const u32 thread = threadIdx.x;  // of the scores warpgroup, the first
        for (i32 dead = first_dead + static_cast<i32>(thread / kChunksPerRow); dead < kTileTokens; dead += kRowsPerPass) {
            for (u32 box = 0; box < kLatentBoxes; ++box)
                store_shared_16b(tile + latent_row(dead, box) + thread % kChunksPerRow * 16, uint4{0, 0, 0, 0});
        }
    }

    i32 ends_[2];  // first key that each row may not see, counted from the current tile
};

}  // namespace mla
