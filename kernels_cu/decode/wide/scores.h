// The scores warpgroup: S = Q K^T for one tile after the other, online softmax, P to shared memory.
#pragma once
#include "decode/masks.h"
#include "decode/wide/query.h"
#include "decode/wide/smem.h"
#include "decode/wide/softmax.h"
#include "ptx/convert.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

class ScoresRole {
public:
    MLA_DEVICE ScoresRole(const DecodeParams& params, u32 smem)
        : params_(params), smem_(smem) {}

    MLA_DEVICE void run_item(i32 item) {
        const u32 row = warp() * 16 + lane() / 4;
        float maximum[2] = {minus_infinity(), minus_infinity()};
        float sum[2] = {0.0f, 0.0f};
        u32 q[kRegisterSteps][4];
        i32 tiles;
        VisibleEnds ends;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
            if (!kCausal) ends = visible_ends(work, row);
            if (tiles > 0) read_query(work, row, q);
        }
        // A causal item is read again: no register is left to keep it, or what comes of it, in while Q is loaded.
        if (kCausal) ends = visible_ends(load_block_work(params_, item), row);
        float scores[kThreadScores];
        bool first = true;
        for (; tiles > 0; --tiles) {
            multiply(q, scores, !first);
            named_barrier_sync(kScoresBarrier, kWarpgroupThreads);  // all warps are done with this stage's rope box
            mask(item, tiles, ends, scores);
            ends.next_tile();
            const RowFactors factors = softmax(tiles == 1, params_.scale_log2, scores, maximum, sum);
            store_probabilities(row, scores, factors);
            first = false;
            ring_.advance();
        }
        if (!first) release_probabilities();
        store_lse(load_block_work(params_, item), row, maximum, sum);
    }

