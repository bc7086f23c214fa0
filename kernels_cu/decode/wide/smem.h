// Shared memory of the wide kernel. cupy_mla/kernels adds up the same sizes and passes the total.
#pragma once
#include "decode/claim.h"
#include "decode/config.h"
#include "source/paged.h"

namespace mla {

// K is walked in k16 steps, latent first. As many steps of Q as the registers hold stay there for the whole item; the
// rest lies in shared memory. Measured: 31 fit beside a 64x64 score tile in 184 registers; 32 serialise wgmma (C7512).
constexpr u32 kSteps = (kLatent + kRope) / 16;
constexpr u32 kMaxRegisterSteps = 31;
constexpr u32 kRegisterSteps = kSteps < kMaxRegisterSteps ? kSteps : kMaxRegisterSteps;
constexpr u32 kSharedSteps = kSteps - kRegisterSteps;

constexpr u32 kStages = 3;  // the third stage is what matters most (DESIGN.md); a fourth does not fit at 576
// A tile lies in its stage in the order in which one copy of whole tokens writes it: for each group of eight tokens the
// swizzle atoms of all latent boxes. The box of rope columns follows. P takes its place, dead after QK; without rope it has
// a box of its own.
static_assert(kRopeBoxes <= 1, "a stage has one box behind the latent ones");
constexpr u32 kStageBytes = (kLatentBoxes + 1) * kBoxBytes;
constexpr u32 kStageRope = kLatentBoxes * kBoxBytes;
constexpr u32 kProbabilities = kStageRope;
constexpr u32 kLatentGroupBytes = kLatentBoxes * kSwizzleAtomBytes;
// The latent part of K: one k16 step is 32 bytes further, one box of 64 columns kSwizzleAtomBytes further.
constexpr u64 kLatentKMajor = encode_descriptor(16, kLatentGroupBytes, kSwizzle128B);
// V, N-major: columns continue in the next atom, tokens in the next group.
constexpr u64 kLatentNMajor = encode_descriptor(kSwizzleAtomBytes, kLatentGroupBytes, kSwizzle128B);

// Where a token's row of 64 columns of a latent box lies in the stage.
constexpr MLA_DEVICE u32 latent_row(u32 token, u32 box) {
    return token / kAtomRows * kLatentGroupBytes + box * kSwizzleAtomBytes + token % kAtomRows * kBoxRowBytes;
}

// One k16 step of Q for 64 rows: 32 bytes a row, 32-byte swizzle.
constexpr u32 kQStepRowBytes = 32;
constexpr u32 kQStepBytes = kRows * kQStepRowBytes;
constexpr u64 kQStepKMajor = encode_descriptor(16, 8 * kQStepRowBytes, kSwizzle32B);
MLA_DEVICE u32 q_step_chunk_offset(u32 row, u32 chunk) {
    return row * kQStepRowBytes + ((chunk ^ ((row >> 2) & 1)) << 4);
}

// Where a page holds a group of tokens, a copy of a chunk brings all its columns. Else a chunk makes many small copies: a
// warp asks for one in about 40 clocks, so four warps share them. One is enough otherwise, and disturbs the others less.
constexpr bool kCopiesWholeTokens = kGroupTokens == kAtomRows;
constexpr u32 kLoaderWarps = kCopiesWholeTokens ? 1 : kWarpgroupWarps;
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
