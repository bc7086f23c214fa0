// The converter warps of the kernel for 64 rows of gathered FP8 tokens: they walk the items tile by tile, ahead of the
// arithmetic and across items, read each token's row into registers, and write it as fp16 once PV has freed its place.
#pragma once
#include "decode/gathered/narrow_work.h"
#include "decode/gathered_fp8/wide_query.h"
#include "decode/gathered_fp8/wide_scales.h"
#include "ptx/convert.h"
#include "ptx/copy_async.h"
#include "ptx/load.h"
#include "source/gathered.h"

namespace mla {

class Converter {
public:
    MLA_DEVICE Converter(const GatherParams& params, const Items& items, u32 smem)
        : params_(params), items_(items), smem_(smem), warp_(threadIdx.x % kWarpgroupThreads / kWarpThreads),
          scales_(params, smem, warp_) {}

    // Rows are read a tile ahead and indices another one: their latency hides behind that of the arithmetic.
    MLA_DEVICE void run() {
        item_ = items_.first();
        TokenRun tokens = open_item(false);  // its Q after its indices, which everything else waits for
        if (tokens.left <= 0) return;
        const i32 first = read(tokens);
        prefetch_query(load_block_work(params_, item_ - items_.step()));
        open_tile(first, tokens.is_extra);
        load_scales();
#pragma unroll
        for (u32 slab = 0; slab < kSlabs; ++slab) {
            const SlabRows rows = read_rows(this_lane(), slab);
#pragma unroll
            for (u32 pair = 0; pair < kSlabPairs; ++pair) load_pair(this_lane(), slab * kSlabPairs + pair, rows.of[pair]);
        }
#pragma unroll
        for (i32 pass = 0; pass < kStagedPasses; ++pass) ask_for_staged(this_lane(), pass, staged_row(this_lane(), pass));
        advance(tokens);
        i32 slot = read(tokens);
        bool is_last;
        do {
            is_last = tokens.left <= 0;
            const bool is_extra = tokens.is_extra;  // of `slot`
            advance(tokens);
            const i32 next_slot = read(tokens);
            if (kMixesCodecs && is_extra_)
                convert<ExtraCodec>(slot, is_extra);
            else
                convert<Codec>(slot, is_extra);
            prefetch(next_slot, tokens.is_extra);
            slot = next_slot;
        } while (!is_last);
    }

private:
    static constexpr i32 kNoSlot = -1;
    static constexpr u64 kNoRow = 0;
    static constexpr u32 kSlabBytes = kSlabTokens / kAtomRows * kLatentGroupBytes;  // of V in a stage

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
    MLA_DEVICE TokenRun open_item(bool asks_for_query = true) {
        const BlockWork work = next_work(params_, items_, item_);
        if (!work.has_tiles()) return {nullptr, 0, true};
        if (asks_for_query) prefetch_query(work);
        return tokens_from(params_, work, work.tile_begin);
    }

    MLA_DEVICE void prefetch_query(const BlockWork& work) const {
#pragma unroll 1
        for (u32 line = warp_ * kWarpThreads + this_lane(); line < kRows * kTileBoxes; line += kConverterWarps * kWarpThreads) {
            const QueryRow row = query_row(params_, work, line / kTileBoxes, 0);
            if (row.exists) prefetch_to_l2(box_of(row, line % kTileBoxes));
        }
    }

    // The slot of this warp's token `lane`. Indices past the last that counts are not read.
    MLA_DEVICE i32 read(const TokenRun& tokens) const {
        const i32 place = token_of(warp_, this_lane());
        if (this_lane() >= kWarpTokens || place >= tokens.left) return kNoSlot;
        if constexpr (kHasBlockTable) return tokens.slot(params_, place);
        return __ldg(tokens.indices + place);
    }

    // The tile whose rows are asked for from here on: the warp's lanes find their addresses in shared memory.
    MLA_DEVICE void open_tile(i32 slot, bool is_extra) {
        const bool is_valid = is_token(params_, slot, is_extra);
        valid_ = __ballot_sync(kFullWarp, is_valid);
        slot_ = is_valid ? slot : kNoSlot;
        is_extra_ = is_extra;
        const u64 row = is_valid ? reinterpret_cast<u64>(token_address(params_, slot, is_extra)) : kNoRow;
        __syncwarp();  // all have read those of the tile before
        if (this_lane() < kWarpTokens)
            store_shared_8b(row_place(this_lane()), {static_cast<u32>(row), static_cast<u32>(row >> 32)});
        __syncwarp();
    }

