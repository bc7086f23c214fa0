// The schedule of the kernel for e4m3 caches in numbers: roles, registers, buffers. DESIGN.md says why.
#pragma once
#include "decode/config.h"

namespace mla {

static_assert(kRows == 16 || kRows == 32, "the fp8 kernel serves 16 or 32 query rows");

// How Q K^T is computed. Split: on fp8 tensor cores, q as the sum of a high and a low e4m3 part. Exact: on fp16 tensor cores,
// K converted in registers. The split kernel falls back to exact for blocks of queries with outliers (query.h).
constexpr bool kSplitQuery = MLA_SPLIT_QUERY;

// Warpgroup 0: scores. 1 and 2: values, half of the latent columns each. 3: its first warp loads tiles.
constexpr u32 kScoresWarps = kWarpgroupWarps;
constexpr u32 kValueWarpgroups = 2;
constexpr u32 kThreads = (1 + kValueWarpgroups + 1) * kWarpgroupThreads;
// At entry every thread has 128 registers; the roles share the 512 out.
constexpr int kScoresRegisters = kRows == 16 ? 152 : 200;
constexpr int kValuesRegisters = kRows == 16 ? 160 : 144;
constexpr int kLoaderRegisters = kRows == 16 ? 40 : 24;

constexpr u32 kStages = 5;  // scores and values hold two; TMA needs three under way to keep HBM busy
constexpr u32 kProbabilityBuffers = kRows == 16 ? 4 : 2;

// Partial sums of Q K^T leave the fp8 tensor cores after so many k32 steps of 18: more lose bits, fewer cost time.
constexpr u32 kPromotionSteps = 3;

constexpr u32 kScoresBarrier = 1;  // named barrier of the scores warpgroup

}  // namespace mla
