// A scores warpgroup: S^T = K Q^T for its tiles, one after the other, then softmax and P. K is made in registers: codes as fp16, which
// holds them exactly; what a token's scales make of them is taken into the sums of each group of columns. Operands are swapped.
#pragma once
#include "decode/gathered_fp8/narrow_query.h"
#include "decode/gathered_fp8/token_unit.h"
#include "decode/row_tiles/smem.h"
#include "ptx/wgmma.h"

namespace mla {

// Pairs of columns in the order in which a lane of four finds K's (narrow_query.h). Of codes, pair `lane` of chunk c (half a k16
// step) is half a word: 16 codes of a lane are four steps. Of bf16 values it is a word.
struct TileColumns {
    // Some are in the other box of the group.
    static MLA_DEVICE i32 coded(u32 box, u32 chunk, u32 lane) {
        constexpr i32 kChunkPairs = 8, kBoxPairs = kBoxColumns / 2;
        const i32 in_group = box % kGroupBoxes;
        return static_cast<i32>(lane_chunk(lane, in_group)) * kChunkPairs + static_cast<i32>(chunk) - in_group * kBoxPairs;
    }
    static MLA_DEVICE u32 uncoded(u32 chunk, u32 lane) {
        constexpr u32 kChunkPairs = 4;
        return lane_chunk(lane, chunk / kChunkPairs) * kChunkPairs + chunk % kChunkPairs;
    }
};

// The softmax of so many scores warpgroups.
template <u32 kWarpgroups>
struct TileSoftmax {
    using Type = NarrowSoftmax<Smem, true, true>;
};
template <>
struct TileSoftmax<2> {
    using Type = TurnSoftmax<Smem, true, true>;
};

// kTurns: whether it is one of two that take tiles in turn, across items.
template <class Softmax, bool kTurns>
class TileScores {
public:
    // `which`: of the scores warpgroups; `thread` counts its threads.
    MLA_DEVICE TileScores(const GatherParams& params, u32 smem, u32 thread, u32 which)
        : params_(params), smem_(smem), thread_(thread), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads),
          which_(which), softmax_(softmax_of(params, smem, thread, which)) {
        if (which_ != 0) ring_.advance();
    }

    // Items that have tiles. The first warpgroup makes their Q, and reads that of the next once its QK of an item's last tile is
    // done.
    MLA_DEVICE void run(const Items& items) {
        i32 item = items.first();
        BlockWork work = next_work(params_, items, item);
        if (which_ == 0 && work.has_tiles()) {
            Query query;
            query.read(params_, work, thread_);
            write(query);
        }
        while (work.has_tiles()) {
            const i32 current = item - items.step();
            const BlockWork next = next_work(params_, items, item);
            run_item(work, current, next);
            work = next;
        }
    }

private:
    using Query = QueryLoad<TileColumns>;
    using Rows = typename Softmax::Rows;

    static MLA_DEVICE Softmax softmax_of(const GatherParams& params, u32 smem, u32 thread, u32 which) {
        if constexpr (kTurns)
            return Softmax(params, smem, thread, which);
        else
            return Softmax(params, smem, thread);
    }

    static MLA_DEVICE void item_barrier() { named_barrier_sync(kItemBarrier, kScoresWarpgroups * kWarpgroupThreads); }

    MLA_DEVICE void write(const Query& query) const {
        query.template write<Smem>(smem_, thread_, params_.scale_log2);
        fence_async_proxy();
    }

    MLA_DEVICE void run_item(const BlockWork& work, i32 item, const BlockWork& next) {
        item_barrier();  // Q and its scales are complete before any warp reads them
        float row_scale[kThreadRows];
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            row_scale[i] = load_shared_f32(smem_ + Smem::row_scales + row_of_lane(lane_, i) * sizeof(f32));
        const u32 tiles = work.tile_end - work.tile_begin;
        const u32 first = kTurns ? which_ ^ turn_ : 0;  // of this warpgroup's tiles
        turn_ = (turn_ + tiles) % 2;
        const bool has_last = !kTurns || turn_ != which_;
        Rows rows(work);
        for (u32 tile = first; tile < tiles; tile += kScoresWarpgroups)
            run_tile(work, tile, kTurns && tile + 2 >= tiles && !has_last, row_scale, rows);
        if (which_ == 0 && next.has_tiles()) {
            Query query;
            query.read(params_, next, thread_);
            if (has_last) finish(item, tiles, rows);
            if (kTurns) item_barrier();  // of one warpgroup `finish` has some
            write(query);
        } else {
            if (has_last) finish(item, tiles, rows);
            if (kTurns && next.has_tiles()) item_barrier();
        }
        if constexpr (kTurns) softmax_.next_item();
    }

