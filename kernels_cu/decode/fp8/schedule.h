// The schedules of the kernels for e4m3 caches in numbers: roles, registers, buffers. DESIGN.md says why.
#pragma once
#include "decode/config.h"

namespace mla {

static_assert(kRows == 16 || kRows == 32 || kRows == 64, "16 or 32 query rows: fp8.cu; 64: wide.cu, wide_exact.cu");
constexpr bool kWide = kRows == 64;

// How Q K^T is computed. Split: on fp8 tensor cores, q as the sum of a high and a low e4m3 part, or as the high part alone,
// which is q rounded to e4m3. Exact: on fp16 tensor cores, K converted in registers. The split kernels fall back to exact for
// blocks of queries with outliers (query.h).
constexpr bool kSplitQuery = MLA_SPLIT_QUERY;
constexpr u32 kQueryParts = MLA_QUERY_PARTS;
constexpr bool kSwapped = !kWide || !kSplitQuery;  // S^T = K Q^T: a scores warp has tokens of all rows, else rows of all tokens

// Latent and rope part of the cache may have a scale each. Q's rope columns are multiplied by the ratio of the two, which fp16
// rounds unless it is a power of two. A kernel of its own multiplies the rope columns' sums instead: its other order of
// instructions costs 2 to 4%.
#ifdef MLA_TWO_SCALES
constexpr bool kRopeApart = true;
static_assert(!kSplitQuery && kRope > 0, "only where all is exact");
#else
constexpr bool kRopeApart = false;
#endif

// Warpgroup 0 (or 0 and 1, which take tiles in turn): scores. The next two: values, half of the latent columns each. The last one:
// its first warp loads tiles.
constexpr u32 kScoresWarpgroups = MLA_SCORES_WARPGROUPS;
constexpr bool kTakesTurns = kScoresWarpgroups > 1;
static_assert(!kTakesTurns || (kRows == 16 && !kSplitQuery), "where Q K^T of a tile takes longer than HBM to bring it");
constexpr u32 kScoresWarps = kWarpgroupWarps;  // of a warpgroup
constexpr u32 kValueWarpgroups = 2;
constexpr u32 kThreads = (kScoresWarpgroups + kValueWarpgroups + 1) * kWarpgroupThreads;
// Registers of a thread at entry, which the roles share out. With 16 rows a CTA of the merge, 128 threads, fits beside.
constexpr int kEntryRegisters = kTakesTurns ? 96 : kRows == 16 ? 104 : 128;
constexpr bool kManyAccumulators = kWide && kLatent > 256;  // a values thread has 128 of them, the others 64 and fewer
constexpr int kScoresRegisters = kTakesTurns ? 128 : kManyAccumulators ? 136 : kRows == 16 ? 152 : 200;
constexpr int kValuesRegisters = kTakesTurns ? 96 : kManyAccumulators ? 176 : kRows == 16 ? 112 : 144;
constexpr int kLoaderRegisters = kTakesTurns ? 32 : kRows == 16 ? 40 : 24;
static_assert(kScoresWarpgroups * kScoresRegisters + kValueWarpgroups * kValuesRegisters + kLoaderRegisters <=
                  static_cast<int>(kThreads / kWarpgroupThreads) * kEntryRegisters,
              "no more than there are");
// The kernel of short calls: what these wait for is the chain from the query and the first tile to the result.
constexpr bool kIsShort = kRows == 16 && !kSplitQuery && !kTakesTurns;
// Where the merge fits beside, its CTAs come, and ask for the plan, when the first queries are made: before, they hold these up. Of
// short calls, which it takes longer than, when the loader has asked for the first tile.
constexpr bool kLaunchesLate = kRows == 16 && !kTakesTurns;
constexpr bool kLaunchesFromLoader = kIsShort;

// Scores and values hold two stages. At few rows TMA needs three more under way to keep HBM busy; at 64 Q takes their room.
constexpr u32 kStages = !kWide ? 5 : kQueryParts == 1 ? 4 : 3;
constexpr u32 kProbabilityBuffers = kRows == 16 && !kTakesTurns ? 4 : 2;
// Of an item's sums, and of what one scores warpgroup hands to the other: who has the next item's may be an item ahead.
constexpr u32 kSumsPlaces = kTakesTurns ? 2 : 1;
constexpr u32 kHandedValues = kScoresWarps + 1;
constexpr u32 kRowLanes = 4;  // of a warp: they have all rows
// A tile comes in so many parts, each with some of the latent columns (the last one with the rope columns, too): Q K^T begins with the
// first. In long calls tiles are there before they are needed.
constexpr u32 kTileParts = kIsShort ? 2 : 1;
// Whether queries are written as they are, before it is known whether fp16 holds them so: few have need of a power of two.
constexpr bool kWritesPlain = kIsShort;
constexpr u32 kMovedWords = kSwapped ? 1 : kScoresWarps;  // of each P: who says that factors are not 1

// Partial sums of Q K^T leave the fp8 tensor cores after so many k32 steps of 18: more lose bits, fewer cost time.
constexpr u32 kPromotionSteps = kWide ? 6 : 3;

constexpr u32 kScoresBarrier = 1;  // named barrier of the scores warpgroup
constexpr u32 kQueryBarrier = 2;   // of all that make a first item's queries
constexpr u32 kSecondScoresBarrier = 3;
constexpr u32 kItemBarrier = 4;    // of all scores warpgroups

}  // namespace mla
