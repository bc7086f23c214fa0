// The softmax of the narrow kernels of gathered tokens, and what becomes of it: P, the factors by which O is rescaled, inverse
// sums, lse and largest scores. By the scores warpgroup.
#pragma once
#include "decode/gathered/narrow_rows.h"

namespace mla {

constexpr u32 kBuffers = 2;  // of P and of what goes with it: the scores warpgroup is a tile ahead of the values warpgroup

// The buffer of the tile at hand.
struct Buffers {
    u32 index = 0;
    u32 parity = 0;

    MLA_DEVICE void advance() {
        parity ^= index;
        index ^= 1;
    }
};

// Smem: the kernel's shared memory. It has, for each buffer, P, factors, inverse sums, the barriers
//   probabilities_full   kProbabilityArrivals threads of the scores warpgroup, after a barrier of all of them: P is there, and the
//                        factors
//   probabilities_empty  one lane of each values warp: PV is done, and in an item's last tile its inverse sums have been read
//   sums_full            kRowLanes threads: the inverse sums of the item that ended with this buffer's tile are there
// and a word (`rescales`), whether any factor is not 1; and room for one value of each (scores warp, row).
// kHasUnits: whether V may have units. kAllArrive: whether all threads arrive at probabilities_full, as the values warps read what
// each has written or cleared besides.
template <class Smem, bool kHasUnits = false, bool kAllArrive = false>
class NarrowSoftmax : public RowSoftmax {
public:
    using Rows = UnitRows<kHasUnits>;

    MLA_DEVICE NarrowSoftmax(const GatherParams& params, u32 smem, u32 thread)
        : RowSoftmax(params, smem, thread) {}

    MLA_DEVICE void barrier() const { named_barrier_sync(kScoresBarrier, kWarpgroupThreads); }

    // decode/gathered/narrow_rows.h
    MLA_DEVICE void hide(u32 valid, float (&scores)[kFragment]) const { hide_absent_tokens(valid, lane_, scores); }

    // P of a tile, of type T, to the buffer at hand, which it leaves. P is first made with the old maxima, which nearly always
    // stand; the one barrier that publishes it also tells whether any row outgrew its own, or any token or row has a unit.
    template <class T>
    MLA_DEVICE void add_tile(bool is_first, const float (&scores)[kFragment], Rows& rows, const TokenUnits& units = {1.0f, 1.0f}) {
        const bool has_units = kHasUnits && (!units.are_one() || rows.have_units());
        float probabilities[kFragment];
        float maxima[kThreadRows];  // of this thread's scores
        column_maxima(scores, maxima);
        if (!kIsPlanned) {
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.largest[i] = fmaxf(rows.largest[i], maxima[i]);
        }
        mbarrier_wait(of_buffer(Smem::probabilities_empty), buffers_.parity ^ 1);
        bool moves = is_first;
        if (!is_first) {
            bool outgrown = has_units;
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) outgrown |= maxima[i] > rows.maximum[i] + kRescaleThreshold;
            store_probabilities<T>(scores, rows, probabilities);
            moves = named_barrier_or(kScoresBarrier, kWarpgroupThreads, outgrown);
        }
        if (moves) {
            float factor[kThreadRows];
            across_warps(maxima, [](float a, float b) { return fmaxf(a, b); });
            rows.raise(maxima, factor);
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.sum[i] *= factor[i];
            if (rows.is_refined) share_factors(factor);
            // Also: all have read the maxima.
            if (kHasUnits && named_barrier_or(kScoresBarrier, kWarpgroupThreads, has_units))
                weigh<T>(is_first, scores, units, rows, factor, probabilities);
            else
                store_probabilities<T>(scores, rows, probabilities);
            store_of_rows(Smem::factors, buffers_.index, factor);
            barrier();  // all of P is written; and all have read the maxima
        }
        if (thread_ == 0) store_shared_u32(smem_ + Smem::rescales + buffers_.index * sizeof(u32), moves && !is_first);
        if (kAllArrive || lane_ == 0 || thread_ < kRowLanes) mbarrier_arrive(of_buffer(Smem::probabilities_full));
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            rows.sum[i] += probabilities[row_element(i)] + probabilities[row_element(i) + 2];
        last_ = buffers_.index;
        buffers_.advance();
    }

