// Shared memory of the wide kernel. cupy_mla/kernels adds up the same sizes and passes the total.
#pragma once
#include "decode/claim.h"
#include "decode/wide/query.h"
#include "decode/wide/schedule.h"
#include "decode/wide/tile.h"

namespace mla {

constexpr u32 kLoaderStateBytes = 32;

struct WideSmem {
    static constexpr u32 stages = 0;
    static constexpr u32 q_steps = stages + kStages * kStageBytes;
    // Rescale factor of each row, written with P; one set a stage, so that a stage's release also releases it.
    static constexpr u32 factors = q_steps + kSharedSteps * kQStepBytes;
    static constexpr u32 loader = factors + kStages * kRows * sizeof(f32);        // LoaderState of each loader warp
    static constexpr u32 tile_full = loader + kLoaderWarps * kLoaderStateBytes;   // TMA -> scores
    static constexpr u32 tile_empty = tile_full + kStages * sizeof(u64);          // values -> loader
    static constexpr u32 probabilities_full = tile_empty + kStages * sizeof(u64); // scores -> values
    static constexpr u32 claim = probabilities_full + kStages * sizeof(u64);  // the part that this CTA has claimed
    static constexpr u32 total = claim + kClaimBytes;
};
static_assert(WideSmem::total <= kMaxSharedBytes, "the wide kernel's shared memory does not fit");
static_assert(WideSmem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

MLA_DEVICE u32 stage_address(u32 smem, u32 stage) { return smem + WideSmem::stages + stage * kStageBytes; }
// Arrives: each loader warp, with the bytes to come, then TMA's bytes. Waits: scores.
MLA_DEVICE u32 tile_full(u32 smem, u32 stage) { return smem + WideSmem::tile_full + stage * sizeof(u64); }
// Arrives: one lane of each values warp, once its wgmmas have read the tile for the last time. Waits: loader.
MLA_DEVICE u32 tile_empty(u32 smem, u32 stage) { return smem + WideSmem::tile_empty + stage * sizeof(u64); }
// Arrives: every scores thread, once its share of P and of the factors is written. Waits: values.
MLA_DEVICE u32 probabilities_full(u32 smem, u32 stage) {
    return smem + WideSmem::probabilities_full + stage * sizeof(u64);
}

// Position in the ring of stages; every role walks the same sequence of tiles.
struct RingPosition {
    u32 stage = 0;
    u32 parity = 0;
    MLA_DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace mla
