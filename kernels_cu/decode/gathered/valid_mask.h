// The mask of gathered tokens: a bit for each token of the tile, the same for all rows.
#pragma once
#include "decode/gathered/work.h"
#include "decode/wide/softmax.h"

namespace mla {

// Hides what is no token. Its values are zeros already.
MLA_DEVICE void hide_absent(uint2 valid, float (&scores)[kThreadScores]) {
    if ((valid.x & valid.y) == 0xFFFFFFFFu) return;
    u32 thread = threadIdx.x;
    pin_register(thread);  // else what comes of it is kept from tile to tile
    const u32 first = thread % 4 * 2;  // of the two tokens of each eight that this thread has scores of
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const u32 bits = (i < 8 ? valid.x : valid.y) >> (first + i / 2 % 4 * 8);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float& score = scores[score_index(half, i)];
            score = bits >> i % 2 & 1 ? score : minus_infinity();
        }
    }
}

// Smem: the kernel's shared memory. `valid` has the bits of each stage.
template <class Smem>
class ValidMask {
public:
    MLA_DEVICE void open(const GatherParams&, const BlockWork&, u32) {}
    MLA_DEVICE void next_tile() {}

    MLA_DEVICE void apply(const GatherParams&, i32, i32, u32 smem, u32 stage, float (&scores)[kThreadScores]) {
        hide_absent(load_shared_8b(smem + Smem::valid + stage * (kTileTokens / 8)), scores);
    }
};

}  // namespace mla
