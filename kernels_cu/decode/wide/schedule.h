// The wide kernel's schedule in numbers: roles and their registers, stages, what overlaps what. DESIGN.md says why.
#pragma once
#include "decode/wide/output.h"
#include "source/paged.h"

namespace mla {

constexpr u32 kThreads = (1 + kValueWarpgroups) * kWarpgroupThreads;
// At entry every thread has 168 registers (65536 / 384, in eights); the roles then share the 3 * 168 = 504 out.
constexpr int kScoresRegisters = 184;
constexpr int kValuesRegisters = 160;

constexpr u32 kStages = 3;  // KV tiles in shared memory; the third matters most (DESIGN.md); a fourth does not fit at 576

// K is walked in k16 steps, latent first. As many steps of Q as the registers hold stay there for the whole item; the
// rest lies in shared memory. Measured: 31 fit beside a 64x64 score tile in 184 registers; 32 serialise wgmma (C7512).
constexpr u32 kSteps = (kLatent + kRope) / 16;
constexpr u32 kMaxRegisterSteps = 31;
constexpr u32 kRegisterSteps = kSteps < kMaxRegisterSteps ? kSteps : kMaxRegisterSteps;
constexpr u32 kSharedSteps = kSteps - kRegisterSteps;
// PV of tile t is released when all but this many k16 steps of QK(t + 1) are done: the tensor pipe alternates between
// warpgroups by instruction, and wide PV instructions would starve narrow QK ones. 4 to 20 are good, 0 costs 5%.
constexpr u32 kStepsAfterRelease = kSteps > 20 ? 10 : 4;

// Where a page holds a group of tokens, a copy of a chunk brings all its columns. Else a chunk makes many small copies: a
// warp asks for one in about 40 clocks, so four warps share them. One is enough otherwise, and disturbs the others less.
constexpr bool kCopiesWholeTokens = kGroupTokens == kAtomRows;
constexpr u32 kLoaderWarps = kCopiesWholeTokens ? 1 : kWarpgroupWarps;

// Which kernels have registers for what the others read again or compute with more instructions. Where a tile is one chunk, and
// without what a shard and refined rows need, nothing is spilled.
constexpr bool kHasRegisters = kChunks == 1 && !kSharded && !kRefines;

// Gathered tokens: every values warp brings eight of a tile's, whose rows are one swizzle atom in every box.
constexpr u32 kGatherWarps = kValueWarpgroups * kWarpgroupWarps;
static_assert(kGatherWarps * kAtomRows == kTileTokens, "each values warp has an atom's tokens");

constexpr u32 kScoresBarrier = 1;  // named barrier of the scores warpgroup

}  // namespace mla