    // The work is read again, as no register is left to keep all of it in.
    MLA_DEVICE void finish(i32 item, u32 tiles, Rows& rows) {
        if constexpr (kTurns)
            softmax_.finish(load_block_work(params_, item), tiles > 1, rows);
        else
            softmax_.finish(load_block_work(params_, item), rows);
    }

    // A tile of the item. `hands_over`: gathered/turn_softmax.h.
    MLA_DEVICE void run_tile(const BlockWork& work, u32 index, bool hands_over, const float (&row_scale)[kThreadRows],
                             Rows& rows) {
        const i32 tile = work.tile_begin + static_cast<i32>(index);
        const i32 left = work.seqlen_k - tile * static_cast<i32>(kTileTokens);  // tokens from the tile's first one on
        mbarrier_wait(barrier_of(smem_, Smem::tile_full, ring_.index()), ring_.parity());
        float scores[kFragment];
        const TokenUnits units = multiply(left, scores);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            scores[row_element(i)] *= row_scale[i];
            scores[row_element(i) + 2] *= row_scale[i];
        }
        softmax_.hide_unseen(work, tile, scores);
        if (left < static_cast<i32>(kTileTokens)) clear_values(left);
        __syncwarp();
        if (lane_ == 0) mbarrier_arrive(barrier_of(smem_, Smem::tile_empty, ring_.index()));
        if constexpr (kTurns)
            softmax_.add_tile(index == 0, hands_over, scores, rows, units);
        else
            softmax_.template add_tile<Operand>(index == 0, scores, rows, units);
#pragma unroll
        for (u32 i = 0; i < kScoresWarpgroups; ++i) ring_.advance();
    }

    // The tokens that this thread has scores of, and where their rows begin.
    MLA_DEVICE u32 token_of(u32 half) const { return warp_ * kWarpTokens + half * 8 + lane_ / 4; }
    MLA_DEVICE u32 row_address(u32 half) const { return stage_address(smem_, ring_.index()) + token_of(half) * kRowBytes; }

    // S^T of the tile. While a box is multiplied, the next one is made in other registers; and while a group's sums are made, those
    // of the group before are scaled. Also makes scales of V, over the tokens' units, as fp16: each lane one of each of its tokens.
    MLA_DEVICE TokenUnits multiply(i32 left, float (&scores)[kFragment]) const {
        const u64 query = descriptor_at(kBoxKMajor, smem_ + Smem::query);
        u32 raw[2][2][4];
        u32 keys[2][kBoxSteps][4];
        float sums[2][kFragment];
        u32 scales[2][Codec::kScales];
        f32 value_scales[2];
        load_codes(0, raw[0]);
#pragma unroll
        for (u32 box = 0; box < kCodedBoxes; ++box) {
            const u32 group = box / kGroupBoxes;
            if (box + 1 < kCodedBoxes) load_codes(box + 1, raw[(box + 1) % 2]);
            if (box >= 2) wgmma_wait<1>();
            if (box == 1) load_scales(left, scales, value_scales);
            if (box == 2) store_value_scales(value_scales);
            if (box > kGroupBoxes && box % kGroupBoxes == 1) add(group == 1, sums[(group - 1) % 2], scales, group - 1, scores);
            u32(&key)[kBoxSteps][4] = keys[box % 2];
            const u32(&codes)[2][4] = raw[box % 2];
#pragma unroll
            for (u32 step = 0; step < kBoxSteps; ++step) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    key[step][half] = e4m3_pair_low(codes[half][step]);
                    key[step][2 + half] = e4m3_pair_high(codes[half][step]);
                }
            }
            multiply_keys<Fp16>(box, key, query, box % kGroupBoxes > 0, sums[group % 2]);
        }
        if constexpr (Codec::kUncoded > 0) {
            wgmma_wait<1>();
            load_uncoded(keys[kCodedBoxes % 2]);
            multiply_keys<Bf16>(kCodedBoxes, keys[kCodedBoxes % 2], query, false, sums[Codec::kScales % 2]);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        add(false, sums[(Codec::kScales - 1) % 2], scales, Codec::kScales - 1, scores);
        if constexpr (Codec::kUncoded > 0) {
            float(&rest)[kFragment] = sums[Codec::kScales % 2];
            wgmma_wait<0>();
            wgmma_pin(rest);
#pragma unroll
            for (u32 i = 0; i < kFragment; ++i) scores[i] += rest[i];
        }
        return take_units(value_scales);
    }

    // Sums of a group of columns to those of all.
    static MLA_DEVICE void add(bool is_first, float (&sums)[kFragment], const u32 (&scales)[2][Codec::kScales], u32 group,
                               float (&scores)[kFragment]) {
        wgmma_pin(sums);
#pragma unroll
        for (u32 i = 0; i < kFragment; ++i)
            scores[i] = fmaf(sums[i], __uint_as_float(scales[i / 2 % 2][group]), is_first ? 0.0f : scores[i]);
    }

    template <class T>
    static MLA_DEVICE void multiply_keys(u32 box, const u32 (&key)[kBoxSteps][4], u64 query, bool accumulate,
                                        float (&sums)[kFragment]) {
        if (!accumulate) wgmma_pin(sums);
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < kBoxSteps; ++step)
            wgmma_rs<T, 0>(sums, key[step][0], key[step][1], key[step][2], key[step][3],
                           query + descriptor_offset(box * kRowBoxBytes + step * kStepBytes), accumulate || step > 0);
        wgmma_commit();
    }

    // All of this thread's tokens, and that of each whose number is the lane's: of tokens past the end, which may be anything, 0.
    MLA_DEVICE void load_scales(i32 left, u32 (&scales)[2][Codec::kScales], f32 (&value_scales)[2]) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            load_shared_words(row_address(half) + Codec::kScalesOffset, scales[half]);
            const f32 scale = load_shared_f32(row_address(half) + Codec::kScalesOffset + lane_ % kQuadLanes * sizeof(f32));
            value_scales[half] = static_cast<i32>(token_of(half)) < left ? scale : 0.0f;
        }
    }

    MLA_DEVICE void store_value_scales(const f32 (&scales)[2]) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            store_shared_u16(value_scale_address(smem_, ring_.index(), lane_ % kQuadLanes, token_of(half)),
                             pack2<Fp16>(scales[half], scales[half]));
    }

    // Where fp16 does not hold the scales of a token of the warp, they are stored again.
    MLA_DEVICE TokenUnits take_units(f32 (&scales)[2]) const {
        ScaleRange ranges[2];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) ranges[half] = range_of<1>({scales[half]});
        TokenUnits units{{1.0f, 1.0f}};
        if (__any_sync(kFullWarp, !ranges[0].fits || !ranges[1].fits)) {
            agree(ranges);
#pragma unroll
            for (u32 half = 0; half < 2; ++half) scales[half] *= take_unit(ranges[half], units.of[half]);
            store_value_scales(scales);
        }
        return units;
    }

    MLA_DEVICE void load_codes(u32 box, u32 (&codes)[2][4]) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) load_shared_words(codes_address(half, box), codes[half]);
    }
    MLA_DEVICE u32 codes_address(u32 half, u32 box) const {
        return row_address(half) + box / kGroupBoxes * kGroupColumns + lane_chunk(lane_ % kQuadLanes, box % kGroupBoxes) * 16;
    }

    // The box that is stored in bf16, two words of a lane's eight for a step.
    MLA_DEVICE void load_uncoded(u32 (&key)[kBoxSteps][4]) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
#pragma unroll
            for (u32 chunk = 0; chunk < 2; ++chunk) {
                u32 words[4];
                load_shared_words(row_address(half) + Codec::kUncodedOffset + lane_chunk(lane_ % kQuadLanes, chunk) * 16, words);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) key[chunk * 2 + i / 2][i % 2 * 2 + half] = words[i];
            }
        }
    }

    // V past a sequence's end may be NaN, or left over from another tile: scales of 0 do not help. Each thread clears what
    // load_codes has given it, so that it overwrites only what it has read itself; the values warps read it after P, which follows.
    MLA_DEVICE void clear_values(i32 left) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            if (static_cast<i32>(token_of(half)) < left) continue;
#pragma unroll
            for (u32 box = 0; box < kCodedBoxes; ++box) store_shared_16b(codes_address(half, box), uint4{0, 0, 0, 0});
        }
    }

    const GatherParams& params_;
    u32 smem_, thread_, warp_, lane_, which_;
    u32 turn_ = 0;  // whose the next tile is
    Softmax softmax_;
    StageRing ring_;
};

using ScoresRole = TileScores<TileSoftmax<kScoresWarpgroups>::Type, kTakesTurns>;

}  // namespace mla
