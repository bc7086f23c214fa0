// The scores warpgroup of the wide prefill kernel: S = Q K^T for one tile after the other, online softmax, P to shared memory.
#pragma once
#include "decode/gathered/output.h"
#include "decode/gathered/prefill_smem.h"
#include "decode/gathered/results.h"
#include "decode/gathered/valid_mask.h"
#include "decode/gathered/work.h"
#include "decode/wide/softmax.h"
#include "ptx/convert.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

class ScoresRole {
    using Results = SinkAndLargest;

public:
    MLA_DEVICE ScoresRole(const GatherParams& params, u32 smem) : params_(params), smem_(smem) {}

    MLA_DEVICE void run_item(i32 item) {
        float maximum[2] = {minus_infinity(), minus_infinity()};
        float sum[2] = {0.0f, 0.0f};
        u32 q[kRegisterSteps][4];
        i32 tiles;
        Results results;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
            if (work.is_refined()) mark_refined(maximum);
            if (tiles > 0) read_query(q);
        }
        float scores[kThreadScores];
        bool first = true;
        for (; tiles > 0; --tiles) {
            multiply(q, scores, !first);
            hide_absent(load_shared_8b(smem_ + WideSmem::valid + ring_.stage * kValidBytes), scores);
            softmax(tiles == 1, !kRefines && first, item, scores, maximum, sum, results);
            store_probabilities(is_refined(maximum), scores);
            first = false;
            ring_.advance();
            publish(tiles == 1);
        }
        if (!first) release_probabilities();
        store_results(load_block_work(params_, item), first_row(), maximum, sum, results);
    }

private:
    // From the special register each time, pinned: no register is left to keep them, or what comes of them, in.
    static MLA_DEVICE u32 thread() {
        u32 thread = threadIdx.x;
        pin_register(thread);
        return thread;
    }
    static MLA_DEVICE u32 lane() { return thread() % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return thread() / kWarpThreads; }
    static MLA_DEVICE u32 first_row() { return warp() * 16 + lane() / 4; }

    MLA_DEVICE bool tile_has_come() const {
        return mbarrier_test_wait(tile_full(smem_, ring_.stage), ring_.parity);
    }

    // It comes through the ring, in the item's first stage. Each warp reads and stores its own 16 rows.
    MLA_DEVICE void read_query(u32 (&q)[kRegisterSteps][4]) {
        mbarrier_wait(tile_full(smem_, ring_.stage), ring_.parity);
        const u32 stage = stage_address(smem_, ring_.stage);
        const u32 row = warp() * 16 + lane() % 16;  // that this lane gives the address of, as of the chunk
        const u32 chunk = lane() / 16;
#pragma unroll
        for (u32 step = 0; step < kSteps; ++step) {
            const u32 address = stage + latent_row(row, step / kBoxSteps) + ((step % kBoxSteps * 2 + chunk ^ row % kAtomRows) << 4);
            if (step < kRegisterSteps) {
                load_matrix_x4(address, q[step]);
            } else {
                u32 words[4];
                load_matrix_x4(address, words);
                store_matrix_x4(smem_ + WideSmem::q_steps + (step - kRegisterSteps) * kQStepBytes + q_step_chunk_offset(row, chunk),
                                words[0], words[1], words[2], words[3]);
            }
        }
        mbarrier_arrive(probabilities_full(smem_, ring_.stage));  // the stage's lap ends here
        // Every lane frees what it has read itself, as often as values threads else do: racecheck follows whoever reads and arrives.
#pragma unroll
        for (u32 i = 0; i < kTileReleases / kWarpgroupThreads; ++i) mbarrier_arrive(tile_empty(smem_, ring_.stage));
        ring_.advance();
        tile_is_visible_ = false;
        fence_async_proxy();
        named_barrier_sync(kScoresBarrier, kWarpgroupThreads);
    }

    template <u32 Begin, u32 End>
    MLA_DEVICE void issue_steps(const u32 (&q)[kRegisterSteps][4], float (&scores)[kThreadScores], u64 k) {
#pragma unroll
        for (u32 step = Begin; step < End; ++step) {
            const u64 k_step = k + descriptor_offset(step / kBoxSteps * kSwizzleAtomBytes + step % kBoxSteps * kStepBytes);
            if (step < kRegisterSteps)
                wgmma_rs<Operand, 0>(scores, q[step][0], q[step][1], q[step][2], q[step][3], k_step, step > 0);
            else
                wgmma_ss<Operand, 0, 0>(scores,
                                        descriptor_at(kQStepKMajor, smem_ + WideSmem::q_steps) +
                                            descriptor_offset((step - kRegisterSteps) * kQStepBytes),
                                        k_step, 1);
        }
    }

    // scores = Q K^T of the tile at ring_; releases the previous tile's P on the way, or at once if the tile is late.
    MLA_DEVICE void multiply(const u32 (&q)[kRegisterSteps][4], float (&scores)[kThreadScores], bool release_previous) {
        const u64 k = descriptor_at(kLatentKMajor, stage_address(smem_, ring_.stage));
        if (!tile_is_visible_) {
            if (!tile_has_come()) {
                if (release_previous) release_probabilities();
                release_previous = false;
                mbarrier_wait(tile_full(smem_, ring_.stage), ring_.parity);
            }
            fence_async_proxy();
        }
        wgmma_pin(scores);
        wgmma_fence();
        issue_steps<0, kSteps - kStepsAfterRelease>(q, scores, k);
        wgmma_commit();
        issue_steps<kSteps - kStepsAfterRelease, kSteps>(q, scores, k);
        wgmma_commit();
        wgmma_wait<1>();
        if (release_previous) release_probabilities();
        wgmma_wait<0>();
        wgmma_pin(scores);
    }

    // As decode/wide/softmax.h has it, but that a quad's maximum is looked for only where some row of the warp may outgrow its own,
    // and that the factors by which rows of O must be rescaled first go to shared memory at once.
    MLA_DEVICE void softmax(bool is_last, bool is_first, i32 item, float (&scores)[kThreadScores], float (&maximum)[2],
                            float (&sum)[2], Results& results) {
        float tile_maximum[2];
        bool outgrows = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float pair[2];
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                pair[odd] = scores[score_index(half, odd)];
#pragma unroll
                for (int i = 2 + odd; i < 16; i += 2) pair[odd] = fmaxf(pair[odd], scores[score_index(half, i)]);
            }
            tile_maximum[half] = fmaxf(pair[0], pair[1]) * params_.scale_log2;
            results.see(half, tile_maximum[half]);
            outgrows |= tile_maximum[half] > maximum[half] + kRescaleThreshold;
        }
        float rescale[2] = {1.0f, 1.0f};
        if (__any_sync(kFullWarp, outgrows)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float largest = quad_max(tile_maximum[half]);
                if (largest > maximum[half] + kRescaleThreshold) {
                    rescale[half] = fast_exp2(maximum[half] - largest);
                    maximum[half] = largest;
                    sum[half] *= rescale[half];
                }
            }
        }
        if (is_refined(maximum)) rescale[1] = -rescale[0];
        store_factors(rescale);
        float tile_sum[2][2] = {};
        const float shift[2] = {maximum[0] == minus_infinity() ? 0.0f : maximum[0], maximum[1] == minus_infinity() ? 0.0f : maximum[1]};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& score = scores[score_index(half, i)];
                score = fast_exp2(fmaf(score, params_.scale_log2, -shift[half]));
                tile_sum[half][i % 2] += score;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) sum[half] += tile_sum[half][0] + tile_sum[half][1];
        if (is_last) normalise(is_first, item, scores, maximum, sum);
    }

    MLA_DEVICE u32 factor_address() const {
        return smem_ + WideSmem::factors + (ring_.stage * kRows + first_row()) * sizeof(f32);
    }

    MLA_DEVICE void store_factors(const float (&factors)[2]) const {
        if (lane() % 4 != 0) return;
        store_shared_f32(factor_address(), factors[0]);
        store_shared_f32(factor_address() + 8 * sizeof(f32), factors[1]);
    }

    // The division by the sum, in an item's last tile; of its only one, of O.
    MLA_DEVICE void normalise(bool is_only, i32 item, float (&scores)[kThreadScores], const float (&maximum)[2],
                              float (&sum)[2]) {
        const auto sinks = Results::load_sinks(params_, true, item, first_row());
        float factors[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] = quad_sum(sum[half]);
            factors[half] = sum[half] == 0.0f ? 0.0f : sinks.normalise(half, sum[half], maximum[half]);  // NaN stays NaN
        }
        if (is_refined(maximum)) factors[1] = factors[0];
        if (is_only) {
            factors[0] = -fabsf(factors[0]);
            store_factors(factors);
            return;
        }
