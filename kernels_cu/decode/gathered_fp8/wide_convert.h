// The converter warps of the kernel for 64 rows of gathered FP8 tokens: they walk the items tile by tile, ahead of the
// arithmetic and across items, read each token's row into registers, and write it as fp16 once PV has freed its place.
#pragma once
#include "decode/gathered/narrow_work.h"
#include "decode/gathered_fp8/token_unit.h"
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
        for (u32 load = 0; load < kLoads; ++load) load_codes(this_lane(), load);
#pragma unroll
        for (i32 pass = 0; pass < kRopePasses; ++pass) load_rope(this_lane(), pass);
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
    // The coded values of a token's latent part, 16 a lane: a load of the warp is of neighbouring bytes. Lanes of every other box
    // store the second of their two chunks first, so that eight lanes' stores meet in no bank.
    static constexpr u32 kPieceColumns = 16;
    static constexpr u32 kTokenLanes = kLatent / kPieceColumns;
    static constexpr u32 kLoadTokens = kWarpThreads / kTokenLanes;
    static constexpr u32 kSlabLoads = kShareTokens / kLoadTokens;
    static constexpr u32 kLoads = kSlabs * kSlabLoads;
    static_assert(kWarpThreads % kTokenLanes == 0 && kShareTokens % kLoadTokens == 0, "a load is of whole tokens of a slab");
    static_assert(Codec::kCoded >= kLatent && Codec::kUncoded % kBoxColumns == 0, "V is coded");
    static constexpr u32 kScaleColumns = Codec::kCoded / Codec::kScales;

    // The rope part goes through shared memory, as registers are short, 16 bytes a lane, which the same lane reads again: where
    // it is not coded eight lanes a token, else four.
    static constexpr bool kCodesRope = Codec::kUncoded == 0;
    static constexpr u32 kRopeLanes = kCodesRope ? 4 : 8;
    static constexpr u32 kRopeTokens = kWarpThreads / kRopeLanes;  // at once
    static constexpr i32 kRopePasses = kRopeBoxes * kWarpTokens / kRopeTokens;

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
            if (row.exists) prefetch_to_l2(row.latent + line % kTileBoxes * kBoxColumns);
        }
        return tokens_from(params_, work, work.tile_begin);
    }

    // Where this warp's i-th token is in the tile.
    MLA_DEVICE u32 token_of(u32 i) const { return i / kShareTokens * kSlabTokens + warp_ * kShareTokens + i % kShareTokens; }

    // The slot of this warp's token `lane`. Indices past the last that counts are not read.
    MLA_DEVICE i32 read(const TokenRun& tokens) const {
        const i32 place = token_of(this_lane());
        return this_lane() < kWarpTokens && place < tokens.left ? __ldg(tokens.indices + place) : -1;
    }

    // The tile whose rows are asked for from here on.
    MLA_DEVICE void open_tile(i32 slot, bool is_extra) {
        const bool is_valid = is_token(params_, slot, is_extra);
        valid_ = __ballot_sync(kFullWarp, is_valid);
        row_ = is_valid ? token_address(params_, slot, is_extra) : params_.kv;
    }

    // Brings the rows of a tile to L2, a tile before they are read: L1, beside this much shared memory, holds few loads on their
    // way, so they must be short. Two lanes a token.
    MLA_DEVICE void prefetch(i32 slot, bool is_extra) const {
        constexpr u32 kLine = 128, kLines = (Codec::kRowBytes + kLine - 1) / kLine, kLaneLines = (kLines + 1) / 2;
        const u32 lane = this_lane();
        const bool is_valid = is_token(params_, slot, is_extra);
        const u8* const row = is_valid ? token_address(params_, slot, is_extra) : nullptr;
        const u8* const source = shuffled(row, lane / 2) + lane % 2 * kLaneLines * kLine;
        if (!__shfl_sync(kFullWarp, is_valid, lane / 2)) return;
#pragma unroll
        for (u32 line = 0; line < kLaneLines; ++line) {
            if (lane % 2 * kLaneLines + line < kLines) prefetch_to_l2(source + line * kLine);
        }
    }

    MLA_DEVICE void load_scales() {
        if constexpr (Codec::kHasScales) load_global_16b(row_ + Codec::kScalesOffset, valid_ >> this_lane() & 1, scales_);
    }

    MLA_DEVICE void load_codes(u32 lane, u32 load) {
        const u32 i = load * kLoadTokens + lane / kTokenLanes;
        load_global_16b(address_of(i) + lane % kTokenLanes * kPieceColumns, valid_ >> i & 1, codes_[load]);
    }

    MLA_DEVICE void load_rope(u32 lane, i32 pass) {
        const u32 i = pass * kRopeTokens + lane / kRopeLanes;
        const u8* const source = address_of(i) + (kCodesRope ? kLatent : Codec::kUncodedOffset) + lane % kRopeLanes * 16;
        copy_async_16b<false>(staged_rope(lane) + pass * kRopeTokens * kBoxRowBytes, source, (valid_ >> i & 1) * 16);
    }

    MLA_DEVICE const u8* address_of(u32 i) const { return shuffled(row_, i); }

    static MLA_DEVICE const u8* shuffled(const u8* address, u32 lane) {
        return reinterpret_cast<const u8*>(__shfl_sync(kFullWarp, reinterpret_cast<u64>(address), lane));
    }

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
        const u32 piece = lane % kTokenLanes, token = token_of(lane / kTokenLanes);
        const bool is_swapped = piece / 4 % 2;
        const u32 place =
            stage + latent_row(token, piece / 4) + ((piece % 4 * 2 + is_swapped ^ token % kAtomRows) << 4);
        const u32 scales = scales_of(lane / kTokenLanes) + piece * kPieceColumns / kScaleColumns * sizeof(u32);
