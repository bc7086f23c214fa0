// A scores warpgroup of the fp8 kernel, one of two that take tiles in turn, across items, so that Q K^T of a tile runs beside the
// softmax of the tile before. Both make P, and so O, relative to the same maxima of the rows: whoever has a tile takes them over from
// the tile before. Sums are each warpgroup's own up to an item's end, when who has the last tile is handed those of the other.
#pragma once
#include "decode/fp8/tile_scores.h"

namespace mla {

class TurnScoresRole : TileScores {
public:
    // `which`: of the two warpgroups, known to be the same in all of a warp.
    MLA_DEVICE TurnScoresRole(const Fp8Params& params, u32 smem, u32 which)
        : TileScores(params, smem, threadIdx.x % kWarpgroupThreads), which_(which) {
        if (which_ == 0) return;
        stage_.advance();
        buffer_.advance();
    }

    // The item is read again where a mask or its end needs it: over its tiles it would cost registers.
    MLA_DEVICE void run_item(i32 item) {
        Tiles tiles;
        i32 count;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            if (!work.has_tiles()) {  // only a whole job is without tiles
                pdl_wait();
                if (threadIdx.x < kRows) store_lse(params_, work, threadIdx.x, empty_lse(params_, work));
                return;
            }
            count = work.tile_end - work.tile_begin;
            const u32 own_first = which_ ^ turn_;
            const i32 first_key = (work.tile_begin + static_cast<i32>(own_first)) * kTileTokens;
            tiles = {static_cast<i32>(own_first), block_visible_end(params_, work) - first_key, work.seqlen_k - first_key};
            if (!is_first_item_) item_barrier();  // the queries before are multiplied
            if (which_ == 0)
                Fp8Query::make(params_, work, smem_, threadIdx.x, is_first_item_);
            else
                Fp8Query::await(is_first_item_);
            is_first_item_ = false;
        }
        float scale[kThreadRows];  // of the rows' scores, to log2 units
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            scale[i] = load_shared_f32(smem_ + Fp8Smem::row_scales + row_of_lane(lane_, i) * sizeof(f32));
        turn_ = (turn_ + count) % 2;
        const bool has_last = turn_ != which_;
        const float rope_ratio = kRopeApart ? params_.rope_ratio() : 1.0f;
        RowStatistics rows;
        for (; tiles.index < count; tiles.next()) {
            await_part(0);
            float scores[kFragment];
            multiply_exact(rope_ratio, scores);
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) {
                scores[row_element(i)] *= scale[i];
                scores[row_element(i) + 2] *= scale[i];
            }
            if (tiles.visible_end < kTileTokens) mask(item, tiles.sequence_end, scores);
            __syncwarp();
            if (lane_ == 0) mbarrier_arrive(barrier_of(smem_, Fp8Smem::tile_empty, stage_.index()));
            softmax(tiles.index == 0, !has_last && tiles.index + 2 >= count, scores, rows);
            stage_.advance();
            stage_.advance();
            buffer_.advance();
            buffer_.advance();
        }
        if (has_last) finish(item, count > 1, rows);
        sums_.advance();
    }

