// The consumer warpgroup of the narrow kernel: S^T = K Q^T for one tile, softmax, O^T += V^T P^T, then the next tile;
// swapped.h has the arithmetic.
#pragma once
#include "decode/masks.h"
#include "decode/narrow/scaled_partial.h"
#include "decode/narrow/smem.h"
#include "decode/narrow/store.h"
#include "decode/narrow/swapped.h"
#include "ptx/launch.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

class ConsumerRole {
public:
    MLA_DEVICE ConsumerRole(const DecodeParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), thread_(thread), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads) {}

    // Waits for the kernels ahead once it knows where the queries lie.
    MLA_DEVICE void run_item(const BlockWork& work) {
        if (work.tile_begin >= work.tile_end) {
            pdl_wait();
            store_empty(params_, work, thread_);
            return;
        }
        load_query(work);
        float output[kLatentBoxes][kFragment];
        RowStatistics rows;
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            const bool is_first = tile == work.tile_begin;
            float scores[kFragment];
            issue_scores(scores);
            wgmma_wait<0>();
            wgmma_pin(scores);
            scale_and_mask(work, tile, scores);
            clear_dead_values(work, tile);
            softmax(is_first, work.is_refined(), scores, rows, output);
            issue_values(!is_first, output);
            wgmma_wait<0>();
#pragma unroll
            for (u32 box = 0; box < kLatentBoxes; ++box) wgmma_pin(output[box]);
            release_tile();
        }
        store(work, rows, output);
    }

