// The scores warpgroup of the fp8 kernel: S^T = K Q^T for one tile after the other, online softmax, P in fp16 to shared
// memory. Operands are swapped, as in the narrow kernel.
#pragma once
#include "decode/fp8/tile_scores.h"
#include "ptx/wgmma_fp8.h"

namespace mla {

constexpr u32 kPartFragment = kQueryParts * kFragment;  // of the products of all parts of Q

class ScoresRole : TileScores {
public:
    MLA_DEVICE ScoresRole(const Fp8Params& params, u32 smem, u32) : TileScores(params, smem, threadIdx.x) {}

    // The item is read again where a mask or its end needs it: over its tiles it would cost registers.
    MLA_DEVICE void run_item(i32 item) {
        RowStatistics rows;
        Tiles tiles;
        bool split;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            if (!work.has_tiles()) {  // only a whole job is without tiles
                pdl_wait();
                if (threadIdx.x < kRows) store_lse(params_, work, threadIdx.x, empty_lse(params_, work));
                return;
            }
            const i32 first_key = work.tile_begin * kTileTokens;
            tiles = {work.tile_end - work.tile_begin, block_visible_end(params_, work) - first_key, work.seqlen_k - first_key};
            split = Fp8Query::make(params_, work, smem_, threadIdx.x, buffer_.is_at_start());
            if (kLaunchesLate && !kLaunchesFromLoader) pdl_launch_dependents();
        }
        float scale[kThreadRows];  // of the rows' scores, to log2 units
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            scale[i] = load_shared_f32(smem_ + Fp8Smem::row_scales + row_of_lane(lane_, i) * sizeof(f32));
        if (kSplitQuery && split)
            run_tiles<true>(item, tiles, scale, rows);
        else
            run_tiles<false>(item, tiles, scale, rows);
        finish(item, rows);
    }

private:
    static MLA_DEVICE void barrier() { named_barrier_sync(kScoresBarrier, kWarpgroupThreads); }

    // Of an item: tiles that are left, and keys, counted from the current tile, that all rows may see and that there are.
    struct Tiles {
        i32 left, visible_end, sequence_end;

        MLA_DEVICE void next() {
            --left;
            visible_end -= kTileTokens;
            sequence_end -= kTileTokens;
        }
    };

