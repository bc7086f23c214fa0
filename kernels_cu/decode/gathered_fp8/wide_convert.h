// The converter warps of the kernel for 64 rows of gathered FP8 tokens: they walk the items tile by tile, ahead of the
// arithmetic and across items, read each token's row into registers, and write it as fp16 once PV has freed its place.
#pragma once
#include "decode/gathered/narrow_work.h"
#include "decode/gathered_fp8/token_unit.h"
#include "decode/gathered_fp8/wide_query.h"
#include "decode/gathered_fp8/wide_smem.h"
#include "ptx/convert.h"
#include "ptx/convert_fp8.h"
#include "ptx/copy_async.h"
#include "ptx/load.h"
#include "source/gathered.h"

namespace mla {

class Converter {
public:
    MLA_DEVICE Converter(const GatherParams& params, const Items& items, u32 smem)
        : params_(params), items_(items), smem_(smem), warp_(threadIdx.x % kWarpgroupThreads / kWarpThreads) {}

    // Rows are read a tile ahead and indices another one: their latency hides behind that of the arithmetic.
    MLA_DEVICE void run() {
        item_ = items_.first();
        TokenRun tokens = open_item();
        if (tokens.left <= 0) return;
        open_tile(read(tokens), tokens.is_extra);
        load_scales();
#pragma unroll
        for (u32 pair = 0; pair < kPairs; ++pair) load_pair(this_lane(), pair, slot_of(this_lane(), pair));
#pragma unroll
        for (i32 pass = 0; pass < kRopePasses; ++pass) load_rope(this_lane(), pass, rope_slot(this_lane(), pass));
        advance(tokens);
        i32 slot = read(tokens);
        bool is_last;
        do {
            is_last = tokens.left <= 0;
            const bool is_extra = tokens.is_extra;  // of `slot`
            advance(tokens);
            const i32 next_slot = read(tokens);
            convert(slot, is_extra);
            prefetch(next_slot, tokens.is_extra);
            slot = next_slot;
        } while (!is_last);
    }

private:
    // The coded values of the latent part of two neighbouring tokens at a time, in pieces of 16: four lanes have 64 bytes of one,
    // the next four of the other, so that eight lanes' stores meet in no bank.
    static constexpr u32 kPieceColumns = 16;
    static constexpr u32 kPairTokens = 2;
    static constexpr u32 kPairs = kWarpTokens / kPairTokens;
    static constexpr u32 kSlabPairs = kShareTokens / kPairTokens;
    static constexpr u32 kLanePieces = kLatent * kPairTokens / kPieceColumns / kWarpThreads;  // of a pair
    static constexpr u32 kPieceStep = kWarpThreads / kPairTokens * kPieceColumns;  // columns from one to the next
    static_assert(kLanePieces == 2 && kLatent == kLanePieces * kPieceStep, "a lane's scales of a pair are a word");
    static_assert(Codec::kCoded >= kLatent && Codec::kUncoded % kBoxColumns == 0, "V is coded");
    static_assert(!Codec::kHasScales || Codec::kCoded / Codec::kScales == kPieceStep / 2, "half of the lanes share a scale");

    // The rope part goes through shared memory, as registers are short, 16 bytes a lane, which the same lane reads again: where
    // it is not coded eight lanes a token, else four.
    static constexpr bool kCodesRope = Codec::kUncoded == 0;
    static constexpr u32 kRopeLanes = kCodesRope ? 4 : 8;
    static constexpr u32 kRopeTokens = kWarpThreads / kRopeLanes;  // at once
    static constexpr i32 kRopePasses = kRopeBoxes * kWarpTokens / kRopeTokens;

    static constexpr i32 kNoSlot = -1;

    // To the next tile: of the list, of the second list of the item that is open, or of the next item; none left: the end.
    MLA_DEVICE void advance(TokenRun& tokens) {
        tokens.next_tile();
        if (tokens.left > 0) return;
        if (kHasExtra && !tokens.is_extra) {
            const BlockWork work = load_block_work(params_, item_ - items_.step());
            const i32 tile = first_list_tiles(work);
            if (tile < work.tile_end) {
                tokens = tokens_from(params_, work, tile);
                return;
            }
        }
        tokens = open_item();
    }