    // Rows of the first tokens of the pairs, one behind the other, then those of the second.
    MLA_DEVICE u32 row_place(u32 token) const {
        const u32 place = token % kPairTokens * kPairs + token / kPairTokens;
        return smem_ + Smem::rows + (warp_ * kWarpTokens + place) * sizeof(u64);
    }

    // Of the tokens of a slab that this lane has pieces of.
    struct SlabRows {
        u64 of[kSlabPairs];
    };

    MLA_DEVICE SlabRows read_rows(u32 lane, u32 slab) const {
        static_assert(kSlabPairs == 2, "two addresses are read at once");
        u32 words[4];
        load_shared_words(row_place(slab * kShareTokens + half_of(lane)), words);
        return {{words[0] | static_cast<u64>(words[1]) << 32, words[2] | static_cast<u64>(words[3]) << 32}};
    }

    // Brings the rows of a tile to L2, a tile before they are read: L1, beside this much shared memory, holds few loads on their
    // way, so they must be short. Two lanes a token.
    MLA_DEVICE void prefetch(i32 slot, bool is_extra) const {
        if (kMixesCodecs && is_extra)
            prefetch<ExtraCodec>(slot, is_extra);
        else
            prefetch<Codec>(slot, is_extra);
    }

    template <class C>
    MLA_DEVICE void prefetch(i32 slot, bool is_extra) const {
        constexpr u32 kLine = 128, kLines = (C::kRowBytes + kLine - 1) / kLine, kLaneLines = (kLines + 1) / 2;
        const u32 lane = this_lane();
        const i32 its_slot = __shfl_sync(kFullWarp, slot, lane / 2);
        if (!is_token(params_, its_slot, is_extra)) return;
        const u8* const source = token_address(params_, its_slot, is_extra) + lane % 2 * kLaneLines * kLine;
#pragma unroll
        for (u32 line = 0; line < kLaneLines; ++line) {
            if (lane % 2 * kLaneLines + line < kLines) prefetch_to_l2(source + line * kLine);
        }
        if (C::kPageEndBytes > 0 && lane % 2 == 1)
            prefetch_to_l2(page_end_address(params_, its_slot, C::kRowBytes, C::kPageEndBytes, is_extra));
    }

    MLA_DEVICE void load_scales() {
        const bool exists = slot_ != kNoSlot;
        if (kMixesCodecs && is_extra_)
            scales_.load<ExtraCodec>(slot_, exists, is_extra_);
        else
            scales_.load<Codec>(slot_, exists, is_extra_);
    }

    MLA_DEVICE void load_pair(u32 lane, u32 pair, u64 row) {
        if (kMixesCodecs && is_extra_)
            load_pair<ExtraCodec>(lane, pair, row);
        else
            load_pair<Codec>(lane, pair, row);
    }

    template <class C>
    MLA_DEVICE void load_pair(u32 lane, u32 pair, u64 row) {
        constexpr u32 kColumnsPerWord = kPieceColumns / C::kLaneWords, kWordBytes = sizeof(u32);
        const u8* const source = reinterpret_cast<const u8*>(row) + first_column(lane) / kColumnsPerWord * kWordBytes;
#pragma unroll
        for (u32 j = 0; j < kLanePieces; ++j) {
            const bool exists = row != kNoRow && has_piece(lane, j);
            const u8* const piece = source + j * (kPieceStep / kColumnsPerWord * kWordBytes);
            if constexpr (C::kLaneWords == 2)
                load_global_8b(piece, exists, codes<C>(pair, j), 0);
            else
                load_global_16b(piece, exists, codes<C>(pair, j));
        }
    }

    MLA_DEVICE u64 staged_row(u32 lane, i32 pass) const {
        u32 words[2];
        load_shared_words(row_place(pass * kStagedTokens + lane / kStagedLanes), words);
        return words[0] | static_cast<u64>(words[1]) << 32;
    }

