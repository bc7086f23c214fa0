// What a Hopper SM has to give, and how its threads are grouped.
#pragma once
#include "core/types.h"

namespace mla {

constexpr u32 kWarpThreads = 32;
constexpr u32 kWarpgroupThreads = 128;
constexpr u32 kWarpgroupWarps = kWarpgroupThreads / kWarpThreads;
constexpr u32 kFullWarp = 0xffffffffu;  // all lanes of a warp, for shuffles and votes

constexpr u32 kMaxSharedBytes = 232448;  // dynamic shared memory that a CTA can opt in to
constexpr u32 kCtaSharedBytes = 1024;    // that every CTA takes besides its own

}  // namespace mla