    // The next item that has tiles for this CTA. Its Q is asked for into L2, a hint: the scores warpgroup waits for it between
    // two items.
    MLA_DEVICE TokenRun open_item() {
        const BlockWork work = next_work(params_, items_, item_);
        if (!work.has_tiles()) return {nullptr, 0, true};
#pragma unroll 1
        for (u32 line = warp_ * kWarpThreads + this_lane(); line < kRows * kTileBoxes; line += kConverterWarps * kWarpThreads) {
            const QueryRow row = query_row(params_, work, line / kTileBoxes, 0);
            if (row.exists) prefetch_to_l2(box_of(row, line % kTileBoxes));
        }
        return tokens_from(params_, work, work.tile_begin);
    }

    // Where this warp's i-th token is in the tile.
    MLA_DEVICE u32 token_of(u32 i) const { return i / kShareTokens * kSlabTokens + warp_ * kShareTokens + i % kShareTokens; }

    // The slot of this warp's token `lane`. Indices past the last that counts are not read.
    MLA_DEVICE i32 read(const TokenRun& tokens) const {
        const i32 place = token_of(this_lane());
        if (this_lane() >= kWarpTokens || place >= tokens.left) return kNoSlot;
        if constexpr (kHasBlockTable) return tokens.slot(params_, place);
        return __ldg(tokens.indices + place);
    }

    // The tile whose rows are asked for from here on.
    MLA_DEVICE void open_tile(i32 slot, bool is_extra) {
        const bool is_valid = is_token(params_, slot, is_extra);
        valid_ = __ballot_sync(kFullWarp, is_valid);
        slot_ = is_valid ? slot : kNoSlot;
        is_extra_ = is_extra;
    }

    // Brings the rows of a tile to L2, a tile before they are read: L1, beside this much shared memory, holds few loads on their
    // way, so they must be short. Two lanes a token.
    MLA_DEVICE void prefetch(i32 slot, bool is_extra) const {
        constexpr u32 kLine = 128, kLines = (Codec::kRowBytes + kLine - 1) / kLine, kLaneLines = (kLines + 1) / 2;
        const u32 lane = this_lane();
        const i32 its_slot = __shfl_sync(kFullWarp, slot, lane / 2);
        if (!is_token(params_, its_slot, is_extra)) return;
        const u8* const source = token_address(params_, its_slot, is_extra) + lane % 2 * kLaneLines * kLine;
#pragma unroll
        for (u32 line = 0; line < kLaneLines; ++line) {
            if (lane % 2 * kLaneLines + line < kLines) prefetch_to_l2(source + line * kLine);
        }
    }

    MLA_DEVICE void load_scales() {
        if constexpr (Codec::kHasScales)
            load_global_16b(token_address(params_, slot_, is_extra_) + Codec::kScalesOffset, slot_ != kNoSlot, scales_);
    }

    // Of the token that this lane has pieces of.
    MLA_DEVICE i32 slot_of(u32 lane, u32 pair) const { return __shfl_sync(kFullWarp, slot_, pair * kPairTokens + half_of(lane)); }

    MLA_DEVICE void load_pair(u32 lane, u32 pair, i32 slot) {
        const u8* const source = token_address(params_, slot, is_extra_) + first_column(lane);
#pragma unroll
        for (u32 j = 0; j < kLanePieces; ++j) load_global_16b(source + j * kPieceStep, slot != kNoSlot, codes_[pair][j]);
    }

    MLA_DEVICE i32 rope_slot(u32 lane, i32 pass) const {
        return __shfl_sync(kFullWarp, slot_, pass * kRopeTokens + lane / kRopeLanes);
    }

    MLA_DEVICE void load_rope(u32 lane, i32 pass, i32 slot) {
        const bool exists = slot != kNoSlot;
        const u8* const source = (exists ? token_address(params_, slot, is_extra_) : params_.kv) +
                                 (kCodesRope ? kLatent : Codec::kUncodedOffset) + lane % kRopeLanes * 16;
        copy_async_16b<false>(staged_rope(lane) + pass * kRopeTokens * kBoxRowBytes, source, exists * 16);
    }

