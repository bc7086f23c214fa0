// The scores warpgroup of the narrow kernel for gathered tokens: S^T = K Q^T, softmax, P; it is up to two tiles ahead of PV.
#pragma once
#include "decode/gathered/narrow_load.h"
#include "decode/gathered/narrow_work.h"
#include "decode/masks.h"
#include "decode/narrow/store.h"
#include "decode/rows.h"

namespace mla {

class ScoresRole {
public:
    MLA_DEVICE ScoresRole(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), thread_(thread), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads) {}

    // Items that have tiles. Q of the next is on its way once QK of an item's last tile is done.
    MLA_DEVICE void run(const Items& items) {
        i32 item = items.first();
        BlockWork work = next_work(params_, items, item);
        if (work.has_tiles()) copy_query(work);
        while (work.has_tiles()) {
            const BlockWork next = next_work(params_, items, item);
            run_item(work, next);
            work = next;
        }
    }

private:
    // The statistics, and the largest score that this thread has seen of each row: the maximum may lag behind.
    struct Rows : RowStatistics {
        float largest[kThreadRows];
        MLA_DEVICE Rows() {
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) largest[i] = minus_infinity();
        }
    };

    MLA_DEVICE void barrier() const { named_barrier_sync(kScoresBarrier, kWarpgroupThreads); }

    // Rows that do not exist are zeros. All warps are done with the Q before: the barrier of the last tile's P followed.
    MLA_DEVICE void copy_query(const BlockWork& work) const {
        const u32 chunk = thread_ % kChunksPerBoxRow;
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
            const u32 row_in_block = thread_ / kChunksPerBoxRow + pass * kRowsPerPass;
            const QueryRow row = query_row(params_, work, row_in_block, chunk * kChunkColumns);
            const u32 destination = smem_ + Smem::query + box_chunk_offset(row_in_block, chunk);
            const u32 bytes = row.exists ? 16 : 0;
#pragma unroll
            for (u32 box = 0; box < kTileBoxes; ++box)
                copy_async_16b<false>(destination + box * kRowBoxBytes,
                                      box < kLatentBoxes ? row.latent + box * kBoxColumns
                                                         : row.rope + (box - kLatentBoxes) * kBoxColumns,
                                      bytes);
        }
    }

    MLA_DEVICE void run_item(const BlockWork& work, const BlockWork& next) {
        copy_async_wait();
        fence_async_proxy();
        barrier();  // Q is complete before any warp's wgmma reads it
        Rows rows;
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            float scores[kFragment];
            multiply(scores);
            wgmma_wait<0>();
            wgmma_pin(scores);
#pragma unroll
            for (u32 i = 0; i < kFragment; ++i) scores[i] *= params_.scale_log2;
            if constexpr (kByRequest)
                hide_unseen(work, tile, scores);
            else
                hide(scores);
            const u32 buffer = buffers_.index;
            softmax(tile == work.tile_begin, scores, rows);
            ring_.advance();
            buffers_.advance();
            if (tile + 1 < work.tile_end) continue;
            if (next.has_tiles()) copy_query(next);
            finish(work, buffer, rows);
        }
    }

    // S^T of the tile at ring_, group by group as they land.
    MLA_DEVICE void multiply(float (&scores)[kFragment]) const {
        const u64 query = descriptor_at(kBoxKMajor, smem_ + Smem::query);
        wgmma_pin(scores);
#pragma unroll
        for (u32 group = 0; group < kTileGroups; ++group) {
            const GroupRing::Place place = ring_.place(group);
            mbarrier_wait(full_barrier(smem_, place.index), place.parity);
            fence_async_proxy();  // cp.async writes as ordinary stores do
            wgmma_fence();
#pragma unroll
            for (u32 box = group * kGroupBoxes; box < (group + 1) * kGroupBoxes; ++box)
                multiply_box(box, box_address(smem_, ring_, box), query, scores);
        }
        wgmma_commit();
    }

    // What is no token. Its values are zeros already.
    MLA_DEVICE void hide(float (&scores)[kFragment]) const {
        const u32 valid = load_shared_u32(valid_word(smem_, ring_, warp_));
        if (valid == kAllValid) return;
        const bool has_upper = valid >> (lane_ / 4) & 1;
        const bool has_lower = valid >> (lane_ / 4 + 8) & 1;
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            float& upper = scores[row_element(i)];
            float& lower = scores[row_element(i) + 2];
            upper = has_upper ? upper : minus_infinity();
            lower = has_lower ? lower : minus_infinity();
        }
    }

    // By request: what is past a row's end, as in decode/narrow/consumer.h. Nothing else is hidden; a page outside of the cache is
    // zeros.
    MLA_DEVICE void hide_unseen(const BlockWork& work, i32 tile, float (&scores)[kFragment]) const {
        const i32 first_key = tile * kTileTokens;
        if (first_key + static_cast<i32>(kTileTokens) <= block_visible_end(params_, work)) return;
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

    // P is first made with the old maxima, which nearly always stand; the one barrier that publishes it also tells whether any
    // row outgrew its own.
    MLA_DEVICE void softmax(bool is_first, const float (&scores)[kFragment], Rows& rows) {
        float probabilities[kFragment];
        float maxima[kThreadRows];  // of this thread's scores
        column_maxima(scores, maxima);
        if (!kIsPlanned) {
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.largest[i] = fmaxf(rows.largest[i], maxima[i]);
        }
        mbarrier_wait(probabilities_empty_barrier(smem_, buffers_.index), buffers_.parity ^ 1);
        bool moves = is_first;
        if (!is_first) {
            bool outgrown = false;
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) outgrown |= maxima[i] > rows.maximum[i] + kRescaleThreshold;
            store_probabilities(scores, rows, probabilities);
            moves = named_barrier_or(kScoresBarrier, kWarpgroupThreads, outgrown);
        }
        if (moves) {
            float factor[kThreadRows];
            across_warps(maxima, [](float a, float b) { return fmaxf(a, b); });
            rows.raise(maxima, factor);
            store_probabilities(scores, rows, probabilities);
            store_of_rows(Smem::factors, buffers_.index, factor);
            barrier();  // all of P is written; and all have read the maxima
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) rows.sum[i] *= factor[i];
        }
        if (thread_ < kRowLanes) {
            if (thread_ == 0) store_shared_u32(smem_ + Smem::rescales + buffers_.index * sizeof(u32), moves && !is_first);
            mbarrier_arrive(probabilities_full_barrier(smem_, buffers_.index));
        }
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            rows.sum[i] += probabilities[row_element(i)] + probabilities[row_element(i) + 2];
    }

    MLA_DEVICE void store_probabilities(const float (&scores)[kFragment], const RowStatistics& rows,
                                        float (&probabilities)[kFragment]) const {
        exponentiate(scores, rows, probabilities);
        store_fragment_transposed<Operand>(smem_ + Smem::probabilities + buffers_.index * kRowBoxBytes, warp_, lane_,
                                           probabilities);
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

    // The sums' inverses to the values warpgroup, then lse and largest scores. `buffer` is that of the last tile.
    MLA_DEVICE void finish(const BlockWork& work, u32 buffer, Rows& rows) const {
        float inverse[kThreadRows];
        across_warps(rows.sum, [](float a, float b) { return a + b; });
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            inverse[i] = rows.sum[i] == 0.0f ? 0.0f : 1.0f / with_sink(work, row_of_lane(lane_, i), rows.maximum[i], rows.sum[i]);
        store_of_rows(Smem::inverse_sums, buffer, inverse);
        if (thread_ < kRowLanes) mbarrier_arrive(sums_full_barrier(smem_, buffer));
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            if (i % kWarpgroupWarps != warp_ || lane_ >= kRowLanes) continue;  // all warps know all rows: each writes some
            store_lse(params_, work, row_of_lane(lane_, i), lse_of(params_, work, rows.maximum[i], rows.sum[i]));
        }
        if (kIsPlanned || params_.max_logits == nullptr) return;
        barrier();  // all have read the sums
        across_warps(rows.largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            if (i % kWarpgroupWarps != warp_ || lane_ >= kRowLanes) continue;
            store_max_logit(params_, work, row_of_lane(lane_, i), rows.largest[i] * kLn2);
        }
    }

    // What a row's sum is divided by: a sink is one more score, of a key without value. A partial result is without: the merge
    // adds it.
    MLA_DEVICE float with_sink(const BlockWork& work, i32 row_in_block, float maximum, float sum) const {
        if (params_.attn_sink == nullptr || work.is_partial()) return sum;
        const RowPlace row = locate_row(params_, work, row_in_block);
        return row.exists ? sum + fast_exp2(__ldg(params_.attn_sink + row.head) * kLog2e - maximum) : sum;
    }

    const GatherParams& params_;
    u32 smem_, thread_, warp_, lane_;
    GroupRing ring_;
    Buffers buffers_;
};

}  // namespace mla
