// The schedule of the narrow kernel for gathered tokens in numbers: roles, registers, buffers. DESIGN.md says why.
#pragma once
#include "decode/narrow/swapped.h"

namespace mla {

static_assert(kRows == 16 || kRows == 32, "the narrow kernel serves 16 or 32 query rows");

// Warpgroup 0: scores; 1: values; 2: loaders.
constexpr u32 kScoresWarpgroup = 0;
constexpr u32 kValuesWarpgroup = 1;
constexpr u32 kLoaderWarps = kWarpgroupWarps;

// Registers of a thread at entry, which the roles then share out. At 16 rows they leave room for a CTA of the merge (256
// threads of 96), at 32 not.
constexpr int kEntryRegisters = kRows == 16 ? 96 : 168;
constexpr int kMovedRegisters = kRefines && !MLA_PLANNED && kRows == 16 ? 8 : 0;  // largest scores, and P refined
constexpr int kScoresRegisters = (kRows == 16 ? 96 : 184) + kMovedRegisters;
// O of half the latent columns leaves registers to the loaders, which wait for more groups then; without a plan they spill.
constexpr int kSparedRegisters = kLatent <= 256 && !MLA_PLANNED && kRows == 16 ? 8 : 0;
constexpr int kValuesRegisters = (kRows == 16 ? 136 : 240) - kSparedRegisters;
constexpr int kLoadersRegisters = (kRows == 16 ? 56 : 80) - kMovedRegisters + kSparedRegisters;
static_assert(kScoresRegisters + kValuesRegisters + kLoadersRegisters == 3 * kEntryRegisters, "no more than there are");

// As much shared memory as leaves room for that CTA.
constexpr u32 kSharedBytes = kMaxSharedBytes - kCtaSharedBytes;

// Boxes of a tile that the loaders announce together and that are freed together: a tile is a whole number of groups. Three of
// nine: a third of the arrivals of single boxes, 384 bytes of a row at a time, and QK need not wait for the whole tile.
constexpr MLA_DEVICE u32 largest_divisor(u32 number, u32 most) {
    return number % most == 0 ? most : largest_divisor(number, most - 1);
}
constexpr u32 kMaxGroupBoxes = 4;
constexpr u32 kGroupBoxes = largest_divisor(kTileBoxes, kMaxGroupBoxes);
constexpr u32 kGroupBytes = kGroupBoxes * kBoxBytes;
constexpr u32 kTileGroups = kTileBoxes / kGroupBoxes;
static_assert(kTileGroups <= kWarpThreads, "one lane per group of a tile releases it");

}  // namespace mla
