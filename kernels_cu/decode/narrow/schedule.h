// The narrow kernel's schedule in numbers: roles, buffers, how far it looks ahead. DESIGN.md says why. No register budgets:
// 160 threads leave every thread what it wants, up to 139 at 16 rows (allotted in eights: 144), 237 (240) at 32 rows.
#pragma once
#include "decode/config.h"

namespace mla {

static_assert(kRows == 16 || kRows == 32, "the narrow kernel serves 16 or 32 query rows");

// Warps 0 to 3: consumers; warp 4: producer.
constexpr u32 kConsumerThreads = kWarpgroupThreads;
constexpr u32 kConsumerWarps = kWarpgroupWarps;
constexpr u32 kThreads = kConsumerThreads + kWarpThreads;

// The ring takes the shared memory that is left; less what another CTA takes besides its own: so a CTA of the merge fits
// beside this one, and each of the two kernels can start while the other still runs.
constexpr u32 kSharedBytes = kMaxSharedBytes - kCtaSharedBytes;

constexpr u32 kProbabilityBuffers = 2;  // tiles alternate

// Items of so many tiles at most are asked for into L2 ahead of the wait for the kernel before this one.
constexpr i32 kPrefetchedTiles = 2;

// Named barrier of the consumer warpgroup (all its threads arrive and wait); where it is used says what it orders.
constexpr u32 kConsumerBarrier = 1;

}  // namespace mla
