// The schedule of the kernel for tiles of FP8 rows in numbers: roles, registers, stages. DESIGN.md says why.
#pragma once
#include "codec/codec.h"
#include "decode/gathered/work.h"
#include "decode/narrow/swapped.h"

namespace mla {

static_assert(kRows == 16 || kRows == 32, "the kernel serves 16 or 32 query rows");
static_assert(kByRequest, "tokens that follow each other lie in pages");

// Warpgroups: for scores (of 16 rows two, which take tiles in turn, so that QK of a tile runs beside the softmax of the tile
// before), two for values with half of the latent columns each, and one whose first warp loads tiles.
constexpr u32 kScoresWarpgroups = kRows == 16 ? 2 : 1;
constexpr bool kTakesTurns = kScoresWarpgroups > 1;
constexpr u32 kValueWarpgroups = 2;
constexpr u32 kThreads = (kScoresWarpgroups + kValueWarpgroups + 1) * kWarpgroupThreads;

// Registers of a thread at entry, which the roles then share out.
constexpr int kEntryRegisters = kTakesTurns ? 96 : 128;
constexpr int kScoresRegisters = kTakesTurns ? 128 : 208;
constexpr int kValuesRegisters = kTakesTurns ? 96 : 136;
constexpr int kLoadersRegisters = 32;
static_assert(kScoresWarpgroups * kScoresRegisters + kValueWarpgroups * kValuesRegisters + kLoadersRegisters ==
                  static_cast<int>(kThreads / kWarpgroupThreads) * kEntryRegisters,
              "no more than there are");

constexpr u32 kItemBarrier = 4;  // named barrier of all scores warpgroups; others: gathered/narrow_rows.h

// Scores and values hold two of them, the others are under way.
constexpr u32 kStages = 4;

// A tile lies in its stage as it is stored, row behind row. A row is 16 bytes longer than a multiple of 128: so the same chunk of
// eight neighbouring rows lies in all banks, and what eight lanes read at once, as below, meets in none.
constexpr u32 kRowBytes = Codec::kRowBytes;
static_assert(kRowBytes % 128 == 16 && Codec::kPageEndBytes == 0, "other rows would meet in the same banks");
static_assert(kLatentBoxes == kCodedBoxes, "values of V are codes");

// Boxes of 64 columns of which a token has one scale.
constexpr u32 kGroupBoxes = kCodedBoxes / Codec::kScales;
constexpr u32 kGroupColumns = kGroupBoxes * kBoxColumns;
static_assert(kGroupBoxes == 2 && Codec::kScales == kQuadLanes, "a lane of four checks a scale of four");

// Where a lane of four has its 16 bytes (codes, or bf16 values) of each row: of those of a group of 128 codes, or of 64 bf16 values,
// two chunks side by side.
MLA_DEVICE u32 lane_chunk(u32 quad_lane, u32 index) { return quad_lane * 2 + index; }

}  // namespace mla
