// The schedule of the wide prefill kernel in numbers: roles and their registers, stages, what overlaps what. DESIGN.md says why.
#pragma once
#include "decode/gathered/work.h"
#include "decode/wide/output.h"
#include "decode/wide/tile.h"

namespace mla {

static_assert(kRows == 64 && !kIsPlanned && kRopeBoxes == 0, "this kernel serves 64 query rows without a plan, all columns latent");

// Warpgroup 0: scores; 1 and 2: values; 3: loaders.
constexpr u32 kThreads = (2 + kValueWarpgroups) * kWarpgroupThreads;
// At entry every thread has 128 registers; the roles then share the 4 * 128 = 512 out. O of half the latent columns leaves some to
// the loaders.
constexpr int kScoresRegisters = 168;
constexpr int kValuesRegisters = kLatent > 256 ? 160 : 128;
constexpr int kLoadersRegisters = kLatent > 256 ? 24 : 88;
static_assert(kScoresRegisters + kValueWarpgroups * kValuesRegisters + kLoadersRegisters == 512, "no more than there are");

constexpr u32 kStages = 3;  // of tiles in shared memory

// K is walked in k16 steps. As many steps of Q as the registers hold stay there for the whole item; the rest lies in shared memory.
constexpr u32 kBoxSteps = kBoxRowBytes / kStepBytes;
constexpr u32 kSteps = kLatentBoxes * kBoxSteps;
constexpr u32 kMaxRegisterSteps = 27;
constexpr u32 kRegisterSteps = kSteps < kMaxRegisterSteps ? kSteps : kMaxRegisterSteps;
constexpr u32 kSharedSteps = kSteps - kRegisterSteps;
// PV of tile t is released when all but this many k16 steps of QK(t + 1) are done, as in the wide kernel.
constexpr u32 kStepsAfterRelease = kSteps > 16 ? 10 : 4;

// With 512 threads wgmma takes no more than half of a values warpgroup's columns at once.
constexpr u32 kProductColumns = kValueColumns < 128 ? kValueColumns : 128;
constexpr u32 kProducts = kValueColumns / kProductColumns;
constexpr u32 kProductAccumulators = kAccumulators / kProducts;

constexpr u32 kLoaderWarps = kWarpgroupWarps;
constexpr u32 kLoaderTokens = kTileTokens / kLoaderWarps;  // of a tile, that a loader warp brings

constexpr u32 kScoresBarrier = 1;  // named barrier of the scores warpgroup

}  // namespace mla
