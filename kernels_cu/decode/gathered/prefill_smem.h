// Shared memory of the wide prefill kernel. cupy_mla/kernels adds up the same sizes and passes the total.
#pragma once
#include "decode/claim.h"
#include "decode/gathered/prefill_schedule.h"
#include "decode/ring.h"
#include "ptx/mbarrier.h"

namespace mla {

constexpr u32 kLoaderStateBytes = 32;
constexpr u32 kValidBytes = kTileTokens / 8;  // a bit for each token of a tile

// One k16 step of Q for 64 rows: 32 bytes a row, 32-byte swizzle.
constexpr u32 kQStepRowBytes = 32;
constexpr u32 kQStepBytes = kRows * kQStepRowBytes;
constexpr u64 kQStepKMajor = encode_descriptor(16, 8 * kQStepRowBytes, kSwizzle32B);
MLA_DEVICE u32 q_step_chunk_offset(u32 row, u32 chunk) {
    return row * kQStepRowBytes + ((chunk ^ ((row >> 2) & 1)) << 4);
}

struct WideSmem {
    static constexpr u32 stages = 0;
    static constexpr u32 q_steps = stages + kStages * kStageBytes;
    // Rescale factor of each row, written with P; one set a stage, so that a stage's release also releases it.
    static constexpr u32 factors = q_steps + kSharedSteps * kQStepBytes;
    static constexpr u32 loader = factors + kStages * kRows * sizeof(f32);
    static constexpr u32 valid = loader + kLoaderWarps * kLoaderStateBytes;
    static constexpr u32 tile_full = valid + kStages * kValidBytes;
    static constexpr u32 tile_empty = tile_full + kStages * sizeof(u64);
    static constexpr u32 probabilities_full = tile_empty + kStages * sizeof(u64);
    static constexpr u32 claim = probabilities_full + kStages * sizeof(u64);  // what Items keeps
    static constexpr u32 total = claim + kClaimBytes;
};
static_assert(WideSmem::total <= kMaxSharedBytes, "this kernel's shared memory does not fit");
static_assert(WideSmem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

MLA_DEVICE u32 stage_address(u32 smem, u32 stage) { return smem + WideSmem::stages + stage * kStageBytes; }
// Who arrives, who waits:
// A tile, or an item's queries, and bits of its tokens: every loader thread's copies, and lane 0 of each loader warp; scores.
MLA_DEVICE u32 tile_full(u32 smem, u32 stage) { return smem + WideSmem::tile_full + stage * sizeof(u64); }
constexpr u32 kTileArrivals = kLoaderWarps * (kWarpThreads + 1);
// Every values thread; from a stage with queries every scores thread, twice; loaders.
MLA_DEVICE u32 tile_empty(u32 smem, u32 stage) { return smem + WideSmem::tile_empty + stage * sizeof(u64); }
constexpr u32 kTileReleases = kValueWarpgroups * kWarpgroupThreads;
// Every scores thread, once its share of P and of the factors is written, or queries are read; values.
MLA_DEVICE u32 probabilities_full(u32 smem, u32 stage) { return smem + WideSmem::probabilities_full + stage * sizeof(u64); }

// One thread.
MLA_DEVICE void initialise_barriers(u32 smem) {
    for (u32 stage = 0; stage < kStages; ++stage) {
        mbarrier_init(tile_full(smem, stage), kTileArrivals);
        mbarrier_init(tile_empty(smem, stage), kTileReleases);
        mbarrier_init(probabilities_full(smem, stage), kWarpgroupThreads);
    }
    mbarrier_init_fence();
}

using RingPosition = RingOf<kStages>;

}  // namespace mla
