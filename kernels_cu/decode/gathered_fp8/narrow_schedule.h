// The schedule of the narrow kernel for gathered tokens of FP8 caches in numbers: roles, registers. DESIGN.md says why.
#pragma once
#include "codec/codec.h"
#include "decode/narrow/swapped.h"

namespace mla {

static_assert(kRows == 16 || kRows == 32, "the narrow kernel serves 16 or 32 query rows");

// Warpgroup 0: scores; 1: values; 2: loaders. A warp of the loaders brings the tokens that the scores warp of its number reads.
constexpr u32 kValuesWarpgroup = 1;
constexpr u32 kLoaderWarps = kWarpgroupWarps;

// Registers of a thread at entry, which the roles then share out. At 16 rows they leave room for a CTA of the merge (224
// threads of 96), at 32 not.
constexpr int kEntryRegisters = kRows == 16 ? 112 : 168;
constexpr int kScoresRegisters = kRows == 16 ? 144 : 208;
constexpr int kValuesRegisters = kRows == 16 ? 152 : 240;
constexpr int kLoadersRegisters = kRows == 16 ? 40 : 56;
static_assert(kScoresRegisters + kValuesRegisters + kLoadersRegisters == 3 * kEntryRegisters, "no more than there are");

// As much shared memory as leaves room for that CTA.
constexpr u32 kSharedBytes = kMaxSharedBytes - kCtaSharedBytes;

// Rows lie as they are stored, 16 of a tile in a slab. Of neighbouring places the same 16 bytes must be half a line apart, or
// eight lanes' loads of two rows meet in the same banks; where a row is not so long, places are shuffled, or padded.
constexpr u32 kLineBytes = 128;
constexpr u32 kLongestRow = Codec::kRowBytes > ExtraCodec::kRowBytes ? Codec::kRowBytes : ExtraCodec::kRowBytes;
constexpr bool kPadsRows = kLongestRow % kLineBytes != kLineBytes / 2 && 4 * kLongestRow % kLineBytes != kLineBytes / 2;
constexpr u32 kRowPitch = kPadsRows ? (kLongestRow + kLineBytes / 2 - 1) / kLineBytes * kLineBytes + kLineBytes / 2 : kLongestRow;
constexpr bool kShufflesRows = kRowPitch % kLineBytes != kLineBytes / 2;
static_assert(!kShufflesRows || 4 * kRowPitch % kLineBytes == kLineBytes / 2, "four rows on is half a line on");
constexpr u32 kSlabTokens = kWarpTokens;
MLA_DEVICE u32 row_place(u32 token) {
    return kShufflesRows ? (token & 8) + (token & 7) / 2 + (token & 1) * 4 : token;
}

// Boxes of V that PV frees together.
constexpr u32 kFreedBoxes = kLatentBoxes % 2 == 0 ? 2 : 1;
constexpr u32 kFreedGroups = kLatentBoxes / kFreedBoxes;

}  // namespace mla
