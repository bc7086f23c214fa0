// The schedule of the kernel for 64 rows of gathered FP8 tokens in numbers: roles, registers, stages. DESIGN.md says why.
#pragma once
#include "codec/codec.h"
#include "decode/wide/output.h"
#include "decode/wide/tile.h"

namespace mla {

static_assert(kRows == 64, "this kernel serves 64 query rows");
static_assert(!kMixesCodecs, "all tokens are stored alike");

// Warpgroup 0: scores; 1 and 2: values; 3: converters, which bring tokens and turn them into fp16.
constexpr u32 kThreads = (2 + kValueWarpgroups) * kWarpgroupThreads;
// At entry every thread has 128 registers; the roles then share the 4 * 128 = 512 out.
constexpr int kScoresRegisters = 96;
constexpr int kValuesRegisters = 160;
constexpr int kConvertersRegisters = 96;
static_assert(kScoresRegisters + kValueWarpgroups * kValuesRegisters + kConvertersRegisters == 512, "no more than there are");

constexpr u32 kStages = 2;  // KV tiles in fp16
constexpr u32 kTileBoxes = kLatentBoxes + kRopeBoxes;
constexpr u32 kBoxSteps = kBoxRowBytes / kStepBytes;
constexpr u32 kSteps = kTileBoxes * kBoxSteps;
// PV of tile t is released when all but this many k16 steps of QK(t + 1) are done, as in the wide kernel.
constexpr u32 kStepsAfterRelease = 8;

// With 512 threads wgmma takes no more than half of a values warpgroup's columns at once.
constexpr u32 kProductColumns = kValueColumns < 128 ? kValueColumns : 128;
constexpr u32 kProducts = kValueColumns / kProductColumns;
constexpr u32 kProductAccumulators = kAccumulators / kProducts;

// Tokens of a k16 step of PV. Each is freed as PV has read it, and the converter warps have equal shares of it.
constexpr u32 kSlabTokens = 16;
constexpr u32 kSlabs = kTileTokens / kSlabTokens;
constexpr u32 kConverterWarps = kWarpgroupWarps;
constexpr u32 kShareTokens = kSlabTokens / kConverterWarps;  // of a slab, of a converter warp
constexpr u32 kWarpTokens = kSlabs * kShareTokens;           // of a tile, of a converter warp

constexpr u32 kScoresBarrier = 1;  // named barrier of the scores warpgroup

}  // namespace mla
