// The scores warpgroup: S = Q K^T for one tile after the other, online softmax, P to shared memory.
#pragma once
#include "decode/rows.h"
#include "decode/wide/query.h"
#include "decode/wide/smem.h"
#include "decode/wide/softmax.h"
#include "ptx/convert.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

// Nothing besides a row's output and lse.
struct NoResults {
    struct Sinks {
        MLA_DEVICE float normalise(int, float sum, float) const { return kHasRegisters ? reciprocal_of_sum(sum) : 1.0f / sum; }
    };
    static MLA_DEVICE Sinks load_sinks(const DecodeParams&, bool, i32, u32) { return {}; }
    MLA_DEVICE void see(int, float) {}
    MLA_DEVICE void store(const DecodeParams&, const BlockWork&, i32, int) const {}
};

// Kernel names what it is part of:
//   Params
//   Mask      which keys the rows may see; it stands at one tile after the other
//   Results   what rows are asked for besides their output and lse
//   Out       what O is held, scaled and stored by
//   kDividesOutput   whether O of an item's only tile is divided by the sum, and not P (decode/wide/softmax.h)
template <class Kernel>
class ScoresRole {
    using Params = typename Kernel::Params;
    using Mask = typename Kernel::Mask;
    using Results = typename Kernel::Results;

public:
    MLA_DEVICE ScoresRole(const Params& params, u32 smem)
        : params_(params), smem_(smem) {}

    MLA_DEVICE void run_item(i32 item) {
        const u32 row = warp() * 16 + lane() / 4;
        float maximum[2] = {minus_infinity(), minus_infinity()};
        float sum[2] = {0.0f, 0.0f};
        u32 q[kRegisterSteps][4];
        i32 tiles;
        Mask mask;
        Results results;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
            if (work.is_refined()) mark_refined(maximum);
            if (!kCausal) mask.open(params_, work, row);
            if (tiles > 0) read_query(work, row, q);
        }
        // A causal item is read again: no register is left to keep it, or what comes of it, in while Q is loaded.
        if (kCausal) mask.open(params_, load_block_work(params_, item), row);
        float scores[kThreadScores];
        bool first = true;
        for (; tiles > 0; --tiles) {
            multiply(q, scores, !first);
            named_barrier_sync(kScoresBarrier, kWarpgroupThreads);  // all warps are done with this stage's rope box
            mask.apply(params_, item, tiles, smem_, ring_.stage, scores);
            mask.next_tile();
            const auto sinks = Results::load_sinks(params_, tiles == 1, item, row);
            const bool divides_output = Kernel::kDividesOutput && first;
            const RowFactors factors =
                softmax(tiles == 1, divides_output, params_.scale_log2, scores, maximum, sum, results, sinks);
            store_probabilities(row, is_refined(maximum), scores, factors);
            first = false;
            ring_.advance();
            publish(tiles == 1);
        }
        if (!first) release_probabilities();
        store_results(load_block_work(params_, item), item, row, maximum, sum, results);
    }

