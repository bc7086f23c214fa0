// Shared memory of the wide kernel. cupy_mla/kernels adds up the same sizes and passes the total.
#pragma once
#include "decode/claim.h"
#include "decode/ring.h"
#include "decode/wide/query.h"
#include "decode/wide/schedule.h"
#include "decode/wide/tile.h"
#include "ptx/mbarrier.h"

namespace mla {

constexpr u32 kLoaderStateBytes = 32;
constexpr u32 kGatherStateBytes = 16;
// LoaderState of each loader warp; or GatherState of each values warp, and their bytes of valid bits for each stage.
constexpr u32 kLoaderBytes = kGathered ? kGatherWarps * kGatherStateBytes + kStages * kGatherWarps
                                       : kLoaderWarps * kLoaderStateBytes;

constexpr u32 kTileReleases = kValueWarpgroups * kWarpgroupWarps;  // arrivals that empty a stage

struct WideSmem {
    static constexpr u32 stages = 0;
    static constexpr u32 q_steps = stages + kStages * kStageBytes;
    // Rescale factor of each row, written with P; one set a stage, so that a stage's release also releases it.
    static constexpr u32 factors = q_steps + kSharedSteps * kQStepBytes;
    static constexpr u32 loader = factors + kStages * kRows * sizeof(f32);
    static constexpr u32 valid = loader + kGatherWarps * kGatherStateBytes;       // gathered only
    static constexpr u32 tile_full = loader + kLoaderBytes;                       // TMA or cp.async -> scores
    static constexpr u32 tile_empty = tile_full + kStages * sizeof(u64);          // values -> loader
    static constexpr u32 probabilities_full = tile_empty + kStages * sizeof(u64); // scores -> values
    static constexpr u32 claim = probabilities_full + kStages * sizeof(u64);  // the part that this CTA has claimed
    static constexpr u32 stored = claim + kClaimBytes;  // of each scores warp: the cut item whose lses it has stored last
    static constexpr u32 total = stored + (kLseCopies > 1 ? kWarpgroupWarps * sizeof(i32) : 0);
};
static_assert(WideSmem::total <= kMaxSharedBytes, "the wide kernel's shared memory does not fit");
static_assert(WideSmem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

// Written by a scores warp, read by values warps of the same rows, where they mark its lses (decode/wide/scaled_partial.h).
MLA_DEVICE u32 stored_item(u32 smem, u32 warp) { return smem + WideSmem::stored + warp * sizeof(i32); }
MLA_DEVICE u32 stage_address(u32 smem, u32 stage) { return smem + WideSmem::stages + stage * kStageBytes; }
// Arrives: each loader warp, with the bytes to come, then TMA's bytes; gathered: kGatherArrivals. Waits: scores.
MLA_DEVICE u32 tile_full(u32 smem, u32 stage) { return smem + WideSmem::tile_full + stage * sizeof(u64); }
// Arrives: one lane of each values warp, once its wgmmas have read the tile for the last time; from a stage with queries (of
// gathered tokens) the scores warps, as often. Waits: loader.
MLA_DEVICE u32 tile_empty(u32 smem, u32 stage) { return smem + WideSmem::tile_empty + stage * sizeof(u64); }
// Arrives: every scores thread, once its share of P and of the factors is written, or queries of a stage are read. Waits: values.
MLA_DEVICE u32 probabilities_full(u32 smem, u32 stage) {
    return smem + WideSmem::probabilities_full + stage * sizeof(u64);
}

// One thread. `tile_arrivals` complete a tile, with bytes that may have been announced.
MLA_DEVICE void initialise_barriers(u32 smem, u32 tile_arrivals) {
    for (u32 stage = 0; stage < kStages; ++stage) {
        mbarrier_init(tile_full(smem, stage), tile_arrivals);
        mbarrier_init(tile_empty(smem, stage), kTileReleases);
        mbarrier_init(probabilities_full(smem, stage), kWarpgroupThreads);
    }
    mbarrier_init_fence();
    if constexpr (kLseCopies > 1) {
        for (u32 warp = 0; warp < kWarpgroupWarps; ++warp) store_shared_u32(stored_item(smem, warp), ~0u);  // none
    }
}

using RingPosition = RingOf<kStages>;

}  // namespace mla
