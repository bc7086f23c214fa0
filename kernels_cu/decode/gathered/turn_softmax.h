// The softmax of two scores warpgroups that take tiles in turn. Both make P, and so O, relative to the same maxima of the rows:
// whoever has a tile takes them over from the tile before. Sums and largest scores are each warpgroup's own up to an item's end.
#pragma once
#include "decode/gathered/narrow_rows.h"
#include "ptx/mbarrier.h"

namespace mla {

// Items of which sums are handed over, each in a place of its own: who hands over an item's may be an item ahead.
constexpr u32 kHandedItems = 2;
// Of each row: sums of each warp, then largest scores of each, then the maximum.
constexpr u32 kHandedValues = 2 * kWarpgroupWarps + 1;

// Smem: the kernel's shared memory. It has what NarrowSoftmax wants of it, `exchange` for each warpgroup, and
//   turns    a barrier of each warpgroup's turn: kRowLanes threads of the other, once P of the tile before is there, and the maxima;
//            whoever has the next tile
//   maxima   of each row, as of the last tile; `units` of the rows where V may have some (kHasUnits)
//   handed   of every other item, kHandedValues of each row
template <class Smem, bool kHasUnits = false, bool kAllArrive = false>
class TurnSoftmax : public RowSoftmax {
public:
    using Rows = UnitRows<kHasUnits>;

    // `which`: of the two warpgroups; it has the buffer of that number. `thread` counts its threads.
    MLA_DEVICE TurnSoftmax(const GatherParams& params, u32 smem, u32 thread, u32 which)
        : RowSoftmax(params, smem, thread), which_(which) {}

    // P of a tile. It is first made with the maxima as they are, which nearly always stand; the one barrier that publishes it also
    // tells whether any row outgrew its own, or any token or row has a unit. `hands_over`: this is the warpgroup's last tile of an
    // item whose last is the other's.
    MLA_DEVICE void add_tile(bool is_first, bool hands_over, const float (&scores)[kFragment], Rows& rows,
                             const TokenUnits& units = {1.0f, 1.0f}) {
        float probabilities[kFragment];
        float maxima[kThreadRows];  // of this thread's scores
        column_maxima(scores, maxima);
        if (!kIsPlanned) {
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.largest[i] = fmaxf(rows.largest[i], maxima[i]);
        }
        mbarrier_wait(of(Smem::turns, which_), parity_ ^ which_ ^ 1);  // passes at once for the first tile of all
        if (!is_first) take_over(rows);
        const bool has_units = kHasUnits && (!units.are_one() || rows.have_units());
        mbarrier_wait(of(Smem::probabilities_empty, which_), parity_ ^ 1);
        bool moves = is_first;
        if (!is_first) {
            bool outgrown = false;
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) outgrown |= maxima[i] > rows.maximum[i] + kRescaleThreshold;
            if constexpr (kHasUnits) outgrown |= has_units;
            store_probabilities(scores, rows, probabilities);
            moves = named_barrier_or(barrier_id(), kWarpgroupThreads, outgrown);
        }
        if (moves) {
            float factor[kThreadRows];
            across_warps(maxima, [](float a, float b) { return fmaxf(a, b); });
            rows.raise(maxima, factor);
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.sum[i] *= factor[i];
            if (rows.is_refined) share_factors(factor);
            // Also: all have read the maxima.
            if (kHasUnits && named_barrier_or(barrier_id(), kWarpgroupThreads, has_units))
                weigh(is_first, scores, units, rows, factor, probabilities);
            else
                store_probabilities(scores, rows, probabilities);
            store_of_rows(own(Smem::factors), factor);
            store_of_rows(smem_ + Smem::maxima, rows.maximum);
            if constexpr (kHasUnits) store_of_rows(smem_ + Smem::units, rows.unit);
        }
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            rows.sum[i] += probabilities[row_element(i)] + probabilities[row_element(i) + 2];
        if (hands_over) hand_over(rows);
        if (moves || hands_over) barrier();  // all of it is written; and all have read the maxima
        if (thread_ == 0) store_shared_u32(smem_ + Smem::rescales + which_ * sizeof(u32), moves && !is_first);
        if (kAllArrive || lane_ == 0 || thread_ < kRowLanes) mbarrier_arrive(of(Smem::probabilities_full, which_));
        if (thread_ < kRowLanes) mbarrier_arrive(of(Smem::turns, which_ ^ 1));
        parity_ ^= 1;
    }

    // After an item's last tile, by the warpgroup that had it: what O is multiplied by (the sums' inverses) to the values
    // warpgroup, then lse and largest scores. `is_shared`: the other warpgroup had tiles, too.
    MLA_DEVICE void finish(const BlockWork& work, bool is_shared, Rows& rows) const {
        float inverse[kThreadRows];
        across_warps(rows.sum, [](float a, float b) { return a + b; });
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const u32 row = row_of_lane(lane_, i);
            if (is_shared) rows.sum[i] += handed_sum(row, rows.maximum[i]);
            const float unit = kHasUnits ? rows.unit[i] : 1.0f;
            inverse[i] = rows.sum[i] == 0.0f ? 0.0f : unit / with_sink(params_, work, row, rows.maximum[i], rows.sum[i]);
        }
        store_of_rows(own(Smem::inverse_sums), inverse);
        if (thread_ < kRowLanes) mbarrier_arrive(of(Smem::sums_full, which_));
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            if (i % kWarpgroupWarps != warp_ || lane_ >= kRowLanes) continue;  // all warps know all rows: each writes some
            store_lse(params_, work, row_of_lane(lane_, i), lse_of(params_, work, rows.maximum[i], rows.sum[i]));
        }
        barrier();  // all have read the sums
        if (kIsPlanned || params_.max_logits == nullptr) return;
        across_warps(rows.largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            if (i % kWarpgroupWarps != warp_ || lane_ >= kRowLanes) continue;
            const u32 row = row_of_lane(lane_, i);
            const float largest = is_shared ? fmaxf(rows.largest[i], handed_largest(row)) : rows.largest[i];
            store_max_logit(params_, work, row, largest * kLn2);
        }
        barrier();  // all have read the largest
    }

    MLA_DEVICE void next_item() { item_ ^= 1; }