    template <bool Split>
    MLA_DEVICE void run_tiles(i32 item, Tiles tiles, const float (&scale)[kThreadRows], RowStatistics& rows) {
        const float rope_ratio = kRopeApart ? params_.rope_ratio() : 1.0f;
        for (bool is_first = true; tiles.left > 0; tiles.next(), is_first = false) {
            await_part(0);
            float scores[kFragment];
            if constexpr (Split)
                multiply_split(scores);
            else
                multiply_exact(rope_ratio, scores);
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) {
                scores[row_element(i)] *= scale[i];
                scores[row_element(i) + 2] *= scale[i];
            }
            if (tiles.visible_end < kTileTokens) mask(item, tiles.sequence_end, scores);
            __syncwarp();
            if (lane_ == 0) mbarrier_arrive(barrier_of(smem_, Fp8Smem::tile_empty, stage_.index()));
            softmax(is_first, scores, rows);
            stage_.advance();
            buffer_.advance();
        }
    }

    // On fp8 tensor cores, rows kRows.. of Q being the low parts, if there are any. Two sets of accumulators take turns: while one is
    // multiplied into, the other goes into float32 sums.
    MLA_DEVICE void multiply_split(float (&scores)[kFragment]) const {
        constexpr u32 kLatentSteps = kByteBoxes * kBoxSteps, kSteps = kLatentSteps + kRope / 32;
        constexpr u32 kGroups = (kSteps + kPromotionSteps - 1) / kPromotionSteps;
        const u32 stage = stage_address(smem_, stage_.index()), query = smem_ + Fp8Smem::query;
        const u64 k = descriptor_at(kLatentKMajor, stage), k_rope = descriptor_at(kRopeKMajor, stage + kStageRope);
        const u64 q = descriptor_at(kBoxKMajor, query), q_rope = descriptor_at(kRopeKMajor, query + kByteBoxes * kSplitBoxBytes);
        float part[2][kPartFragment];
#pragma unroll
        for (u32 i = 0; i < kFragment; ++i) scores[i] = 0.0f;
#pragma unroll
        for (u32 group = 0; group < kGroups; ++group) {
            float(&current)[kPartFragment] = part[group % 2];
            wgmma_pin(current);
            wgmma_fence();
#pragma unroll
            for (u32 i = 0; i < kPromotionSteps; ++i) {
                const u32 step = group * kPromotionSteps + i;
                if (step >= kSteps) break;
                const u32 box = step / kBoxSteps, in_box = step % kBoxSteps * kStepBytes;
                if (step < kLatentSteps)
                    wgmma_e4m3_ss(current, k + descriptor_offset(box_offset(box) + in_box),
                                  q + descriptor_offset(box * kSplitBoxBytes + in_box), i > 0);
                else
                    wgmma_e4m3_ss(current, k_rope + descriptor_offset(in_box), q_rope + descriptor_offset(in_box), i > 0);
            }
            wgmma_commit();
            if (group > 0) {
                wgmma_wait<1>();
                promote(part[(group - 1) % 2], scores);
            }
        }
        wgmma_wait<0>();
        promote(part[(kGroups - 1) % 2], scores);
    }

    static MLA_DEVICE void promote(float (&part)[kPartFragment], float (&scores)[kFragment]) {
        wgmma_pin(part);
#pragma unroll
        for (u32 i = 0; i < kFragment; ++i)
            scores[i] += kQueryParts == 1 ? part[i] : fmaf(part[kPartFragment - kFragment + i], 1.0f / kLowPart, part[i]);
    }

    // Scores to P in shared memory, statistics, and the factors by which O is to be rescaled. P is first made with the old
    // maxima, which nearly always stand; a vote tells whether any row outgrew its own.
    MLA_DEVICE void softmax(bool is_first, const float (&scores)[kFragment], RowStatistics& rows) {
        float probabilities[kFragment];
        float maxima[kThreadRows];
        mbarrier_wait(barrier_of(smem_, Fp8Smem::probabilities_empty, buffer_.index()), buffer_.parity() ^ 1);
        column_maxima(scores, maxima);
        bool move_maxima = is_first;
        if (!is_first) {
            bool outgrown = false;
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i)
                outgrown |= maxima[i] > rows.maximum[i] + kRescaleThreshold;  // from -inf any visible key moves it
            store_probabilities(buffer_.index(), scores, rows, probabilities);
            move_maxima = named_barrier_or(kScoresBarrier, kWarpgroupThreads, outgrown);
        }
        if (move_maxima) {
            float factor[kThreadRows];
            across_warps(maxima, [](float a, float b) { return fmaxf(a, b); });
            rows.raise(maxima, factor);
            store_probabilities(buffer_.index(), scores, rows, probabilities);
            const u32 factors = smem_ + Fp8Smem::factors + buffer_.index() * kRows * sizeof(f32);
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i) {
                rows.sum[i] *= factor[i];
                if (warp_ == 0 && lane_ < 4) store_shared_f32(factors + row_of_lane(lane_, i) * sizeof(f32), factor[i]);
            }
        }
        u32 thread = threadIdx.x;
        pin_register(thread);  // else the kernel keeps whether it is 0, from its beginning on
        if (thread == 0) {  // of an item's first tile there is nothing to rescale
            store_shared_u32(smem_ + Fp8Smem::moved + buffer_.index() * sizeof(u32), move_maxima && !is_first);
        }
        mbarrier_arrive(barrier_of(smem_, Fp8Smem::probabilities_full, buffer_.index()));
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            rows.sum[i] += probabilities[row_element(i)] + probabilities[row_element(i) + 2];
    }

    template <class Reduce>
    MLA_DEVICE void across_warps(float (&values)[kThreadRows], Reduce reduce) const {
        reduce_across_warps(smem_ + Fp8Smem::exchange, warp_, lane_, kScoresBarrier, values, reduce);
    }

    // The item is there when the sums are.
    MLA_DEVICE void finish(i32 item, const RowStatistics& rows) {
        const BlockWork work = load_block_work(params_, item);
        const f32 latent_scale = params_.latent_scale();
        barrier();  // all have read the maxima
        float sum[kThreadRows];
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) sum[i] = rows.sum[i];
        across_warps(sum, [](float a, float b) { return a + b; });
        mbarrier_wait(smem_ + Fp8Smem::sums_empty, items_parity_ ^ 1);
        items_parity_ ^= 1;
        serve(work, latent_scale, rows.maximum, sum, 0);
    }

    u32 items_parity_ = 0;
    RingPosition<kProbabilityBuffers> buffer_;
};

}  // namespace mla