#pragma unroll
        for (int i = 0; i < kThreadScores; ++i) scores[i] *= factors[i / 2 % 2];
        if (lane() % 4 != 0) return;
        factors[0] *= load_shared_f32(factor_address());
        factors[1] *= load_shared_f32(factor_address() + 8 * sizeof(f32));
        store_shared_f32(factor_address(), factors[0]);
        store_shared_f32(factor_address() + 8 * sizeof(f32), factors[1]);
    }

    // P of the tile at ring_.
    MLA_DEVICE void store_probabilities(bool is_refined, const float (&probabilities)[kThreadScores]) {
        const u32 box = stage_address(smem_, ring_.stage) + kProbabilities;
        const u32 matrix_row = warp() * 16 + lane() % 16;
        const u32 matrix_chunk = lane() / 16;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // 16 columns: chunks 2 * pair and 2 * pair + 1
            u32 words[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float* p = probabilities + (pair * 2 + j) * 4;
                words[j * 2] = pack2<Operand>(p[0], p[1]);
                words[j * 2 + 1] =
                    is_refined ? rest2<Operand>(words[j * 2], p[0], p[1]) : pack2<Operand>(p[2], p[3]);
            }
            store_matrix_x4(box + box_chunk_offset(matrix_row, pair * 2 + matrix_chunk), words[0], words[1], words[2],
                            words[3]);
        }
    }

    // Lets wgmma see P. Gathered tiles too are written by threads, and wgmma sees them only past a proxy fence: if the next one has
    // come by now, this fence will do for both.
    MLA_DEVICE void publish(bool is_last) {
        tile_is_visible_ = !is_last && tile_has_come();
        fence_async_proxy();
        __syncwarp();
    }

    // Of the tile before ring_'s: a tile's P is released while the next tile is being multiplied. Every lane releases what it wrote
    // itself.
    MLA_DEVICE void release_probabilities() {
        mbarrier_arrive(probabilities_full(smem_, ring_.stage == 0 ? kStages - 1 : ring_.stage - 1));
    }

    MLA_DEVICE void store_results(const BlockWork& work, u32 row, const float (&maximum)[2], const float (&sum)[2],
                                  Results& results) {
        results.finish();
        GatheredOutput::wait_for_room();
        if (lane() % 4 != 0) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 in_block = row_at(work, row + half * 8);
            if (!row_exists(work, in_block)) continue;
            *lse_row(params_, work, in_block) = lse_of(params_, work, maximum[half], sum[half]);
            results.store(params_, work, in_block, half);
        }
    }

    const GatherParams& params_;
    u32 smem_;
    RingPosition ring_;
    bool tile_is_visible_ = false;  // the one at ring_, to wgmma
};

}  // namespace mla
