// Which lane of a converter warp has what of a token, in the kernel for 64 rows of gathered FP8 tokens.
#pragma once
#include "decode/gathered_fp8/wide_smem.h"
#include "ptx/warp.h"

namespace mla {

// From where it is each time, or what comes of it is kept from tile to tile, for which no registers are left.
MLA_DEVICE u32 this_lane() {
    u32 lane = threadIdx.x % kWarpThreads;
    pin_register(lane);
    return lane;
}

// Where a warp's i-th token is in the tile.
MLA_DEVICE u32 token_of(u32 warp, u32 i) { return i / kShareTokens * kSlabTokens + warp * kShareTokens + i % kShareTokens; }

// Codes of the latent part of two neighbouring tokens at a time, in pieces of 16: four lanes have a box's of one, the next four
// those of the other, so that eight lanes' stores meet in no bank.
constexpr u32 kPairs = kWarpTokens / kPairTokens;
constexpr u32 kSlabPairs = kShareTokens / kPairTokens;
static_assert(kLanePieces == 2 && kLatent == kLanePieces * kPieceStep, "a lane's scales of a pair are a word");

constexpr u32 kPieceChunks = 2;  // of 16 bytes, in fp16

MLA_DEVICE u32 half_of(u32 lane) { return lane / 4 % 2; }  // which token of a pair
MLA_DEVICE u32 first_column(u32 lane) { return lane / 8 * kBoxColumns + lane % 4 * kPieceColumns; }
MLA_DEVICE bool has_piece(u32 lane, u32 piece) {
    return kPieceBoxes == kLatentBoxes || lane / 8 + piece * (kPieceStep / kBoxColumns) < kPieceBoxes;
}

// The box that goes through shared memory, as registers are short, 16 bytes a lane, which the same lane reads again: where it is
// not coded eight lanes a token, else four.
constexpr bool kStagesCodes = Codec::kUncoded == 0;
constexpr u32 kStagedLanes = kStagesCodes ? 4 : 8;
constexpr u32 kStagedTokens = kWarpThreads / kStagedLanes;  // at once
constexpr i32 kStagedPasses = kStagedBoxes * kWarpTokens / kStagedTokens;
static_assert(!kUncodedIsValue || (kStagedTokens == kShareTokens && kPieceBoxes + 1 == kLatentBoxes), "a pass is a slab's, of a box");

// Where a lane's chunk waits. A pass after another is kStagedTokens rows further.
MLA_DEVICE u32 staged_chunk(u32 smem, u32 warp, u32 lane, u32 pass) {
    return smem + Smem::staged + (warp * kWarpTokens + lane / kStagedLanes) * kBoxRowBytes + lane % kStagedLanes * 16 +
           pass * kStagedTokens * kBoxRowBytes;
}

}  // namespace mla
