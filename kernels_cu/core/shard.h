// Which tokens of a request lie on which rank when the cache is sharded along the sequence: token t is on rank
// t / interleave % world. cupy_mla/call/shard.py says the same; a test compares the two.
#pragma once
#include "core/types.h"

namespace mla {

struct Shard {
    i32 world, rank, interleave;

    MLA_DEVICE bool has(i32 token) const { return token / interleave % world == rank; }

    // How many of a request's first tokens the rank has.
    MLA_DEVICE i32 count(i32 tokens) const {
        const i32 round = world * interleave;
        const i32 rounds = tokens / round;
        return rounds * interleave + clamp_i32(tokens - rounds * round - rank * interleave, 0, interleave);
    }
};

// As one word of a plan and of the planner's parameters; kWholeKeys: keys are not sharded.
constexpr u32 kWholeKeys = 0;
constexpr u32 kShardRankShift = 8;
constexpr u32 kShardInterleaveShift = 16;

MLA_DEVICE Shard unpack_shard(u32 word) {
    constexpr u32 kRankMask = (1u << kShardRankShift) - 1;
    return {static_cast<i32>(word & kRankMask), static_cast<i32>(word >> kShardRankShift & kRankMask),
            static_cast<i32>(word >> kShardInterleaveShift)};
}

}  // namespace mla