    MLA_DEVICE void ask_for_staged(u32 lane, i32 pass, u64 row) {
        const bool exists = row != kNoRow;
        const u8* const source = (exists ? reinterpret_cast<const u8*>(row) : params_.kv) +
                                 (kStagesCodes ? kLatent : Codec::kUncodedOffset) + lane % kStagedLanes * 16;
        copy_async_16b<false>(staged_chunk(smem_, warp_, lane, pass), source, exists * 16);
    }

    // Writes what has been read to the stage at ring_, a slab at a time as PV frees it, and asks for the next tile's in its place.
    template <class C>
    MLA_DEVICE void convert(i32 next_slot, bool next_is_extra) {
        if (kUncodedIsValue) copy_async_wait();
        f32 unit;
        const bool has_units = scales_.prepare<C>(unit);
        const u32 marks = valid_ | (has_units ? kHasUnits : 0);
        open_tile(next_slot, next_is_extra);
        load_scales();
        const u32 lane = this_lane();
        const u32 stage = stage_address(smem_, ring_.stage);
        const u32 token = token_of(warp_, half_of(lane));
        const u32 place = stage + latent_row(token, lane / 8) + ((lane % 4 * kPieceChunks ^ token % kAtomRows) << 4);
        u32 scales[TokenScales::kAtOnce];
#pragma unroll
        for (u32 slab = 0; slab < kSlabs; ++slab) {
            // Ahead of the stores, behind which they would wait.
            if (slab * kSlabPairs % TokenScales::kAtOnce == 0) scales_.read<C>(lane, slab * kSlabPairs, scales);
            const SlabRows rows = read_rows(lane, slab);
            Staged staged;
            if constexpr (kUncodedIsValue) staged = read_staged(slab, lane);
            mbarrier_wait(slab_empty(smem_, ring_.stage, slab), ring_.parity ^ 1);  // passes at once in the first lap
            if (slab == 0) announce(marks, unit);
#pragma unroll
            for (u32 in_slab = 0; in_slab < kSlabPairs; ++in_slab) {
                const u32 pair = slab * kSlabPairs + in_slab;
                convert_pair<C>(lane, pair, scales[pair % TokenScales::kAtOnce], place, slab * kSlabBytes, in_slab);
                __syncwarp();
                load_pair(lane, pair, rows.of[in_slab]);
            }
            if constexpr (kUncodedIsValue) convert_staged<C>(staged, slab, lane, has_units, stage);
        }
        // With the last slab everything else of the stage is free, too.
        if constexpr (kStagedBoxes > 0 && !kUncodedIsValue) {
            copy_async_wait();
            // A read waits for the stores and copies that its warp has asked for, so there are two at a time, and copies come last.
#pragma unroll
            for (i32 pass = 0; pass < kStagedPasses; pass += 2) {
                const Staged first = read_staged(pass, lane), second = read_staged(pass + 1, lane);
                convert_staged<C>(first, pass, lane, has_units, stage);
                convert_staged<C>(second, pass + 1, lane, has_units, stage);
            }
        }
        mbarrier_arrive(tile_full(smem_, ring_.stage));
        if constexpr (kStagedBoxes > 0 && !kUncodedIsValue) {
#pragma unroll
            for (i32 pass = 0; pass < kStagedPasses; ++pass) ask_for_staged(lane, pass, staged_row(lane, pass));
        }
        ring_.advance();
    }

    // What the scores warpgroup is to know of the tokens. PV of the tile that was in this stage has begun: it has read what there was.
    MLA_DEVICE void announce(u32 marks, f32 unit) const {
        if (Codec::kHasScales && this_lane() < kWarpTokens) store_shared_f32(unit_place(this_lane()), unit);
        if (this_lane() == 0)
            store_shared_u32(smem_ + Smem::marks + (ring_.stage * kConverterWarps + warp_) * sizeof(u32), marks);
        __syncwarp();
    }

    MLA_DEVICE u32 unit_place(u32 i) const {
        return smem_ + Smem::units + (ring_.stage * kTileTokens + token_of(warp_, i)) * sizeof(f32);
    }