    // Which token of a pair a lane has pieces of, and the first column of the first.
    static MLA_DEVICE u32 half_of(u32 lane) { return lane / 4 % 2; }
    static MLA_DEVICE u32 first_column(u32 lane) { return lane / 8 * kBoxColumns + lane % 4 * kPieceColumns; }

    // From where it is each time, or what comes of it is kept from tile to tile, for which no registers are left.
    static MLA_DEVICE u32 this_lane() {
        u32 lane = threadIdx.x % kWarpThreads;
        pin_register(lane);
        return lane;
    }

    // Where a lane's chunk of its first token's rope part waits.
    MLA_DEVICE u32 staged_rope(u32 lane) const {
        return smem_ + Smem::rope + (warp_ * kWarpTokens + lane / kRopeLanes) * kBoxRowBytes + lane % kRopeLanes * 16;
    }

    // Writes what has been read to the stage at ring_, a slab at a time as PV frees it, and asks for the next tile's in its place.
    MLA_DEVICE void convert(i32 next_slot, bool next_is_extra) {
        const bool has_units = prepare_scales();
        const u32 marks = valid_ | (has_units ? kHasUnits : 0);
        open_tile(next_slot, next_is_extra);
        load_scales();
        const u32 lane = this_lane();
        const u32 stage = stage_address(smem_, ring_.stage);
        const u32 token = token_of(half_of(lane));
        const u32 place = stage + latent_row(token, lane / 8) + ((lane % 4 * 2 ^ token % kAtomRows) << 4);
        u32 scales[kScalePairs];
#pragma unroll
        for (u32 slab = 0; slab < kSlabs; ++slab) {
            // Ahead of the stores, behind which they would wait.
            if (slab * kSlabPairs % kScalePairs == 0) load_lane_scales(lane, slab * kSlabPairs, scales);
            i32 slots[kSlabPairs];
#pragma unroll
            for (u32 pair = 0; pair < kSlabPairs; ++pair) slots[pair] = slot_of(lane, slab * kSlabPairs + pair);
            mbarrier_wait(slab_empty(smem_, ring_.stage, slab), ring_.parity ^ 1);  // passes at once in the first lap
#pragma unroll
            for (u32 in_slab = 0; in_slab < kSlabPairs; ++in_slab) {
                const u32 pair = slab * kSlabPairs + in_slab;
                convert_pair(pair, scales[pair % kScalePairs], place + slab * (kSlabTokens / kAtomRows * kLatentGroupBytes), in_slab);
                load_pair(lane, pair, slots[in_slab]);
            }
        }
        // With the last slab everything else of the stage is free, too.
        if (Codec::kHasScales && lane < kWarpTokens)
            store_shared_f32(smem_ + Smem::units + (ring_.stage * kTileTokens + token_of(lane)) * sizeof(f32), unit_);
        if (lane == 0)
            store_shared_u32(smem_ + Smem::marks + (ring_.stage * kConverterWarps + warp_) * sizeof(u32), marks);
        if (kRopeBoxes > 0) copy_async_wait();
        const u32 rope_token = token_of(lane / kRopeLanes);
        const u32 rope_chunk = lane % kRopeLanes * (8 / kRopeLanes);
        const u32 rope_place = stage + kStageRope + rope_token * kBoxRowBytes + ((rope_chunk ^ rope_token % kAtomRows) << 4);
#pragma unroll
        for (i32 pass = 0; pass < kRopePasses; ++pass) {
            const i32 slot = rope_slot(lane, pass);
            convert_rope(pass, lane, has_units, rope_place);
            load_rope(lane, pass, slot);
        }
        mbarrier_arrive(tile_full(smem_, ring_.stage));
        ring_.advance();
    }