    // After an item's last tile: what O is multiplied by (the sums' inverses, times what V is to be multiplied by) to the values
    // warpgroup, then lse and largest scores.
    MLA_DEVICE void finish(const BlockWork& work, Rows& rows, float value_scale = 1.0f) const {
        float inverse[kThreadRows], sums[kThreadRows];
        across_warps(rows.sum, [](float a, float b) { return a + b; });
        with_sinks(params_, work, lane_, rows, sums);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const float scale = kHasUnits ? value_scale * rows.unit[i] : value_scale;
            inverse[i] = rows.sum[i] == 0.0f ? 0.0f : scale * fast_reciprocal(sums[i]);
        }
        store_of_rows(Smem::inverse_sums, last_, inverse);
        if (thread_ < kRowLanes) mbarrier_arrive(smem_ + Smem::sums_full + last_ * sizeof(u64));
        store_lses(work, rows);
        if (kIsPlanned || params_.max_logits == nullptr) return;
        barrier();  // all have read the sums
        across_warps(rows.largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            if (i % kWarpgroupWarps != warp_ || lane_ >= kRowLanes) continue;
            store_max_logit(params_, work, row_of_lane(lane_, i), rows.largest[i] * kLn2);
        }
    }

private:
    // All warps know all rows: each writes some. Chosen, not branched to: code that runs once waits for each line of it.
    MLA_DEVICE void store_lses(const BlockWork& work, const Rows& rows) const {
#pragma unroll
        for (u32 first = 0; first < kThreadRows; first += kWarpgroupWarps) {
            float maximum = rows.maximum[first], sum = rows.sum[first];
#pragma unroll
            for (u32 warp = 1; warp < kWarpgroupWarps; ++warp) {
                maximum = warp_ == warp ? rows.maximum[first + warp] : maximum;
                sum = warp_ == warp ? rows.sum[first + warp] : sum;
            }
            // Whether values are scaled, the values warps know, which leave exponents in any case.
            if (lane_ < kRowLanes)
                store_lse(params_, work, row_of_lane(lane_, first + warp_), lse_of(params_, work, maximum, sum), kScaledMark);
        }
    }

    MLA_DEVICE u32 of_buffer(u32 barriers) const { return smem_ + barriers + buffers_.index * sizeof(u64); }

    // P of a tile where V or O have units.
    template <class T>
    MLA_DEVICE void weigh(bool is_first, const float (&scores)[kFragment], const TokenUnits& units, Rows& rows,
                          float (&factor)[kThreadRows], float (&probabilities)[kFragment]) const {
        exponentiate(scores, rows, probabilities);
        float most[kThreadRows];
        weighted_maxima(probabilities, units, most);
        across_warps(most, [](float a, float b) { return fmaxf(a, b); });
        float weighted[kFragment];
        weigh_probabilities(is_first, probabilities, units, most, rows, factor, weighted);
        store_as_operand<T>(weighted);
    }

    template <class T>
    MLA_DEVICE void store_probabilities(const float (&scores)[kFragment], const Rows& rows,
                                        float (&probabilities)[kFragment]) const {
        exponentiate(scores, rows, probabilities);
        store_as_operand<T>(probabilities, rows.is_refined);
    }

    template <class T>
    MLA_DEVICE void store_as_operand(const float (&probabilities)[kFragment], bool is_refined = false) const {
        store_fragment_transposed<T>(smem_ + Smem::probabilities + buffers_.index * kRowBoxBytes, warp_, lane_, probabilities,
                                     is_refined);
        fence_async_proxy();
    }

    template <class Reduce>
    MLA_DEVICE void across_warps(float (&values)[kThreadRows], Reduce reduce) const {
        reduce_across_warps(smem_ + Smem::exchange, warp_, lane_, kScoresBarrier, values, reduce);
    }

    // By lanes that together have all rows.
    MLA_DEVICE void store_of_rows(u32 place, u32 buffer, const float (&values)[kThreadRows]) const {
        if (thread_ >= kRowLanes) return;
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            store_shared_f32(smem_ + place + (buffer * kRows + row_of_lane(lane_, i)) * sizeof(f32), values[i]);
    }

    u32 last_ = 0;  // buffer of the tile before
    Buffers buffers_;
};

}  // namespace mla
