// The converter warps of the kernel for 64 rows of gathered FP8 tokens without a rope part: they walk the items tile by tile, ahead of the
// arithmetic and across items, read each token's row into registers, and write it as fp16 once PV has freed its place, but for
// what the values warps convert (wide_share.h).
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
        if (tokens.left <= 0) {
            if (threadIdx.x % kWarpgroupThreads == 0) store_shared_u32(smem_ + Smem::next_tile, 0);
            mbarrier_arrive(smem_ + Smem::rows_there);  // or the values warps wait
            return;
        }
        const i32 first = read(tokens);
        prefetch_query(load_block_work(params_, item_ - items_.step()));
        open_tile(first, tokens.is_extra, true);
        load_scales();
#pragma unroll
        for (u32 slab = 0; slab < kConverterSlabs; ++slab) {
            const SlabRows rows = read_rows(this_lane(), slab);
#pragma unroll
            for (u32 pair = 0; pair < kSlabPairs; ++pair) load_pair(this_lane(), slab * kSlabPairs + pair, rows.of[pair]);
        }
#pragma unroll
        for (u32 slab = 0; slab < kRestPasses; ++slab) load_rest(this_lane(), slab, rest_row(this_lane(), slab));
        // Indices are read three tiles ahead: ptxas has one scoreboard for all loads that are on their way around the loop, so that who
        // uses an index in the pass that asks for it waits for rows.
        advance(tokens);
        i32 slot = read(tokens);
        u32 ahead = flags_of(tokens);  // of the tiles to come, the next one's lowest
        advance(tokens);
        i32 next_slot = read(tokens);
        ahead |= flags_of(tokens) << kFlags;
        mbarrier_wait(smem_ + Smem::first_rows_read, 0);
        for (;;) {
            advance(tokens);
            const i32 last_slot = read(tokens);
            ahead |= flags_of(tokens) << 2 * kFlags;
            if (kMixesCodecs && is_extra_)
                convert<ExtraCodec>(slot, ahead & kTileIsExtra, ahead & kTileExists);
            else
                convert<Codec>(slot, ahead & kTileIsExtra, ahead & kTileExists);
            ahead >>= kFlags;
            prefetch(next_slot, ahead & kTileIsExtra);
            if (!(valid_ & kOpen)) break;
            slot = next_slot;
            next_slot = last_slot;
        }
    }

