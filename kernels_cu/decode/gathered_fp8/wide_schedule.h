// The schedule of the kernel for 64 rows of gathered FP8 tokens in numbers: roles, registers, stages. DESIGN.md says why.
#pragma once
#include "codec/codec.h"
#include "decode/wide/output.h"
#include "decode/wide/tile.h"

namespace mla {

static_assert(kRows == 64, "this kernel serves 64 query rows");

// Warpgroup 0: scores; 1 and 2: values; 3: converters, which bring tokens and turn them into fp16.
constexpr u32 kThreads = (2 + kValueWarpgroups) * kWarpgroupThreads;
// At entry every thread has 128 registers; the roles then share the 4 * 128 = 512 out.
constexpr int kValuesRegisters = 160;
constexpr bool kCodesRope = kRope > 0 && Codec::kUncoded == 0;  // converters that have more to do have more registers
constexpr int kConvertersRegisters = kUncodedIsValue || kMixesCodecs || kCodesRope ? 112 : 104;
constexpr int kScoresRegisters = 512 - kValueWarpgroups * kValuesRegisters - kConvertersRegisters;

constexpr u32 kStages = 2;  // KV tiles in fp16
constexpr u32 kTileBoxes = kLatentBoxes + kRopeBoxes;
// The converters have codes of the latent part in registers; what else there is goes through shared memory.
constexpr u32 kPieceBoxes = kCodedBoxes < kLatentBoxes ? kCodedBoxes : kLatentBoxes;
constexpr u32 kStagedBoxes = kTileBoxes - kPieceBoxes;
static_assert(kStagedBoxes <= 1, "it is a box at most");
// V, and whatever is coded, becomes fp16; what is left stays bf16.
constexpr u32 kFp16Boxes = kUncodedIsValue ? kTileBoxes : kCodedBoxes;
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

// What a converter has of two neighbouring tokens: two pieces of 16 columns, so many columns apart.
constexpr u32 kPieceColumns = 16;
constexpr u32 kPairTokens = 2;
constexpr u32 kLanePieces = kLatent * kPairTokens / kPieceColumns / kWarpThreads;
constexpr u32 kPieceStep = kWarpThreads / kPairTokens * kPieceColumns;
// Neighbouring columns that share a scale, and a token's scales as pairs, which are of the two pieces of a lane.
template <class C>
constexpr u32 kColumnsPerScale = C::kCoded / C::kScales;
template <class C>
constexpr u32 kScalePairs = C::kHasScales ? kPieceStep / kColumnsPerScale<C> : 0;
constexpr u32 kMostScalePairs = kScalePairs<Codec> > kScalePairs<ExtraCodec> ? kScalePairs<Codec> : kScalePairs<ExtraCodec>;

constexpr u32 kScoresBarrier = 1;  // named barrier of the scores warpgroup

}  // namespace mla
