// Which lane of a converter warp has what of a token, in the kernel for 64 rows of gathered FP8 tokens.
#pragma once
#include "decode/gathered_fp8/wide_smem.h"
#include "ptx/convert_fp8.h"
#include "ptx/load.h"
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

// Values without codes, the last box of V, eight lanes a token, 16 bytes each, in registers; a pass is a slab's.
constexpr u32 kRestLanes = 8;
constexpr u32 kRestTokens = kWarpThreads / kRestLanes;  // at once
constexpr u32 kRestPasses = kRestBoxes * kWarpTokens / kRestTokens;
static_assert(kRestTokens == kShareTokens, "a pass is a slab's");
using Rest = u32[kRestPasses > 0 ? kRestPasses : 1][4];

// The rope part goes through shared memory, as registers are short, 16 bytes a lane, which the same lane reads again: where it is
// not coded eight lanes a token, else four.
constexpr bool kStagesCodes = Codec::kUncoded == 0;
constexpr u32 kStagedLanes = kStagesCodes ? 4 : 8;
constexpr u32 kStagedTokens = kWarpThreads / kStagedLanes;  // at once
constexpr i32 kStagedPasses = kStagedBoxes * kWarpTokens / kStagedTokens;

// Where a lane's chunk waits. A pass after another is kStagedTokens rows further.
MLA_DEVICE u32 staged_chunk(u32 smem, u32 warp, u32 lane, u32 pass) {
    return smem + Smem::staged + (warp * kWarpTokens + lane / kStagedLanes) * kBoxRowBytes + lane % kStagedLanes * 16 +
           pass * kStagedTokens * kBoxRowBytes;
}

// Where a converter warp's tokens have the addresses of their rows: those of the first tokens of the pairs, one behind the other,
// then those of the second.
MLA_DEVICE u32 row_place(u32 smem, u32 warp, u32 token) {
    const u32 place = token % kPairTokens * kPairs + token / kPairTokens;
    return smem + Smem::rows + (warp * kWarpTokens + place) * sizeof(u64);
}

// Where its tokens have the word of their scales `word` and `word` + kScalePairs: first those of the first token of each pair. A
// warp's share is where it is whatever the codec: another warp may still be in the tile before, of the other codec.
template <class C>
MLA_DEVICE u32 scale_place(u32 smem, u32 warp, u32 half, u32 word) {
    const u32 share = smem + Smem::scales + warp * kWarpTokens * Smem::scale_bytes;
    return share + (half * kScalePairs<C> + word) * kPairs * sizeof(u32);
}

// 16 coded values as fp16.
using Piece = u32[kPieceChunks][4];

template <class C>
MLA_DEVICE void convert_piece(const u32 (&codes)[C::kLaneWords], u32 scale, Piece& piece) {
#pragma unroll
    for (u32 i = 0; i < kPieceChunks * 2; ++i) {
        u32 pairs[2];
        C::pairs(codes, i, pairs);
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
            u32& word = piece[i / 2][i % 2 * 2 + j];
            word = C::kHasScales ? multiply_fp16_pairs(pairs[j], scale) : pairs[j];
        }
    }
}

// To a chunk and its neighbour.
MLA_DEVICE void store_piece(bool exists, u32 place, u32 offset, const Piece& piece) {
#pragma unroll
    for (u32 half = 0; half < kPieceChunks; ++half)
        store_shared_16b_if(exists, (place ^ half << 4) + offset,
                            uint4{piece[half][0], piece[half][1], piece[half][2], piece[half][3]});
}

// What a lane has of a pair of tokens.
struct PairCodes {
    static constexpr u64 kNoRow = 0;

    template <class C>
    MLA_DEVICE u32 (&of(u32 piece))[C::kLaneWords] {
        return reinterpret_cast<u32(&)[C::kLaneWords]>(words[piece]);
    }

    // Asks for it. `row`: of the token that this lane has pieces of.
    template <class C>
    MLA_DEVICE void load(u32 lane, u64 row) {
        constexpr u32 kColumnsPerWord = kPieceColumns / C::kLaneWords, kWordBytes = sizeof(u32);
        const u8* const source = reinterpret_cast<const u8*>(row) + first_column(lane) / kColumnsPerWord * kWordBytes;
#pragma unroll
        for (u32 j = 0; j < kLanePieces; ++j) {
            const bool exists = row != kNoRow && has_piece(lane, j);
            const u8* const piece = source + j * (kPieceStep / kColumnsPerWord * kWordBytes);
            if constexpr (C::kLaneWords == 2)
                load_global_8b(piece, exists, of<C>(j), 0);
            else
                load_global_16b(piece, exists, of<C>(j));
        }
    }

    // Writes it as fp16 from `place` on, the chunk of its first piece; `scales` are the lane's, a half for each piece.
    template <class C>
    MLA_DEVICE void store(u32 lane, u32 scales, u32 place, u32 offset) {
        // All is converted before any is stored: a register of what is being stored is long in use.
        Piece pieces[kLanePieces];
#pragma unroll
        for (u32 j = 0; j < kLanePieces; ++j) convert_piece<C>(of<C>(j), pair_of_half(scales, j), pieces[j]);
#pragma unroll
        for (u32 j = 0; j < kLanePieces; ++j) {
#pragma unroll
            for (u32 i = 0; i < kPieceChunks * 4; ++i) pin_register(pieces[j][i / 4][i % 4]);
        }
#pragma unroll
        for (u32 j = 0; j < kLanePieces; ++j)
            store_piece(has_piece(lane, j), place, offset + j * (kPieceStep / kBoxColumns) * kSwizzleAtomBytes, pieces[j]);
    }

    u32 words[kLanePieces][4];
};

constexpr u32 kSlabBytes = kSlabTokens / kAtomRows * kLatentGroupBytes;  // of V in a stage

// Where a lane's first piece of a token goes in the stage.
MLA_DEVICE u32 piece_place(u32 stage, u32 token, u32 lane) {
    return stage + latent_row(token, lane / 8) + ((lane % 4 * kPieceChunks ^ token % kAtomRows) << 4);
}

}  // namespace mla