private:
    static constexpr i32 kNoSlot = -1;
    static constexpr u32 kFlags = 2;
    static MLA_DEVICE u32 flags_of(const TokenRun& tokens) {
        return (tokens.left > 0 ? kTileExists : 0) | (kHasExtra && tokens.is_extra ? kTileIsExtra : 0);
    }
    static constexpr u32 kOpen = 1u << 31;  // beside the bits of tokens: there is a tile
    static constexpr u64 kNoRow = PairCodes::kNoRow;

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
    MLA_DEVICE void open_tile(i32 slot, bool is_extra, bool exists) {
        const bool is_valid = is_token(params_, slot, is_extra);
        valid_ = __ballot_sync(kFullWarp, is_valid) | (exists ? kOpen : 0);
        slot_ = is_valid ? slot : kNoSlot;
        is_extra_ = is_extra;
        const u64 row = is_valid ? reinterpret_cast<u64>(token_address(params_, slot, is_extra)) : kNoRow;
        __syncwarp();  // all have read those of the tile before
        if (this_lane() < kWarpTokens)
            store_shared_8b(row_place(this_lane()), {static_cast<u32>(row), static_cast<u32>(row >> 32)});
        __syncwarp();
        // To the values warps; and the scales of the tile before.
        if (warp_ == 0 && this_lane() == 0)
            store_shared_u32(smem_ + Smem::next_tile, exists ? kTileExists | (kMixesCodecs && is_extra ? kTileIsExtra : 0) : 0);
        mbarrier_arrive(smem_ + Smem::rows_there);
    }

    MLA_DEVICE u32 row_place(u32 token) const { return mla::row_place(smem_, warp_, token); }

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
        codes_[pair].template load<C>(lane, row);
    }

    MLA_DEVICE u64 rest_row(u32 lane, u32 slab) const {
        const uint2 words = load_shared_8b(row_place(slab * kRestTokens + lane / kRestLanes));
        return words.x | static_cast<u64>(words.y) << 32;
    }

    MLA_DEVICE void load_rest(u32 lane, u32 slab, u64 row) {
        const u8* const source = reinterpret_cast<const u8*>(row) + Codec::kUncodedOffset + lane % kRestLanes * 16;
        load_global_16b(source, row != kNoRow, rest_[slab]);
    }

    // Writes what has been read to the stage at ring_, a slab at a time as PV frees it, and asks for the next tile's in its place.
    template <class C>
    MLA_DEVICE void convert(i32 next_slot, bool next_is_extra, bool next_exists) {
        const u32 before = ring_.stage ^ 1;  // the stage of the tile before, whose scales and rows the values warps have read by then
        mbarrier_wait(tile_full(smem_, before), ring_.parity ^ before);
        f32 unit;
        const bool has_units = scales_.prepare<C>(unit, rest_);
        const u32 marks = (valid_ & kAllValid) | (has_units ? kHasUnits : 0);
        open_tile(next_slot, next_is_extra, next_exists);
        load_scales();
        const u32 lane = this_lane();
        const u32 stage = stage_address(smem_, ring_.stage);
        const u32 place = piece_place(stage, token_of(warp_, half_of(lane)), lane);
        u32 scales[TokenScales::kAtOnce];
#pragma unroll
        for (u32 slab = 0; slab < kSlabs; ++slab) {
            if (slab == kConverterSlabs && !kUncodedIsValue) break;
            // Ahead of the stores, behind which they would wait.
            if (slab * kSlabPairs % TokenScales::kAtOnce == 0 && slab < kConverterSlabs) scales_.read<C>(lane, slab * kSlabPairs, scales);
            SlabRows rows;
            if (slab < kConverterSlabs) rows = read_rows(lane, slab);
            u64 rest = kNoRow;
            if (kUncodedIsValue) rest = rest_row(lane, slab);
            mbarrier_wait(slab_empty(smem_, ring_.stage, slab), ring_.parity ^ 1);  // passes at once in the first lap
            if (slab == 0) announce(marks, unit);
            if (slab < kConverterSlabs) {
#pragma unroll
                for (u32 in_slab = 0; in_slab < kSlabPairs; ++in_slab) {
                    const u32 pair = slab * kSlabPairs + in_slab, row = in_slab * kPairTokens;
                    // Rows of a slab's second pair are two further, so its chunks are others.
                    codes_[pair].template store<C>(lane, scales[pair % TokenScales::kAtOnce], place ^ row << 4,
                                                   slab * kSlabBytes + row * kBoxRowBytes);
                    __syncwarp();
                    load_pair(lane, pair, rows.of[in_slab]);
                }
            }
            if constexpr (kUncodedIsValue) {
                convert_rest(slab, lane, has_units, stage);
                __syncwarp();
                load_rest(lane, slab, rest);
            }
        }
        mbarrier_arrive(tile_full(smem_, ring_.stage));
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

    // A slab's values without codes, as V.
    MLA_DEVICE void convert_rest(u32 slab, u32 lane, bool has_units, u32 stage) const {
        const u32 token = token_of(warp_, lane / kRestLanes);
        f32 inverse = 1.0f;
        if (has_units) inverse = inverse_of_unit(load_shared_f32(unit_place(slab * kRestTokens + lane / kRestLanes)));
        u32 words[4];
#pragma unroll
        for (u32 word = 0; word < 4; ++word) {
            f32 first, second;
            unpack2<Bf16>(rest_[slab][word], first, second);
            words[word] = pack2<Fp16>(first * inverse, second * inverse);
        }
        store_shared_16b(stage + latent_row(token, kPieceBoxes) + slab * kSlabBytes + ((lane % kRestLanes ^ token % kAtomRows) << 4),
                         uint4{words[0], words[1], words[2], words[3]});
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
    PairCodes codes_[kConverterSlabs * kSlabPairs];
    Rest rest_;
};

}  // namespace mla
