// A KV tile in its stage of shared memory, as the arithmetic wants it: in the order in which one copy of whole tokens
// writes it. For each group of eight tokens the swizzle atoms of all latent boxes; the box of rope columns follows. P takes
// the rope box's place, dead after QK; without rope it has a box of its own.
#pragma once
#include "decode/config.h"

namespace mla {

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

}  // namespace mla