private:
    MLA_DEVICE void barrier() const { named_barrier_sync(kConsumerBarrier, kConsumerThreads); }

    MLA_DEVICE void load_query(const BlockWork& work) {
        // The space still holds the previous item's output. No barrier is needed before this: a thread overwrites only the
        // chunks that it has read itself (QueryRows and store_output_rows deal them out alike).
        QueryRows query;
        query.find(params_, work, thread_);
        pdl_wait();
        query.read();
        query.write(smem_ + NarrowSmem::query, thread_);
        fence_async_proxy();
        barrier();  // Q is complete before any warp's wgmma reads it
    }

    // S^T of the tile at ring_, box by box as they land.
    MLA_DEVICE void issue_scores(float (&scores)[kFragment]) const {
        const u64 q = descriptor_at(kBoxKMajor, smem_ + NarrowSmem::query);
        wgmma_pin(scores);
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            const BoxRing::Slot slot = ring_.slot(box);
            mbarrier_wait(full_barrier(smem_, slot.index), slot.parity);
            wgmma_fence();
            multiply_box(box, box_address(smem_, slot.index), q, scores);
        }
        wgmma_commit();
    }

    // To log2 units. Hidden scores are overwritten, not added to: K past a sequence's end may be NaN.
    MLA_DEVICE void scale_and_mask(const BlockWork& work, i32 tile, float (&scores)[kFragment]) const {
#pragma unroll
        for (u32 i = 0; i < kFragment; ++i) scores[i] *= params_.scale_log2;
        const i32 first_key = tile * kTileTokens;
        if (first_key + kTileTokens <= block_visible_end(params_, work)) return;
        const i32 key = first_key + static_cast<i32>(warp_ * kWarpTokens + lane_ / 4);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const i32 end = row_visible_end(params_, work, row_of_lane(lane_, i));
            float& upper = scores[row_element(i)];
            float& lower = scores[row_element(i) + 2];
            upper = key < end ? upper : minus_infinity();
            lower = key + 8 < end ? lower : minus_infinity();
        }
    }

    // V rows past the sequence's end may be NaN or left over from another tile, and 0 * NaN is NaN. Each warp clears the
    // tokens that its own share of QK has read. Followed by the fence and the barrier of store_probabilities.
    MLA_DEVICE void clear_dead_values(const BlockWork& work, i32 tile) const {
        const i32 first_dead = work.seqlen_k - tile * kTileTokens;
        if (first_dead >= kTileTokens) return;
        constexpr u32 kRowsPerWarpPass = kWarpThreads / kChunksPerBoxRow;
        for (u32 row = lane_ / kChunksPerBoxRow; row < kWarpTokens; row += kRowsPerWarpPass) {
            const u32 token = warp_ * kWarpTokens + row;
            if (static_cast<i32>(token) < first_dead) continue;
            const u32 offset = token * kBoxRowBytes + lane_ % kChunksPerBoxRow * 16;
#pragma unroll
            for (u32 box = 0; box < kLatentBoxes; ++box)
                store_shared_16b(box_address(smem_, ring_.slot(box).index) + offset, uint4{0, 0, 0, 0});
        }
    }

    // Scores to P in shared memory, statistics, and O rescaled when a maximum moved. P is first made with the old
    // maxima, which nearly always stand; the one barrier that publishes it also tells whether any row outgrew its own.
    MLA_DEVICE void softmax(bool is_first, bool is_refined, const float (&scores)[kFragment], RowStatistics& rows,
                            float (&output)[kLatentBoxes][kFragment]) {
        float probabilities[kFragment];
        bool move_maxima = is_first;
        if (!is_first) {
            bool outgrown = false;
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) {
                const float limit = rows.maximum[i] + kRescaleThreshold;  // -inf: any visible key moves it
                outgrown |= fmaxf(scores[row_element(i)], scores[row_element(i) + 2]) > limit;
            }
            store_probabilities(is_refined, scores, rows, probabilities);
            // All of P (and of clear_dead_values) is written before any warp's PV; all warps are done with the PV of the
            // tile before, whose P buffer the next tile writes.
            move_maxima = named_barrier_or(kConsumerBarrier, kConsumerThreads, outgrown);
        }
        if (move_maxima) {
            float factor[kThreadRows];
            raise_maxima(scores, rows, factor);
            store_probabilities(is_refined, scores, rows, probabilities);
            barrier();  // as above, for the new P; and all have read the maxima of raise_maxima
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.sum[i] *= factor[i];
            if (is_refined) share_factors(factor);
            if (!is_first) rescale(factor, output);
        }
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            rows.sum[i] += probabilities[row_element(i)] + probabilities[row_element(i) + 2];
    }

    MLA_DEVICE void store_probabilities(bool is_refined, const float (&scores)[kFragment], const RowStatistics& rows,
                                        float (&probabilities)[kFragment]) const {
        exponentiate(scores, rows, probabilities);
        store_fragment_transposed<Operand>(probability_buffer(), warp_, lane_, probabilities, is_refined);
        fence_async_proxy();
    }

    // Moves the maxima of the rows whose tile maximum is above the threshold; factor = 2^(old - new), 1 if it stays.
    MLA_DEVICE void raise_maxima(const float (&scores)[kFragment], RowStatistics& rows, float (&factor)[kThreadRows]) const {
        float tile_maximum[kThreadRows];
        column_maxima(scores, tile_maximum);
        across_warps(tile_maximum, [](float a, float b) { return fmaxf(a, b); });
        rows.raise(tile_maximum, factor);
    }

    template <class Reduce>
    MLA_DEVICE void across_warps(float (&values)[kThreadRows], Reduce reduce) const {
        reduce_across_warps(smem_ + NarrowSmem::exchange, warp_, lane_, kConsumerBarrier, values, reduce);
    }

    // O^T += V^T P^T of the tile at ring_: one box of V is one M block of O^T.
    MLA_DEVICE void issue_values(bool accumulate, float (&output)[kLatentBoxes][kFragment]) const {
        const u64 p = descriptor_at(kBoxKMajor, probability_buffer());
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) wgmma_pin(output[box]);
        wgmma_fence();
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) {
            accumulate_box(box_address(smem_, ring_.slot(box).index), p, accumulate, output[box]);
        }
        wgmma_commit();
    }

    // This warp's wgmmas have read the tile for the last time. Lane b frees the slot of box b.
    MLA_DEVICE void release_tile() {
        __syncwarp();
        if (lane_ < kTileBoxes) mbarrier_arrive(empty_barrier(smem_, ring_.slot(lane_).index));
        ring_.advance();
        odd_tile_ ^= 1;
    }

    // Two buffers: while a slow warp's PV still reads P of one tile, a fast warp may already write P of the next. It
    // cannot get further ahead: every tile has a barrier between its P and its PV.
    MLA_DEVICE u32 probability_buffer() const { return smem_ + NarrowSmem::probabilities + odd_tile_ * kRowBoxBytes; }

    // Normalises, turns O^T into rows through the space of Q (dead: a barrier followed the last QK), writes O and lse.
    MLA_DEVICE void store(const BlockWork& work, const RowStatistics& rows, float (&output)[kLatentBoxes][kFragment]) const {
        float sum[kThreadRows];
        float inverse[kThreadRows];
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) sum[i] = rows.sum[i];
        across_warps(sum, [](float a, float b) { return a + b; });
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) inverse[i] = sum[i] == 0.0f ? 0.0f : fast_reciprocal(sum[i]);
        if (work.is_refined()) add_refinement(output);
        if (kPartialIsFloat && work.is_partial()) {
            rescale(inverse, output);
            store_float_partial(params_, work, warp_, lane_, output);
            store_lses(work, rows, sum, kUsualMark);
            barrier();  // all have read the sums of across_warps
        } else {
            store_rows(work, rows, sum, inverse, output);
        }
    }

    // Whether fp16 holds a partial result well is looked at when it is on its way already; where it does not, which is rare, it is
    // divided by other powers of two and stored once more.
    MLA_DEVICE void store_rows(const BlockWork& work, const RowStatistics& rows, const float (&sum)[kThreadRows],
                               float (&inverse)[kThreadRows], const float (&output)[kLatentBoxes][kFragment]) const {
        const u32 staged = smem_ + NarrowSmem::query;
        const auto place = [staged](u32 box) { return staged + box * kRowBoxBytes; };
        if (kPowerIsInLse) multiply(inverse, work.is_partial() ? kUsualFactor : 1.0f);
        u32 mark = kUsualMark;
        for (bool is_again = false;; is_again = true) {
            if (kPartialIsScaled && __any_sync(kFullWarp, work.is_partial()))  // as the compiler sees, all lanes or none
                stage_product<Fp16>(place, warp_, lane_, inverse, output);
            else
                stage_product<Output>(place, warp_, lane_, inverse, output);
            store_lses(work, rows, sum, mark);
            barrier();  // all of the output is staged; and all have read the sums of across_warps
            store_staged_output(params_, work, staged, thread_);
            if (!kPartialIsScaled || !work.is_partial() || is_again) return;
            const u32 exponent = exponent_of(bound_of_product(inverse, output));
            if (fits(exponent)) return;
            if constexpr (kPowerIsInLse) {
                mark = mark_for(largest_exponent(exponent));
                multiply(inverse, factor_of(mark));
            } else {
                mark = kScaledMark;
                const u32 divisor = divisor_for(exponent);
                if (lane_ < kRows && row_exists(work, lane_)) partial_exponents(params_, work, lane_)[warp_] = divisor;
                multiply(inverse, inverse_power(divisor));
            }
        }
    }

    // Whether fp16 holds well what all warps have, of these exponents; all of them have read what is staged. Of one power for all,
    // no warp needs another if what it has is small beside others'.
    MLA_DEVICE bool fits(u32 exponent) const {
        const bool is_unfit = is_too_large(exponent) || (!kPowerIsInLse && is_too_small(exponent));
        if (named_barrier_or(kConsumerBarrier, kConsumerThreads, is_unfit)) return false;
        return !kPowerIsInLse || named_barrier_or(kConsumerBarrier, kConsumerThreads, !is_too_small(exponent));
    }

    MLA_DEVICE u32 largest_exponent(u32 exponent) const {
        const u32 exchange = smem_ + NarrowSmem::exchange;
        if (lane_ == 0) store_shared_u32(exchange + warp_ * sizeof(u32), exponent);
        barrier();  // that of every warp is there; the next item's use of the space is behind more of them
#pragma unroll
        for (u32 warp = 0; warp < kConsumerWarps; ++warp) {
            const u32 other = load_shared_u32(exchange + warp * sizeof(u32));
            exponent = exponent > other ? exponent : other;
        }
        return exponent;
    }

    // All warps know all rows: each writes some. Chosen, not branched to: code that runs once waits for each line of it.
    MLA_DEVICE void store_lses(const BlockWork& work, const RowStatistics& rows, const float (&sum)[kThreadRows],
                               u32 mark) const {
#pragma unroll
        for (u32 first = 0; first < kThreadRows; first += kConsumerWarps) {
            float maximum = rows.maximum[first], own = sum[first];
#pragma unroll
            for (u32 warp = 1; warp < kConsumerWarps; ++warp) {
                maximum = warp_ == warp ? rows.maximum[first + warp] : maximum;
                own = warp_ == warp ? sum[first + warp] : own;
            }
            if (lane_ < 4)
                store_lse(params_, work, row_of_lane(lane_, first + warp_), lse_of(params_, work, maximum, own), mark);
        }
    }

    const DecodeParams& params_;
    u32 smem_, thread_, warp_, lane_;
    u32 odd_tile_ = 0;
    BoxRing ring_;
};

}  // namespace mla
