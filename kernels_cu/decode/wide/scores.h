// The scores warpgroup: S = Q K^T for one tile after the other, online softmax, P to shared memory.
#pragma once
#include "core/quad.h"
#include "core/softmax.h"
#include "decode/masks.h"
#include "decode/wide/smem.h"
#include "ptx/convert.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

constexpr u32 kScoresBarrier = 1;  // named barrier of this warpgroup
// PV of tile t is released when all but this many k16 steps of QK(t + 1) are done: the tensor pipe alternates between
// warpgroups by instruction, and wide PV instructions would starve narrow QK ones. 4 to 20 are good, 0 costs 5%.
constexpr u32 kStepsAfterRelease = kSteps > 20 ? 10 : 4;

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
            if (tiles > 0) load_query(work, q);
        }
        // A causal item is read again: no register is left to keep it, or what comes of it, in while Q is loaded.
        if (kCausal) ends = visible_ends(load_block_work(params_, item), row);
        float scores[32];
        bool first = true;
        for (; tiles > 0; --tiles) {
            multiply(q, scores, !first);
            named_barrier_sync(kScoresBarrier, kWarpgroupThreads);  // all warps are done with this stage's rope box
            mask(item, tiles, ends, scores);
            ends.next_tile();
            softmax(tiles == 1, row, scores, maximum, sum);
            first = false;
            ring_.advance();
        }
        if (!first) release_probabilities();
        write_lse(load_block_work(params_, item), row, maximum, sum);
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
        for (int half = 0; half < 2; ++half) {
            ends.row[half] = row_visible_end(params_, work, row + half * 8) - first_key;
        }
        return ends;
    }

    // Q fragments: 16-byte loads of 8 columns a lane, transposed within the quad to the fragment's column pairs.
    MLA_DEVICE void load_query(const BlockWork& work, u32 (&q)[kRegisterSteps][4]) {
        const u32 lane_in_quad = lane() % 4;
        QueryRow rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            rows[half] = query_row(params_, work, warp() * 16 + lane() / 4 + half * 8, lane_in_quad * 8);
#pragma unroll
        for (int block = static_cast<int>(kSteps / 2) - 1; block >= 0; --block) {  // two k16 steps, 32 columns
            u32 words[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 column = block * 32;
                const uint4 loaded = column < kLatent ? rows[half].load_latent(column) : rows[half].load_rope(column - kLatent);
                const u32 step = block * 2 + lane_in_quad / 2;
                if (block * 2 + 1 >= static_cast<int>(kRegisterSteps) && step >= kRegisterSteps)
                    store_shared_16b(smem_ + WideSmem::q_steps + (step - kRegisterSteps) * kQStepBytes +
                                         q_step_chunk_offset(warp() * 16 + lane() / 4 + half * 8, lane_in_quad % 2),
                                     loaded);
                words[half][0] = loaded.x;
                words[half][1] = loaded.y;
                words[half][2] = loaded.z;
                words[half][3] = loaded.w;
                if (block * 2 < static_cast<int>(kRegisterSteps)) quad_transpose(words[half], lane_in_quad);
            }
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                if (block * 2 + s < static_cast<int>(kRegisterSteps)) {
                    q[block * 2 + s][0] = words[0][s * 2];
                    q[block * 2 + s][1] = words[1][s * 2];
                    q[block * 2 + s][2] = words[0][s * 2 + 1];
                    q[block * 2 + s][3] = words[1][s * 2 + 1];
                }
            }
        }
        if constexpr (kSharedSteps > 0) {
            fence_async_proxy();
            named_barrier_sync(kScoresBarrier, kWarpgroupThreads);
        }
    }

    template <u32 Begin, u32 End>
    MLA_DEVICE void issue_steps(const u32 (&q)[kRegisterSteps][4], float (&scores)[32], u64 k, u64 q_shared) {
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
                wgmma_ss<Operand, 0, 0>(scores, q_shared + descriptor_offset((step - kRegisterSteps) * kQStepBytes), k_step, 1);
        }
    }

    // scores = Q K^T of the tile at ring_; releases the previous tile's P on the way.
    MLA_DEVICE void multiply(const u32 (&q)[kRegisterSteps][4], float (&scores)[32], bool release_previous) {
        const u64 k = descriptor_at(0, stage_address(smem_, ring_.stage));
        const u64 q_shared = descriptor_at(kQStepKMajor, smem_ + WideSmem::q_steps);
        const u32 tile_full = smem_ + WideSmem::tile_full + ring_.stage * sizeof(u64);
        if (!mbarrier_test_wait(tile_full, ring_.parity)) {
            // The tile is late: no QK to keep the tensor pipe free for, and PV frees a stage for TMA.
            if (release_previous) release_probabilities();
            release_previous = false;
            mbarrier_wait(tile_full, ring_.parity);
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

    // Hides keys a row may not see, and clears V rows past the sequence's end: they may hold NaN, and 0 * NaN is NaN.
    MLA_DEVICE void mask(i32 item, i32 tiles_left, const VisibleEnds& ends, float (&scores)[32]) {
        if (kTileTokens <= ends.row[0]) return;  // row[1] sees no less
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 end = ends.row[half] - static_cast<i32>(lane() % 4) * 2;
#pragma unroll
            for (int group = 0; group < 8; ++group) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[group * 4 + half * 2 + i];
                    score = group * 8 + i < end ? score : minus_infinity();
                }
            }
        }
        i32 sequence_end = ends.row[0];
        if (kCausal) {  // rare, and no register is left to keep it in
            const BlockWork work = load_block_work(params_, item);
            sequence_end = work.seqlen_k - (work.tile_end - tiles_left) * kTileTokens;
        }
        constexpr u32 kChunksPerRow = kBoxRowBytes / 16;
        constexpr u32 kRowsPerPass = kWarpgroupThreads / kChunksPerRow;
        const u32 thread = warp() * kWarpThreads + lane();
        for (i32 dead = sequence_end + static_cast<i32>(thread / kChunksPerRow); dead < kTileTokens; dead += kRowsPerPass) {
            for (u32 box = 0; box < kLatentBoxes; ++box)
                store_shared_16b(
                    stage_address(smem_, ring_.stage) + latent_row(dead, box) + thread % kChunksPerRow * 16,
                    uint4{0, 0, 0, 0});
        }
    }

    // scores -> P in shared memory, the running maximum and sum, and the factor by which O must be rescaled first.
    // The last tile carries the division by the sum in P and in the factor, so O comes out normalised.
    MLA_DEVICE void softmax(bool is_last, u32 row, float (&scores)[32], float (&maximum)[2], float (&sum)[2]) {
        const float scale = params_.scale_log2;
        float factor[2];
        float normalise[2] = {1.0f, 1.0f};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float tile_maximum = scores[half * 2];
#pragma unroll
            for (int i = 1; i < 16; ++i) tile_maximum = fmaxf(tile_maximum, scores[i / 2 * 4 + half * 2 + i % 2]);
            tile_maximum = quad_max(tile_maximum) * scale;
            factor[half] = 1.0f;
            if (tile_maximum > maximum[half] + kRescaleThreshold) {
                factor[half] = fast_exp2(maximum[half] - tile_maximum);
                maximum[half] = tile_maximum;
            }
            const float shift = maximum[half] == minus_infinity() ? 0.0f : maximum[half];
            float tile_sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float& score = scores[i / 2 * 4 + half * 2 + i % 2];
                score = fast_exp2(fmaf(score, scale, -shift));
                tile_sum += score;
            }
            sum[half] = sum[half] * factor[half] + tile_sum;
            if (is_last) {
                sum[half] = quad_sum(sum[half]);
                normalise[half] = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];  // NaN stays NaN
                factor[half] *= normalise[half];
            }
        }
        const u32 probabilities = stage_address(smem_, ring_.stage) + kProbabilities;
        const u32 matrix_row = warp() * 16 + lane() % 16;
        const u32 matrix_chunk = lane() / 16;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // 16 columns: chunks 2 * pair and 2 * pair + 1
            u32 words[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float* s = scores + (pair * 2 + j) * 4;
                words[j * 2] = pack2<Operand>(s[0] * normalise[0], s[1] * normalise[0]);
                words[j * 2 + 1] = pack2<Operand>(s[2] * normalise[1], s[3] * normalise[1]);
            }
            store_matrix_x4(probabilities + box_chunk_offset(matrix_row, pair * 2 + matrix_chunk), words[0], words[1],
                            words[2], words[3]);
        }
        if (lane() % 4 == 0) {
            const u32 factors = smem_ + WideSmem::factors + ring_.stage * kRows * sizeof(f32);
            store_shared_f32(factors + row * sizeof(f32), factor[0]);
            store_shared_f32(factors + (row + 8) * sizeof(f32), factor[1]);
        }
        fence_async_proxy();
        __syncwarp();
    }

    // Of the tile before ring_'s: a tile's P is released while the next tile is being multiplied.
    // Every lane releases what it wrote itself; one lane for its warp is no faster.
    MLA_DEVICE void release_probabilities() {
        const u32 stage = ring_.stage == 0 ? kStages - 1 : ring_.stage - 1;
        mbarrier_arrive(smem_ + WideSmem::probabilities_full + stage * sizeof(u64));
    }

    MLA_DEVICE void write_lse(const BlockWork& work, u32 row, const float (&maximum)[2], const float (&sum)[2]) {
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
