// Shared memory of the kernel for tiles of FP8 rows. cupy_mla/kernels/row_tiles.py adds up the same sizes.
#pragma once
#include "decode/claim.h"
#include "decode/gathered/narrow_softmax.h"
#include "decode/gathered/turn_softmax.h"
#include "decode/row_tiles/schedule.h"
#include "ptx/mbarrier.h"

namespace mla {

constexpr u32 kStageBytes = kTileTokens * kRowBytes;
constexpr u32 kScaleBytes = sizeof(u16);  // of V in fp16
constexpr u32 kStageScalesBytes = Codec::kScales * kTileTokens * kScaleBytes;

struct RowTilesSmem {
    static constexpr u32 rows_bytes = kRows * sizeof(f32);  // a value of each row
    static constexpr u32 exchange_bytes = kWarpgroupWarps * rows_bytes;
    static constexpr u32 handed_bytes = kHandedItems * kHandedValues * rows_bytes;
    static constexpr u32 turn_bytes = kTakesTurns ? kScoresWarpgroups * sizeof(u64) + 2 * rows_bytes + handed_bytes : 0;

    static constexpr u32 stages = 0;
    static constexpr u32 query = stages + kStages * kStageBytes;
    static constexpr u32 probabilities = query + kTileBoxes * kRowBoxBytes;  // P^T [kRows][64 tokens] of each buffer
    static constexpr u32 value_scales = probabilities + kBuffers * kRowBoxBytes;  // of each stage, over the tokens' units
    static constexpr u32 exchange = value_scales + kStages * kStageScalesBytes;   // one value per (scores warp, row)
    static constexpr u32 factors = exchange + kScoresWarpgroups * exchange_bytes;  // by which O is rescaled before a tile's PV
    static constexpr u32 inverse_sums = factors + kBuffers * rows_bytes;  // after an item's last tile, for its buffer
    static constexpr u32 row_scales = inverse_sums + kBuffers * rows_bytes;  // what turns a row's scores to log2 units
    static constexpr u32 tile_full = row_scales + rows_bytes;
    static constexpr u32 tile_empty = tile_full + kStages * sizeof(u64);
    static constexpr u32 probabilities_full = tile_empty + kStages * sizeof(u64);
    static constexpr u32 probabilities_empty = probabilities_full + kBuffers * sizeof(u64);
    static constexpr u32 sums_full = probabilities_empty + kBuffers * sizeof(u64);
    static constexpr u32 rescales = sums_full + kBuffers * sizeof(u64);  // whether any factor of a buffer is not 1
    static constexpr u32 claim = rescales + kBuffers * sizeof(u32);
    static constexpr u32 turns = claim + kClaimBytes;  // from here on: of turns
    static constexpr u32 maxima = turns + kScoresWarpgroups * sizeof(u64);
    static constexpr u32 units = maxima + rows_bytes;
    static constexpr u32 handed = units + rows_bytes;
    static constexpr u32 total = turns + turn_bytes;
};
using Smem = RowTilesSmem;
static_assert(Smem::total <= kMaxSharedBytes, "the kernel's shared memory does not fit");
static_assert(Smem::turns % sizeof(u64) == 0, "barriers are aligned");
static_assert(Smem::query % kSwizzleAtomBytes == 0 && Smem::probabilities % kSwizzleAtomBytes == 0,
              "the swizzle is a function of the address: boxes start at its period");
static_assert(Smem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

MLA_DEVICE u32 stage_address(u32 smem, u32 stage) { return smem + Smem::stages + stage * kStageBytes; }
MLA_DEVICE u32 barrier_of(u32 smem, u32 first, u32 index) { return smem + first + index * sizeof(u64); }

// A stage's scales of V, for a group of columns: lane t of a quad has, of each k16 step, tokens 2 t and 2 t + 1 and those 8 further,
// whose scales are side by side.
MLA_DEVICE u32 value_scales_address(u32 smem, u32 stage, u32 group, u32 quad_lane) {
    constexpr u32 kLaneBytes = kTileTokens / kQuadLanes * kScaleBytes;
    return smem + Smem::value_scales + stage * kStageScalesBytes + (group * kQuadLanes + quad_lane) * kLaneBytes;
}
MLA_DEVICE u32 value_scale_address(u32 smem, u32 stage, u32 group, u32 token) {
    const u32 in_lane = token / 8 * 2 + token % 2;
    return value_scales_address(smem, stage, group, token % 8 / 2) + in_lane * kScaleBytes;
}

// Barriers. Who arrives, who waits:
// tile_full: the loader, with the bytes to come; scores and values.
// tile_empty: one lane of each of their warps, once it has read the tile for the last time; the loader.
// Those of NarrowSoftmax and TurnSoftmax: decode/gathered/narrow_softmax.h, turn_softmax.h. All threads of a scores warpgroup arrive
// with P, as they have written scales of V and may have cleared some of it.
MLA_DEVICE void initialise_barriers(u32 smem) {
    constexpr u32 kValueWarps = kValueWarpgroups * kWarpgroupWarps;
    for (u32 stage = 0; stage < kStages; ++stage) {
        mbarrier_init(barrier_of(smem, Smem::tile_full, stage), 1);
        mbarrier_init(barrier_of(smem, Smem::tile_empty, stage), kWarpgroupWarps + kValueWarps);
    }
    for (u32 buffer = 0; buffer < kBuffers; ++buffer) {
        mbarrier_init(barrier_of(smem, Smem::probabilities_full, buffer), kWarpgroupThreads);
        mbarrier_init(barrier_of(smem, Smem::probabilities_empty, buffer), kValueWarps);
        mbarrier_init(barrier_of(smem, Smem::sums_full, buffer), kRowLanes);
    }
    if constexpr (kTakesTurns) {
        for (u32 which = 0; which < kScoresWarpgroups; ++which) mbarrier_init(barrier_of(smem, Smem::turns, which), kRowLanes);
    }
    mbarrier_init_fence();
}

// Position in the ring of stages; every role walks the same sequence of tiles. In one register.
class StageRing {
public:
    MLA_DEVICE u32 index() const { return places_ % kStages; }
    MLA_DEVICE u32 parity() const { return places_ / kStages % 2; }
    MLA_DEVICE void advance() { ++places_; }

private:
    static_assert((kStages & (kStages - 1)) == 0, "numbers of places wrap around");
    u32 places_ = 0;
};

}  // namespace mla