#pragma unroll
        for (u32 slab = 0; slab < kSlabs; ++slab) {
            mbarrier_wait(slab_empty(smem_, ring_.stage, slab), ring_.parity ^ 1);  // passes at once in the first lap
#pragma unroll
            for (u32 load = 0; load < kSlabLoads; ++load) {
                convert_codes(slab, load, is_swapped, place + slab * (kSlabTokens / kAtomRows * kLatentGroupBytes), scales);
                load_codes(lane, slab * kSlabLoads + load);
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
            convert_rope(pass, lane, has_units, rope_place);
            load_rope(lane, pass);
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
#pragma unroll
            for (u32 i = 0; i < Codec::kScales; ++i) {
                if (this_lane() < kWarpTokens)
                    store_shared_u32(scales_of(this_lane()) + i * sizeof(u32), pack2<Fp16>(scales[i] * inverse, scales[i] * inverse));
            }
            __syncwarp();
            return __any_sync(kFullWarp, unit_ != 1.0f);
        }
        return false;
    }

    MLA_DEVICE u32 scales_of(u32 i) const { return smem_ + Smem::scales + (warp_ * kWarpTokens + i) * Smem::scale_bytes; }

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

    // `place`: of the slab's first load. Rows of the others are further, so their chunks are others.
    MLA_DEVICE void convert_codes(u32 slab, u32 in_slab, bool is_swapped, u32 place, u32 scales) const {
        const u32 load = slab * kSlabLoads + in_slab;
        u32 scale = 0;
        if (Codec::kHasScales) scale = load_shared_u32(scales + load * kLoadTokens * Smem::scale_bytes);
        const u32(&codes)[4] = codes_[load];
        const u32 ordered[4] = {is_swapped ? codes[2] : codes[0], is_swapped ? codes[3] : codes[1],
                                is_swapped ? codes[0] : codes[2], is_swapped ? codes[1] : codes[3]};
        const u32 row = in_slab * kLoadTokens;
        store_piece((place ^ row << 4) + row * kBoxRowBytes, ordered, scale);
    }

    MLA_DEVICE void convert_rope(i32 pass, u32 lane, bool has_units, u32 place) const {
        const u32 slab_offset = pass * kRopeTokens / kShareTokens * kSlabTokens * kBoxRowBytes;
        u32 words[4];
        load_shared_words(staged_rope(lane) + pass * kRopeTokens * kBoxRowBytes, words);
        if constexpr (kCodesRope) {
            store_piece(place + slab_offset, words, 0);
        } else {
            const f32 inverse = 1.0f / __shfl_sync(kFullWarp, unit_, pass * kRopeTokens + lane / kRopeLanes);
            if (has_units) {
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
    const u8* row_;  // of token `lane`
    u32 scales_[4];
    u32 codes_[kLoads][4];
    f32 unit_ = 1.0f;
};

}  // namespace mla