    // Units of this warp's tokens, and their scales over them to shared memory as pairs of fp16. Whether any unit is not 1.
    MLA_DEVICE bool prepare_scales() {
        if constexpr (Codec::kHasScales) {
            f32 scales[Codec::kScales];
#pragma unroll
            for (u32 i = 0; i < Codec::kScales; ++i) scales[i] = __uint_as_float(scales_[i]);
            const f32 inverse = take_unit(scales, unit_);
            __syncwarp();  // all have read those of the tile before
            if (this_lane() < kWarpTokens) {
#pragma unroll
                for (u32 i = 0; i < 2; ++i)
                    store_shared_u32(lane_scales(this_lane() % 2, i) + this_lane() / 2 * sizeof(u32),
                                     pack2<Fp16>(scales[i] * inverse, scales[2 + i] * inverse));
            }
            __syncwarp();
            return __any_sync(kFullWarp, unit_ != 1.0f);
        }
        return false;
    }

    // Of the first or second token of each pair, a word of the two scales that the lanes below 16, or the others, need of it.
    MLA_DEVICE u32 lane_scales(u32 half, u32 upper_lanes) const {
        return smem_ + Smem::scales + ((warp_ * kPairTokens + half) * 2 + upper_lanes) * kPairs * sizeof(u32);
    }

    // Of so many pairs from `first` on.
    static constexpr u32 kScalePairs = 4;
    MLA_DEVICE void load_lane_scales(u32 lane, u32 first, u32 (&scales)[kScalePairs]) const {
        if constexpr (Codec::kHasScales)
            load_shared_words(lane_scales(half_of(lane), lane / 16) + first * sizeof(u32), scales);
    }

    // 16 coded values as fp16 to a chunk and its neighbour.
    static MLA_DEVICE void store_piece(u32 place, const u32 (&codes)[4], u32 scale) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u32 words[4];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                words[i * 2] = scaled(e4m3_pair_low(codes[half * 2 + i]), scale);
                words[i * 2 + 1] = scaled(e4m3_pair_high(codes[half * 2 + i]), scale);
            }
            store_shared_16b(place ^ half << 4, uint4{words[0], words[1], words[2], words[3]});
        }
    }

    static MLA_DEVICE u32 scaled(u32 pair, u32 scale) { return Codec::kHasScales ? multiply_fp16_pairs(pair, scale) : pair; }

    // `place`: of the slab's first pair. Rows of the second are two further, so its chunks are others.
    MLA_DEVICE void convert_pair(u32 pair, u32 scales, u32 place, u32 in_slab) const {
        const u32 row = in_slab * kPairTokens;
#pragma unroll
        for (u32 j = 0; j < kLanePieces; ++j)
            store_piece((place ^ row << 4) + row * kBoxRowBytes + j * (kPieceStep / kBoxColumns) * kSwizzleAtomBytes,
                        codes_[pair][j], pair_of_half(scales, j));
    }

    MLA_DEVICE void convert_rope(i32 pass, u32 lane, bool has_units, u32 place) const {
        const u32 slab_offset = pass * kRopeTokens / kShareTokens * kSlabTokens * kBoxRowBytes;
        u32 words[4];
        load_shared_words(staged_rope(lane) + pass * kRopeTokens * kBoxRowBytes, words);
        if constexpr (kCodesRope) {
            store_piece(place + slab_offset, words, 0);
        } else {
            if (has_units) {
                const f32 inverse = 1.0f / __shfl_sync(kFullWarp, unit_, pass * kRopeTokens + lane / kRopeLanes);
#pragma unroll
                for (u32 word = 0; word < 4; ++word) {
                    f32 first, second;
                    unpack2<Bf16>(words[word], first, second);
                    words[word] = pack2<Bf16>(first * inverse, second * inverse);
                }
            }
            store_shared_16b(place + slab_offset, uint4{words[0], words[1], words[2], words[3]});
        }
    }

    const GatherParams& params_;
    const Items& items_;
    u32 smem_, warp_;
    i32 item_;  // the one after the item that is open
    RingPosition ring_;
    // Of the tile that is on its way: bits of this warp's tokens, scales of token `lane`, what this lane has of the rows.
    u32 valid_;
    i32 slot_;       // of token `lane`
    bool is_extra_;  // whether the tile is of the second cache
    u32 scales_[4];
    u32 codes_[kPairs][kLanePieces][4];
    f32 unit_ = 1.0f;
};

}  // namespace mla