private:
    // From the special register each time: no register is left to keep them in.
    static MLA_DEVICE u32 lane() { return threadIdx.x % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return threadIdx.x / kWarpThreads; }

    // First key that each of this thread's two rows may not see, counted from the current tile.
    struct VisibleEnds {
        i32 row[2];

        MLA_DEVICE void next_tile() {
            row[0] -= kTileTokens;
            row[1] -= kTileTokens;
        }
    };

    MLA_DEVICE VisibleEnds visible_ends(const BlockWork& work, u32 row) {
        const i32 first_key = work.tile_begin * kTileTokens;
        VisibleEnds ends;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            ends.row[half] = row_visible_end(params_, work, row + half * 8) - first_key;
        return ends;
    }

    MLA_DEVICE void read_query(const BlockWork& work, u32 row, u32 (&q)[kRegisterSteps][4]) {
        load_query(params_, work, row, lane() % 4, smem_ + WideSmem::q_steps, q);
        if constexpr (kSharedSteps > 0) {
            fence_async_proxy();
            named_barrier_sync(kScoresBarrier, kWarpgroupThreads);
        }
    }

    template <u32 Begin, u32 End>
    MLA_DEVICE void issue_steps(const u32 (&q)[kRegisterSteps][4], float (&scores)[kThreadScores], u64 k, u64 q_shared) {
#pragma unroll
        for (u32 step = Begin; step < End; ++step) {
            constexpr u32 kBoxSteps = kBoxRowBytes / kStepBytes;
            constexpr u32 kLatentSteps = kLatentBoxes * kBoxSteps;
            const u32 in_box = step % kBoxSteps * kStepBytes;
            const u64 k_step =
                step < kLatentSteps
                    ? kLatentKMajor + k + descriptor_offset(step / kBoxSteps * kSwizzleAtomBytes + in_box)
                    : kBoxKMajor + k + descriptor_offset(kStageRope + in_box);
            if (step < kRegisterSteps)
                wgmma_rs<Operand, 0>(scores, q[step][0], q[step][1], q[step][2], q[step][3], k_step, step > 0);
            else
                wgmma_ss<Operand, 0, 0>(scores, q_shared + descriptor_offset((step - kRegisterSteps) * kQStepBytes),
                                        k_step, 1);
        }
    }

    // scores = Q K^T of the tile at ring_; releases the previous tile's P on the way.
    MLA_DEVICE void multiply(const u32 (&q)[kRegisterSteps][4], float (&scores)[kThreadScores], bool release_previous) {
        const u64 k = descriptor_at(0, stage_address(smem_, ring_.stage));
        const u64 q_shared = descriptor_at(kQStepKMajor, smem_ + WideSmem::q_steps);
        const u32 full = tile_full(smem_, ring_.stage);
        if (!mbarrier_test_wait(full, ring_.parity)) {
            // The tile is late: no QK to keep the tensor pipe free for, and PV frees a stage for TMA.
            if (release_previous) release_probabilities();
            release_previous = false;
            mbarrier_wait(full, ring_.parity);
        }
        wgmma_pin(scores);
        wgmma_fence();
        issue_steps<0, kSteps - kStepsAfterRelease>(q, scores, k, q_shared);
        wgmma_commit();
        wgmma_wait<0>();
        if (release_previous) release_probabilities();
        wgmma_fence();
        issue_steps<kSteps - kStepsAfterRelease, kSteps>(q, scores, k, q_shared);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(scores);
    }

    // Hides keys that a row may not see. The tile in which a row's keys end may hold the sequence's end too.
    MLA_DEVICE void mask(i32 item, i32 tiles_left, const VisibleEnds& ends, float (&scores)[kThreadScores]) {
        if (kTileTokens <= ends.row[0]) return;  // row[1] sees no less
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 end = ends.row[half] - static_cast<i32>(lane() % 4) * 2;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float& score = scores[score_index(half, i)];
                score = i / 2 * 8 + i % 2 < end ? score : minus_infinity();
            }
        }
        i32 sequence_end = ends.row[0];
        if (kCausal) {  // rare, and no register is left to keep it in
            const BlockWork work = load_block_work(params_, item);
            sequence_end = work.seqlen_k - (work.tile_end - tiles_left) * kTileTokens;
        }
        clear_dead_values(sequence_end);
    }

    // V rows past the sequence's end may be NaN or left over from another tile, and 0 * NaN is NaN.
    MLA_DEVICE void clear_dead_values(i32 first_dead) {
        constexpr u32 kChunksPerRow = kBoxRowBytes / 16;
        constexpr u32 kRowsPerPass = kWarpgroupThreads / kChunksPerRow;
        const u32 thread = warp() * kWarpThreads + lane();
        for (i32 dead = first_dead + static_cast<i32>(thread / kChunksPerRow); dead < kTileTokens; dead += kRowsPerPass) {
            for (u32 box = 0; box < kLatentBoxes; ++box)
                store_shared_16b(
                    stage_address(smem_, ring_.stage) + latent_row(dead, box) + thread % kChunksPerRow * 16,
                    uint4{0, 0, 0, 0});
        }
    }

    // P of the tile at ring_, and the factor by which each row of O must be rescaled first.
    MLA_DEVICE void store_probabilities(u32 row, const float (&probabilities)[kThreadScores], const RowFactors& factors) {
        const u32 box = stage_address(smem_, ring_.stage) + kProbabilities;
        const u32 matrix_row = warp() * 16 + lane() % 16;
        const u32 matrix_chunk = lane() / 16;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // 16 columns: chunks 2 * pair and 2 * pair + 1
            u32 words[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float* p = probabilities + (pair * 2 + j) * 4;
                words[j * 2] = pack2<Operand>(p[0] * factors.normalise[0], p[1] * factors.normalise[0]);
                words[j * 2 + 1] = pack2<Operand>(p[2] * factors.normalise[1], p[3] * factors.normalise[1]);
            }
            store_matrix_x4(box + box_chunk_offset(matrix_row, pair * 2 + matrix_chunk), words[0], words[1], words[2],
                            words[3]);
        }
        if (lane() % 4 == 0) {
            const u32 rescale = smem_ + WideSmem::factors + ring_.stage * kRows * sizeof(f32);
            store_shared_f32(rescale + row * sizeof(f32), factors.rescale[0]);
            store_shared_f32(rescale + (row + 8) * sizeof(f32), factors.rescale[1]);
        }
        fence_async_proxy();
        __syncwarp();
    }

    // Of the tile before ring_'s: a tile's P is released while the next tile is being multiplied.
    // Every lane releases what it wrote itself; one lane for its warp is no faster.
    MLA_DEVICE void release_probabilities() {
        mbarrier_arrive(probabilities_full(smem_, ring_.stage == 0 ? kStages - 1 : ring_.stage - 1));
    }

    MLA_DEVICE void store_lse(const BlockWork& work, u32 row, const float (&maximum)[2], const float (&sum)[2]) {
        if (lane() % 4 != 0) return;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (row_exists(work, row + half * 8))
                *lse_row(params_, work, row + half * 8) = lse_of(params_, work, maximum[half], sum[half]);
    }

    const DecodeParams& params_;
    u32 smem_;
    RingPosition ring_;
};

}  // namespace mla
