// Shared memory of the kernel for 64 rows of gathered FP8 tokens. cupy_mla/kernels adds up the same sizes.
#pragma once
#include "decode/claim.h"
#include "decode/gathered/part_items.h"
#include "decode/gathered_fp8/wide_schedule.h"
#include "decode/ring.h"
#include "ptx/mbarrier.h"

namespace mla {

struct GatheredFp8WideSmem {
    static constexpr u32 row_bytes = kRows * sizeof(f32);  // a value of each row
    static constexpr u32 scale_bytes = kMostScalePairs * sizeof(u32);  // a token's, in fp16

    static constexpr u32 stages = 0;
    static constexpr u32 query = stages + kStages * kStageBytes;      // [64 rows][64] boxes
    static constexpr u32 staged = query + kTileBoxes * kBoxBytes;  // of tokens on their way
    static constexpr u32 staged_bytes = kStagedBoxes * kTileTokens * kBoxRowBytes;
    static constexpr u32 factors = staged + staged_bytes;  // by which O is rescaled before a stage's PV
    static constexpr u32 inverse_sums = factors + kStages * row_bytes;  // after an item's last tile, for its stage
    static constexpr u32 row_scales = inverse_sums + kStages * row_bytes;  // what turns a row's scores to log2 units
    static constexpr u32 units = row_scales + row_bytes;                   // of each stage's tokens
    static constexpr u32 scales = units + kStages * kTileTokens * sizeof(f32);  // of the tokens that are being converted
    static constexpr u32 rows = scales + kTileTokens * scale_bytes;  // addresses of the tokens that are asked for
    static constexpr u32 marks = rows + kTileTokens * sizeof(u64);    // of each stage's tokens
    static constexpr u32 tile_full = marks + kStages * kConverterWarps * sizeof(u32);
    static constexpr u32 probabilities_full = tile_full + kStages * sizeof(u64);
    static constexpr u32 slab_empty = probabilities_full + kStages * sizeof(u64);
    static constexpr u32 query_full = slab_empty + kStages * kSlabs * sizeof(u64);
    static constexpr u32 claim = query_full + sizeof(u64);
    static constexpr u32 end = claim + kClaimBytes;
    static constexpr u32 aligned_end = (end + alignof(PartItems) - 1) / alignof(PartItems) * alignof(PartItems);
    static constexpr u32 total = kPartItems > 0 ? aligned_end + kPartItemsBytes : end;
};
using Smem = GatheredFp8WideSmem;
static_assert(Smem::total <= kMaxSharedBytes, "the kernel's shared memory does not fit");
static_assert(Smem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

// A word of each warp that converts: bits of its tokens, and above them whether any has a unit that is not 1.
constexpr u32 kAllValid = (1u << kWarpTokens) - 1;
constexpr u32 kHasUnits = 1u << kWarpTokens;

MLA_DEVICE u32 stage_address(u32 smem, u32 stage) { return smem + Smem::stages + stage * kStageBytes; }

// Barriers. Who arrives, who waits:
// tile_full: every converter thread, once its share of the tile is written; scores.
MLA_DEVICE u32 tile_full(u32 smem, u32 stage) { return smem + Smem::tile_full + stage * sizeof(u64); }
// probabilities_full: every scores thread, once its share of P, factors and inverse sums is written; values.
MLA_DEVICE u32 probabilities_full(u32 smem, u32 stage) { return smem + Smem::probabilities_full + stage * sizeof(u64); }
// slab_empty: one lane of each values warp, once PV has read the slab, and for the last one P and all else; converters.
MLA_DEVICE u32 slab_empty(u32 smem, u32 stage, u32 slab) {
    return smem + Smem::slab_empty + (stage * kSlabs + slab) * sizeof(u64);
}

// query_full: every values thread, once its share of an item's Q is written; scores.
MLA_DEVICE void initialise_barriers(u32 smem) {
    for (u32 stage = 0; stage < kStages; ++stage) {
        mbarrier_init(tile_full(smem, stage), kConverterWarps * kWarpThreads);
        mbarrier_init(probabilities_full(smem, stage), kWarpgroupThreads);
        for (u32 slab = 0; slab < kSlabs; ++slab)
            mbarrier_init(slab_empty(smem, stage, slab), kValueWarpgroups * kWarpgroupWarps);
    }
    mbarrier_init(smem + Smem::query_full, kValueWarpgroups * kWarpgroupThreads);
    mbarrier_init_fence();
}

using RingPosition = RingOf<kStages>;

}  // namespace mla