private:
    MLA_DEVICE u32 barrier_id() const { return which_ == 0 ? kScoresBarrier : kSecondScoresBarrier; }
    MLA_DEVICE void barrier() const { named_barrier_sync(barrier_id(), kWarpgroupThreads); }
    static MLA_DEVICE void item_barrier() { named_barrier_sync(kItemBarrier, kScoresWarpgroups * kWarpgroupThreads); }

    // Of an item: this warpgroup's next tile, and keys, counted from its first, that all rows may see and that there are.
    struct Tiles {
        i32 index, visible_end, sequence_end;

        MLA_DEVICE void next() {
            index += kScoresWarpgroups;
            visible_end -= kScoresWarpgroups * kTileTokens;
            sequence_end -= kScoresWarpgroups * kTileTokens;
        }
    };

    // Scores to P in shared memory, statistics, and the factors by which O is to be rescaled. P is first made with the maxima as they
    // are, which nearly always stand; a vote tells whether any row outgrew its own. `hands_over`: this is the warpgroup's last tile of
    // an item whose last is the other's.
    MLA_DEVICE void softmax(bool is_first, bool hands_over, const float (&scores)[kFragment], RowStatistics& rows) {
        float probabilities[kFragment];
        float maxima[kThreadRows];
        column_maxima(scores, maxima);
        mbarrier_wait(barrier_of(smem_, Fp8Smem::turns, which_), parity_ ^ which_ ^ 1);  // passes at once for the first tile of all
        if (!is_first) take_over(rows);
        mbarrier_wait(barrier_of(smem_, Fp8Smem::probabilities_empty, buffer_.index()), buffer_.parity() ^ 1);
        bool move_maxima = is_first;
        if (!is_first) {
            bool outgrown = false;
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i)
                outgrown |= maxima[i] > rows.maximum[i] + kRescaleThreshold;  // from -inf any visible key moves it
            store_probabilities(buffer_.index(), scores, rows, probabilities);
            move_maxima = named_barrier_or(barrier_id(), kWarpgroupThreads, outgrown);
        }
        if (move_maxima) {
            float factor[kThreadRows];
            across_warps(maxima, [](float a, float b) { return fmaxf(a, b); });
            rows.raise(maxima, factor);
            store_probabilities(buffer_.index(), scores, rows, probabilities);
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.sum[i] *= factor[i];
            store_of_rows(smem_ + Fp8Smem::factors + buffer_.index() * kRows * sizeof(f32), factor);
            store_of_rows(smem_ + Fp8Smem::turn_maxima, rows.maximum);
        }
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            rows.sum[i] += probabilities[row_element(i)] + probabilities[row_element(i) + 2];
        if (hands_over) hand_over(rows);
        if (move_maxima || hands_over) barrier();  // all of it is written; and all have read the maxima
        if (warp_ == 0 && lane_ == 0)  // of an item's first tile there is nothing to rescale
            store_shared_u32(smem_ + Fp8Smem::moved + buffer_.index() * sizeof(u32), move_maxima && !is_first);
        mbarrier_arrive(barrier_of(smem_, Fp8Smem::probabilities_full, buffer_.index()));
        if (warp_ == 0 && lane_ < kRowLanes) mbarrier_arrive(barrier_of(smem_, Fp8Smem::turns, which_ ^ 1));
        parity_ ^= 1;
    }

    // After the item's last tile, by who had it. `is_shared`: the other warpgroup had tiles, too.
    MLA_DEVICE void finish(i32 item, bool is_shared, RowStatistics& rows) {
        const BlockWork work = load_block_work(params_, item);
        const f32 latent_scale = params_.latent_scale();
        across_warps(rows.sum, [](float a, float b) { return a + b; });
        if (is_shared) {
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.sum[i] += handed_sum(row_of_lane(lane_, i), rows.maximum[i]);
        }
        mbarrier_wait(barrier_of(smem_, Fp8Smem::sums_empty, sums_.index()), sums_.parity() ^ 1);
        serve(work, latent_scale, rows.maximum, rows.sum, sums_.index());
        barrier();  // all have read the sums
    }

    // By lanes that together have all rows.
    MLA_DEVICE void store_of_rows(u32 place, const float (&values)[kThreadRows]) const {
        if (warp_ != 0 || lane_ >= kRowLanes) return;
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) store_shared_f32(place + row_of_lane(lane_, i) * sizeof(f32), values[i]);
    }

    // The maxima may have moved with the other's tile.
    MLA_DEVICE void take_over(RowStatistics& rows) const {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const float maximum = load_shared_f32(smem_ + Fp8Smem::turn_maxima + row_of_lane(lane_, i) * sizeof(f32));
            if (maximum == rows.maximum[i]) continue;
            rows.sum[i] *= rows.maximum[i] == minus_infinity() ? 0.0f : fast_exp2(rows.maximum[i] - maximum);
            rows.maximum[i] = maximum;
        }
    }

    // What is handed over of the item at hand: of each row the sums of each warp, then the maximum.
    MLA_DEVICE u32 handed(u32 index, u32 row) const {
        return smem_ + Fp8Smem::handed + ((sums_.index() * kHandedValues + index) * kRows + row) * sizeof(f32);
    }

    MLA_DEVICE void hand_over(const RowStatistics& rows) const {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            float sum = rows.sum[i];
#pragma unroll
            for (u32 distance = kRowLanes; distance < kWarpThreads; distance *= 2)
                sum += __shfl_xor_sync(kFullWarp, sum, distance);
            if (lane_ >= kRowLanes) continue;
            store_shared_f32(handed(warp_, row_of_lane(lane_, i)), sum);
            if (warp_ == 0) store_shared_f32(handed(kScoresWarps, row_of_lane(lane_, i)), rows.maximum[i]);
        }
    }

    // Relative to `maximum`, which is no less than that of the other's last tile.
    MLA_DEVICE float handed_sum(u32 row, float maximum) const {
        const float theirs = load_shared_f32(handed(kScoresWarps, row));
        float sum = 0.0f;
#pragma unroll
        for (u32 warp = 0; warp < kScoresWarps; ++warp) sum += load_shared_f32(handed(warp, row));
        return theirs == minus_infinity() ? 0.0f : sum * fast_exp2(theirs - maximum);
    }

    template <class Reduce>
    MLA_DEVICE void across_warps(float (&values)[kThreadRows], Reduce reduce) const {
        reduce_across_warps(smem_ + Fp8Smem::exchange + which_ * kScoresWarps * kRows * sizeof(f32), warp_, lane_, barrier_id(),
                            values, reduce);
    }

    u32 which_;
    u32 turn_ = 0;    // whose the next item's first tile is
    u32 parity_ = 0;  // of this warpgroup's turns
    bool is_first_item_ = true;
    RingPosition<kProbabilityBuffers> buffer_;
    RingPosition<kSumsPlaces> sums_;  // of the item
};

}  // namespace mla
