// The schedule of the narrow kernel for gathered tokens in numbers: roles, registers, buffers. DESIGN.md says why.
#pragma once
#include "decode/narrow/swapped.h"

namespace mla {

static_assert(kRows == 16 || kRows == 32, "the narrow kernel serves 16 or 32 query rows");

// Without a plan, in prefill, two scores warpgroups of 16 rows take tiles in turn (turn_scores.h).
constexpr bool kTakesTurns = !MLA_PLANNED && kRows == 16;
// Of 32 rows there is one, whose rows lie along M, with Q in its registers: so many boxes of it (row_scores.h). None is left to
// refine P.
constexpr u32 kRegisterBoxes = 9;
constexpr bool kRowsAlongM = !MLA_PLANNED && kRows == 32 && kTileBoxes <= kRegisterBoxes && !kRefines;

// Warpgroups: scores, then values, then loaders.
constexpr u32 kScoresWarpgroups = kTakesTurns ? 2 : 1;
constexpr u32 kValuesWarpgroup = kScoresWarpgroups;
constexpr u32 kLoaderWarps = kWarpgroupWarps;

// Registers of a thread at entry, which the roles then share out. At 16 rows of a plan they leave room for a CTA of the merge
// (256 threads of 96), at 32 not.
constexpr int kEntryRegisters = kTakesTurns ? 128 : kRowsAlongM ? 168 : kRows == 16 ? 96 : 168;
constexpr int kScoresRegisters = kTakesTurns ? 128 : kRowsAlongM ? 240 : kRows == 16 ? 96 : 184;
constexpr int kValuesRegisters = kTakesTurns ? 152 : kRowsAlongM ? 208 : kRows == 16 ? 136 : 240;
constexpr int kLoadersRegisters = kTakesTurns ? 104 : kRowsAlongM ? 56 : kRows == 16 ? 56 : 80;
static_assert(kScoresWarpgroups * kScoresRegisters + kValuesRegisters + kLoadersRegisters ==
                  (kScoresWarpgroups + 2) * kEntryRegisters,
              "no more than there are");

// As much shared memory as leaves room for that CTA; no merge follows a prefill.
constexpr u32 kSharedBytes = kMaxSharedBytes - (kTakesTurns || kRowsAlongM ? 0 : kCtaSharedBytes);

// Boxes of a tile that the loaders announce together and that are freed together: a tile is a whole number of groups. Three of
// nine: a third of the arrivals of single boxes, 384 bytes of a row at a time, and QK need not wait for the whole tile.
constexpr MLA_DEVICE u32 largest_divisor(u32 number, u32 most) {
    return number % most == 0 ? most : largest_divisor(number, most - 1);
}
constexpr u32 kMaxGroupBoxes = 4;
constexpr u32 kGroupBoxes = largest_divisor(kTileBoxes, kMaxGroupBoxes);
constexpr u32 kGroupBytes = kGroupBoxes * kBoxBytes;
constexpr u32 kTileGroups = kTileBoxes / kGroupBoxes;
// Whether boxes are freed one by one, each while PV multiplies the next, so that more is on its way: in prefill's own kernels.
constexpr bool kFreesBoxes = kTakesTurns || kRowsAlongM;
constexpr u32 kFreedBoxes = kFreesBoxes ? 1 : kGroupBoxes;  // together
constexpr u32 kGroupFrees = kGroupBoxes / kFreedBoxes;      // of a group
static_assert(kTileBoxes / kFreedBoxes <= kWarpThreads, "a lane for each part of a tile that is freed");

// Groups that an item's Q takes ahead of its first tile, where it comes through the ring.
constexpr u32 kQueryGroups = kRowsAlongM ? (kTileBoxes * kRowBoxBytes + kGroupBytes - 1) / kGroupBytes : 0;

// Groups in the ring, if there is room. With a plan no more than two tiles of 576 columns: what a decode reads comes from HBM,
// which is the slower the more is on its way. TRIED_GATHERED_DECODE.md: up to 2%.
constexpr u32 kRingBoxes = 18;
constexpr u32 kRingGroups = kTileBoxes > kRingBoxes / 2 ? 2 * kTileGroups : kRingBoxes / kGroupBoxes;

}  // namespace mla
