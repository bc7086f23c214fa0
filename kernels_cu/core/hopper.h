// What a Hopper GPU allows, and how its threads are grouped; cupy_mla/gpu/hopper.py has the same limits.
#pragma once
#include "core/types.h"

namespace mla {

constexpr i32 kWarpThreads = 32;
constexpr i32 kWarpgroupThreads = 128;
constexpr i32 kWarpgroupWarps = kWarpgroupThreads / kWarpThreads;
constexpr u32 kFullWarp = 0xffffffffu;  // all lanes of a warp, for shuffles and votes

constexpr i32 kMaxSms = 160;  // of a GPU, where there is a bit for each SM; a full GH100 has 144

constexpr u32 kMaxSharedBytes = 232448;  // dynamic shared memory that a CTA can opt in to
constexpr u32 kCtaSharedBytes = 1024;    // that every CTA takes besides its own

}  // namespace mla