private:
    // From the special register each time: no register is left to keep them in.
    static MLA_DEVICE u32 lane() { return threadIdx.x % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return threadIdx.x / kWarpThreads; }

    MLA_DEVICE void read_query(const BlockWork& work, u32 row, u32 (&q)[kRegisterSteps][4]) {
        if constexpr (kGathered) {
            // They came through the ring, in the item's first stage, whose lap ends here.
            mbarrier_wait(tile_full(smem_, ring_.stage), ring_.parity);
            load_staged_query(stage_address(smem_, ring_.stage), smem_ + WideSmem::q_steps, q);
            mbarrier_arrive(probabilities_full(smem_, ring_.stage));
            __syncwarp();
            if (lane() < kTileReleases / kWarpgroupWarps) mbarrier_arrive(tile_empty(smem_, ring_.stage));
            ring_.advance();
        } else {
            load_query(params_, work, row, lane() % 4, smem_ + WideSmem::q_steps, q);
        }
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

    // Of the tile at ring_. If it is late there is no QK to keep the tensor pipe free for, and PV frees a stage for the
    // loader: so P of the tile before is released at once, and not once more.
    MLA_DEVICE void wait_for_tile(bool& release_previous) {
        if (kGathered && tile_is_visible_) return;
        const u32 full = tile_full(smem_, ring_.stage);
        if (!mbarrier_test_wait(full, ring_.parity)) {
            if (release_previous) release_probabilities();
            release_previous = false;
            mbarrier_wait(full, ring_.parity);
        }
        if (kGathered) fence_async_proxy();
    }

    // scores = Q K^T of the tile at ring_; releases the previous tile's P on the way.
    MLA_DEVICE void multiply(const u32 (&q)[kRegisterSteps][4], float (&scores)[kThreadScores], bool release_previous) {
        const u64 k = descriptor_at(0, stage_address(smem_, ring_.stage));
        const u64 q_shared = descriptor_at(kQStepKMajor, smem_ + WideSmem::q_steps);
        wait_for_tile(release_previous);
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

    // P of the tile at ring_, and the factor by which each row of O must be rescaled first.
    MLA_DEVICE void store_probabilities(u32 row, bool is_refined, const float (&probabilities)[kThreadScores],
                                        const RowFactors& factors) {
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
                words[j * 2 + 1] =
                    is_refined ? rest2<Operand>(words[j * 2], p[0] * factors.normalise[0], p[1] * factors.normalise[0])
                               : pack2<Operand>(p[2] * factors.normalise[1], p[3] * factors.normalise[1]);
            }
            store_matrix_x4(box + box_chunk_offset(matrix_row, pair * 2 + matrix_chunk), words[0], words[1], words[2],
                            words[3]);
        }
        if (lane() % 4 == 0) {
            const u32 rescale = smem_ + WideSmem::factors + ring_.stage * kRows * sizeof(f32);
            store_shared_f32(rescale + row * sizeof(f32), factors.rescale[0]);
            store_shared_f32(rescale + (row + 8) * sizeof(f32), is_refined ? -factors.rescale[0] : factors.rescale[1]);
        }
    }

    // Lets wgmma see P. Gathered tiles too are written by threads, not by TMA, and wgmma sees them only past a proxy fence:
    // by now the next one has come, if it is not late, and the fence will do for both.
    MLA_DEVICE void publish(bool is_last) {
        if (kGathered) tile_is_visible_ = !is_last && mbarrier_test_wait(tile_full(smem_, ring_.stage), ring_.parity);
        fence_async_proxy();
        __syncwarp();
    }

    // Of the tile before ring_'s: a tile's P is released while the next tile is being multiplied.
    // Every lane releases what it wrote itself; one lane for its warp is no faster.
    MLA_DEVICE void release_probabilities() {
        mbarrier_arrive(probabilities_full(smem_, ring_.stage == 0 ? kStages - 1 : ring_.stage - 1));
    }

    MLA_DEVICE void store_results(const BlockWork& work, i32 item, u32 row, const float (&maximum)[2], const float (&sum)[2],
                                  const Results& results) {
        Kernel::Out::wait_for_room();
        if constexpr (kLseCopies > 1) {
            if (__any_sync(kFullWarp, work.is_partial())) {
                store_lses(work, item, row, maximum, sum, results);
                return;
            }
        }
        if (lane() % 4 != 0) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 in_block = row_at(work, row + half * 8);
            if (!row_exists(work, in_block)) continue;
            // Only the values warps know whether: so there are always exponents, nearly always of 1.
            *lse_row(params_, work, in_block) = mark_lse(work, lse_of(params_, work, maximum[half], sum[half]), kScaledMark);
            results.store(params_, work, in_block, half);
        }
    }

    // Of a partial result: one for each values warpgroup, which may mark its own otherwise once it sees that they are there.
    MLA_DEVICE void store_lses(const BlockWork& work, i32 item, u32 row, const float (&maximum)[2], const float (&sum)[2],
                               const Results& results) {
        const u32 copy = lane() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 in_block = row_at(work, row + half * 8);
            if (copy >= kLseCopies || !row_exists(work, in_block)) continue;
            const f32 lse = mark_lse(work, lse_of(params_, work, maximum[half], sum[half]), kUsualMark);
            lse_row(params_, work, in_block)[copy * slot_rows(params_)] = lse;
            if (copy == 0) results.store(params_, work, in_block, half);
        }
        __syncwarp();
        if (lane() == 0) store_shared_release(stored_item(smem_, warp()), item);
    }

    const Params& params_;
    u32 smem_;
    RingPosition ring_;
    bool tile_is_visible_ = false;  // gathered: the one at ring_, to wgmma
};

}  // namespace mla