private:
    MLA_DEVICE u32 of(u32 barriers, u32 index) const { return smem_ + barriers + index * sizeof(u64); }
    MLA_DEVICE u32 barrier_id() const { return which_ == 0 ? kScoresBarrier : kSecondScoresBarrier; }
    MLA_DEVICE void barrier() const { named_barrier_sync(barrier_id(), kWarpgroupThreads); }

    // Of values of each row for each buffer, those of this warpgroup's.
    MLA_DEVICE u32 own(u32 values) const { return smem_ + values + which_ * Smem::rows_bytes; }

    // By lanes that together have all rows.
    MLA_DEVICE void store_of_rows(u32 place, const float (&values)[kThreadRows]) const {
        if (thread_ >= kRowLanes) return;
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) store_shared_f32(place + row_of_lane(lane_, i) * sizeof(f32), values[i]);
    }

    // The maxima may have moved with the other's tile.
    MLA_DEVICE void take_over(Rows& rows) const {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const float maximum = load_shared_f32(smem_ + Smem::maxima + row_of_lane(lane_, i) * sizeof(f32));
            if constexpr (kHasUnits) rows.unit[i] = load_shared_f32(smem_ + Smem::units + row_of_lane(lane_, i) * sizeof(f32));
            if (maximum == rows.maximum[i]) continue;
            rows.sum[i] *= rows.maximum[i] == minus_infinity() ? 0.0f : fast_exp2(rows.maximum[i] - maximum);
            rows.maximum[i] = maximum;
        }
    }

    // Where what is handed over of the item at hand lies.
    MLA_DEVICE u32 handed(u32 index, u32 row) const {
        return smem_ + Smem::handed + item_ * kHandedValues * Smem::rows_bytes + index * Smem::rows_bytes +
               row * static_cast<u32>(sizeof(f32));
    }
    static constexpr u32 kLargest = kWarpgroupWarps, kMaxima = 2 * kWarpgroupWarps;

    MLA_DEVICE void hand_over(const Rows& rows) const {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            float sum = rows.sum[i], largest = rows.largest[i];
#pragma unroll
            for (u32 distance = kRowLanes; distance < kWarpThreads; distance *= 2) {
                sum += __shfl_xor_sync(kFullWarp, sum, distance);
                if (!kIsPlanned) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, distance));
            }
            if (lane_ >= kRowLanes) continue;
            const u32 row = row_of_lane(lane_, i);
            store_shared_f32(handed(warp_, row), sum);
            if (!kIsPlanned) store_shared_f32(handed(kLargest + warp_, row), largest);
            if (warp_ == 0) store_shared_f32(handed(kMaxima, row), rows.maximum[i]);
        }
    }

    // Relative to `maximum`, which is no less than that of the other's last tile.
    MLA_DEVICE float handed_sum(u32 row, float maximum) const {
        const float theirs = load_shared_f32(handed(kMaxima, row));
        if (theirs == minus_infinity()) return 0.0f;
        float sum = 0.0f;
#pragma unroll
        for (u32 warp = 0; warp < kWarpgroupWarps; ++warp) sum += load_shared_f32(handed(warp, row));
        return sum * fast_exp2(theirs - maximum);
    }

    MLA_DEVICE float handed_largest(u32 row) const {
        float largest = minus_infinity();
#pragma unroll
        for (u32 warp = 0; warp < kWarpgroupWarps; ++warp) largest = fmaxf(largest, load_shared_f32(handed(kLargest + warp, row)));
        return largest;
    }

    MLA_DEVICE void store_probabilities(const float (&scores)[kFragment], const Rows& rows,
                                        float (&probabilities)[kFragment]) const {
        exponentiate(scores, rows, probabilities);
        store_as_operand(probabilities, rows.is_refined);
    }

    // P of a tile where V or O have units.
    MLA_DEVICE void weigh(bool is_first, const float (&scores)[kFragment], const TokenUnits& units, Rows& rows,
                          float (&factor)[kThreadRows], float (&probabilities)[kFragment]) const {
        exponentiate(scores, rows, probabilities);
        float most[kThreadRows];
        weighted_maxima(probabilities, units, most);
        across_warps(most, [](float a, float b) { return fmaxf(a, b); });
        float weighted[kFragment];
        weigh_probabilities(is_first, probabilities, units, most, rows, factor, weighted);
        store_as_operand(weighted);
    }

    MLA_DEVICE void store_as_operand(const float (&probabilities)[kFragment], bool is_refined = false) const {
        store_fragment_transposed<Operand>(smem_ + Smem::probabilities + which_ * kRowBoxBytes, warp_, lane_, probabilities,
                                           is_refined);
        fence_async_proxy();
    }

    template <class Reduce>
    MLA_DEVICE void across_warps(float (&values)[kThreadRows], Reduce reduce) const {
        reduce_across_warps(smem_ + Smem::exchange + which_ * Smem::exchange_bytes, warp_, lane_, barrier_id(), values, reduce);
    }

    u32 which_;
    u32 parity_ = 0;  // of the buffer
    u32 item_ = 0;    // the parity of the item's number
};

}  // namespace mla
