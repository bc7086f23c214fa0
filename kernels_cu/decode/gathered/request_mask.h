// The mask of dense decode for gathered tokens, by request: a row sees the keys before some end. It keeps nothing: no register
// is left. Only the last tiles of a request can have keys that a row does not see.
#pragma once
#include "decode/gathered/work.h"
#include "decode/masks.h"
#include "decode/wide/row_places.h"
#include "decode/wide/softmax.h"

namespace mla {

class RequestMask {
public:
    MLA_DEVICE void open(const GatherParams&, const BlockWork&, u32) {}
    MLA_DEVICE void next_tile() {}

    // Values past the sequence's end were never brought: zeros are in their place.
    MLA_DEVICE void apply(const GatherParams& params, i32 item, i32 tiles_left, u32, u32, float (&scores)[kThreadScores]) {
        const i32 later_keys = (tiles_left - 1) * kTileTokens;  // at least so many, less a tile's rest, follow this tile
        if (later_keys >= (kCausal ? params.seqlen_q : 1) + static_cast<i32>(kTileTokens) - 2) return;
        const BlockWork work = load_block_work(params, item);
        const i32 first_key = (work.tile_end - tiles_left) * kTileTokens + static_cast<i32>(threadIdx.x % 4) * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 place = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + half * 8;
            const i32 end = row_visible_end(params, work, row_at(work, place)) - first_key;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float& score = scores[score_index(half, i)];
                score = i / 2 * 8 + i % 2 < end ? score : minus_infinity();
            }
        }
    }
};

}  // namespace mla