    template <class C>
    MLA_DEVICE u32 (&codes(u32 pair, u32 piece))[C::kLaneWords] {
        return reinterpret_cast<u32(&)[C::kLaneWords]>(codes_[pair][piece]);
    }

    // 16 coded values as fp16 to a chunk and its neighbour.
    template <class C>
    static MLA_DEVICE void store_piece(bool exists, u32 place, u32 offset, const u32 (&codes)[C::kLaneWords], u32 scale) {
#pragma unroll
        for (u32 half = 0; half < kPieceChunks; ++half) {
            u32 words[2][2];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                C::pairs(codes, half * 2 + i, words[i]);
                if (C::kHasScales) {
                    words[i][0] = multiply_fp16_pairs(words[i][0], scale);
                    words[i][1] = multiply_fp16_pairs(words[i][1], scale);
                }
            }
            store_shared_16b_if(exists, (place ^ half << 4) + offset, uint4{words[0][0], words[0][1], words[1][0], words[1][1]});
        }
    }

    // `place`: of the first pair of the first slab. Rows of a slab's second pair are two further, so its chunks are others.
    template <class C>
    MLA_DEVICE void convert_pair(u32 lane, u32 pair, u32 scales, u32 place, u32 offset, u32 in_slab) {
        const u32 row = in_slab * kPairTokens;
#pragma unroll
        for (u32 j = 0; j < kLanePieces; ++j)
            store_piece<C>(has_piece(lane, j), place ^ row << 4,
                           offset + row * kBoxRowBytes + j * (kPieceStep / kBoxColumns) * kSwizzleAtomBytes, codes<C>(pair, j),
                           pair_of_half(scales, j));
    }

    // A lane's chunk of a pass; of values, which are asked for as soon as they are read, also the row of what takes its place.
    struct Staged {
        u32 words[4];
        u64 next_row;
    };

    MLA_DEVICE Staged read_staged(i32 pass, u32 lane) const {
        Staged staged;
        load_shared_words(staged_chunk(smem_, warp_, lane, pass), staged.words);
        if (kUncodedIsValue) staged.next_row = staged_row(lane, pass);
        return staged;
    }

    // What went through shared memory, as V, and asks for the next tile's in its place; or behind V.
    template <class C>
    MLA_DEVICE void convert_staged(Staged staged, i32 pass, u32 lane, bool has_units, u32 stage_place) {
        u32(&words)[4] = staged.words;
        const u32 token = token_of(warp_, lane / kStagedLanes);
        const u32 row = kUncodedIsValue ? latent_row(token, kPieceBoxes) : kStageRope + token * kBoxRowBytes;
        const u32 slab = pass * kStagedTokens / kShareTokens * (kUncodedIsValue ? kSlabBytes : kSlabTokens * kBoxRowBytes);
        const u32 chunk = lane % kStagedLanes * (8 / kStagedLanes) ^ token % kAtomRows;
        const u32 place = stage_place + row + slab + (chunk << 4);
        if constexpr (kStagesCodes) {
            store_piece<C>(true, place, 0, words, 0);
        } else {
            if (kUncodedIsValue || has_units) {
                f32 inverse = 1.0f;
                if (has_units) inverse = inverse_of_unit(load_shared_f32(unit_place(pass * kStagedTokens + lane / kStagedLanes)));
#pragma unroll
                for (u32 word = 0; word < 4; ++word) {
                    f32 first, second;
                    unpack2<Bf16>(words[word], first, second);
                    words[word] = kUncodedIsValue ? pack2<Fp16>(first * inverse, second * inverse)
                                                  : pack2<Bf16>(first * inverse, second * inverse);
                }
            }
            store_shared_16b(place, uint4{words[0], words[1], words[2], words[3]});
        }
        if (kUncodedIsValue) ask_for_staged(lane, pass, staged.next_row);
    }

    const GatherParams& params_;
    const Items& items_;
    u32 smem_, warp_;
    i32 item_;  // the one after the item that is open
    RingPosition ring_;
    // Of the tile that is on its way: bits of this warp's tokens, what this lane has of the rows.
    u32 valid_;
    i32 slot_;       // of token `lane`
    bool is_extra_;  // whether the tile is of the second cache
    TokenScales scales_;
    u32 codes_[kPairs][kLanePieces][4];
};

}  // namespace mla
