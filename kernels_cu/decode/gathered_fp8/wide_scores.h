// The scores warpgroup of the kernel for 64 rows of gathered FP8 tokens: S = Q K^T, online softmax, P.
#pragma once
#include "decode/gathered/request_mask.h"
#include "decode/gathered/results.h"
#include "decode/gathered_fp8/token_unit.h"
#include "decode/gathered_fp8/wide_query.h"
#include "decode/wide/softmax.h"
#include "ptx/wgmma.h"

namespace mla {

class ScoresRole {
public:
    MLA_DEVICE ScoresRole(const GatherParams& params, u32 smem) : params_(params), smem_(smem) {}

    MLA_DEVICE void run_item(i32 item) {
        i32 tiles;
        Rows& rows = rows_;
        SinkAndLargest results;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
            if (tiles > 0) {
                load_query(work, rows);
            } else {
                store_pending();
                rows = Rows();
            }
        }
        float scores[kThreadScores];
        bool is_first = true, holds = false;
        for (; tiles > 0; --tiles) {
            multiply(scores, holds);
            barrier();  // all warps are done with this stage's rope box, and with Q if it is the last
            const Marks marks = load_marks();
            if constexpr (kByRequest)
                RequestMask().apply(params_, item, tiles, 0, 0, scores);
            else if (!__all_sync(kFullWarp, marks.even == kAllValid && marks.odd == kAllValid))
                hide(marks, scores);
            const bool weighs = Codec::kHasScales && __any_sync(kFullWarp, rows.have_units || ((marks.even | marks.odd) & kHasUnits));
            const bool is_last = tiles == 1;
            const SinkAndLargest::Sinks sinks = SinkAndLargest::load_sinks(params_, is_last, item, first_row());
            softmax(is_last, weighs, scores, rows, results, sinks);
            ring_.advance();
            publish(is_last);
            // That of an item's first tile is not held: PV has nothing else to do, and the converters wait for it.
            if (is_first) release_probabilities();
            holds = !is_first;
            is_first = false;
        }
        if (holds) release_probabilities();
        pending_ = item;
        results_ = results;
    }

    // Results of the item before, if there was one: while the queries of the next are on their way.
    MLA_DEVICE void store_pending() {
        if (pending_ >= 0) store_results(load_block_work(params_, pending_), rows_, results_);
        pending_ = -1;
    }

private:
    // What this thread knows of its two rows, 8 apart.
    struct Rows {
        float scale[2];  // to log2 units
        float maximum[2] = {minus_infinity(), minus_infinity()};
        float sum[2] = {0.0f, 0.0f};  // of the thread's columns; of the quad's after the last tile
        float unit[2] = {1.0f, 1.0f};  // a power of two by which O of the row is to be multiplied
        bool have_units = false;      // of any row of the warp
    };

    // From the special register each time: few registers are left to keep them in.
    static MLA_DEVICE u32 lane() { return threadIdx.x % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return threadIdx.x / kWarpThreads; }
    static MLA_DEVICE u32 first_row() { return warp() * 16 + lane() / 4; }

    static MLA_DEVICE void barrier() { named_barrier_sync(kScoresBarrier, kWarpgroupThreads); }

    MLA_DEVICE void load_query(const BlockWork& work, Rows& rows) {
        const f32 scale_log2 = params_.scale_log2 * cache_scale(params_);
        QueryLoad query;
#pragma unroll 1
        for (u32 row = 0; row < kScoresQueryRows; row += QueryLoad::kLoadedRows) {
            query.read(params_, work, row);
            if (row == 0) store_pending();
            query.write(smem_, row, scale_log2);
        }
        mbarrier_wait(smem_ + Smem::query_full, query_parity_);
        query_parity_ ^= 1;
        rows = Rows();
        fence_async_proxy();
        barrier();
#pragma unroll
        for (int half = 0; half < 2; ++half)
            rows.scale[half] = load_shared_f32(smem_ + Smem::row_scales + (first_row() + half * 8) * sizeof(f32));
    }

    template <u32 Begin, u32 End>
    static MLA_DEVICE void issue_steps(u64 query, u64 latent, u64 rope, float (&scores)[kThreadScores]) {
#pragma unroll
        for (u32 step = Begin; step < End; ++step) {
            const u32 box = step / kBoxSteps, in_box = step % kBoxSteps * kStepBytes;
            const u64 q = query + descriptor_offset(box * kBoxBytes + in_box);
            const u64 k = box < kLatentBoxes ? latent + descriptor_offset(box * kSwizzleAtomBytes + in_box)
                                             : rope + descriptor_offset(in_box);
            if (box < kFp16Boxes)
                wgmma_ss<Operand, 0, 0>(scores, q, k, step > 0);
            else
                wgmma_ss<Bf16, 0, 0>(scores, q, k, step > 0);
        }
    }

    // Of the tile at ring_. If it is late, P of the tile before is released at once, and not once more: PV frees the stage that
    // the converters wait for.
    MLA_DEVICE void wait_for_tile(bool& release_previous) const {
        if (tile_is_visible_) return;
        const u32 full = tile_full(smem_, ring_.stage);
        if (!mbarrier_test_wait(full, ring_.parity)) {
            if (release_previous) release_probabilities();
            release_previous = false;
            mbarrier_wait(full, ring_.parity);
        }
        fence_async_proxy();
    }

    // scores = Q K^T of the tile at ring_; releases the previous tile's P on the way.
    MLA_DEVICE void multiply(float (&scores)[kThreadScores], bool release_previous) const {
        wait_for_tile(release_previous);
        const u32 stage = stage_address(smem_, ring_.stage);
        const u64 query = descriptor_at(kBoxKMajor, smem_ + Smem::query);
        const u64 latent = descriptor_at(kLatentKMajor, stage);
        const u64 rope = descriptor_at(kBoxKMajor, stage + kStageRope);
        wgmma_pin(scores);
        wgmma_fence();
        issue_steps<0, kSteps - kStepsAfterRelease>(query, latent, rope, scores);
        wgmma_commit();
        issue_steps<kSteps - kStepsAfterRelease, kSteps>(query, latent, rope, scores);
        wgmma_commit();
        wgmma_wait<1>();
        if (release_previous) release_probabilities();
        wgmma_wait<0>();
        wgmma_pin(scores);
    }

    // Of the warps that converted this thread's tokens, 8 b + 2 j and the next of block b, j = lane % 4: b even, b odd.
    struct Marks {
        u32 even, odd;
    };

    MLA_DEVICE Marks load_marks() const {
        const u32 first = smem_ + Smem::marks + (ring_.stage * kConverterWarps + lane() % 4 / 2) * sizeof(u32);
        return {load_shared_u32(first), load_shared_u32(first + kConverterWarps / 2 * sizeof(u32))};
    }

    // Hides what is no token. Its values are zeros already.
    static MLA_DEVICE void hide(const Marks& marks, float (&scores)[kThreadScores]) {
        u32 shift = lane() % 2 * 2;
        pin_register(shift);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const u32 block = i / 2;
            const u32 bits = (block % 2 == 0 ? marks.even : marks.odd) >> shift;
            const u32 bit = bits >> (block / 2 * kShareTokens + i % 2) & 1;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& score = scores[score_index(half, i)];
                score = bit ? score : minus_infinity();
            }
        }
    }

    // Units of this thread's tokens of block b: 8 b + 2 j and the next.
    MLA_DEVICE float2 load_units(u32 block) const {
        const uint2 words =
            load_shared_8b(smem_ + Smem::units + (ring_.stage * kTileTokens + block * 8 + lane() % 4 * 2) * sizeof(f32));
        return {__uint_as_float(words.x), __uint_as_float(words.y)};
    }

    MLA_DEVICE void times_units(float (&values)[kThreadScores]) const {
#pragma unroll
        for (u32 block = 0; block < kThreadScores / 4; ++block) {
            const float2 units = load_units(block);
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                values[block * 4 + half * 2] *= units.x;
                values[block * 4 + half * 2 + 1] *= units.y;
            }
        }
    }

    // Scores to P, which it stores with the factors by which O is rescaled first, and after the last tile with what O is
    // multiplied by. weighs: tokens or rows have units.
    MLA_DEVICE void softmax(bool is_last, bool weighs, float (&scores)[kThreadScores], Rows& rows, SinkAndLargest& results,
                            const SinkAndLargest::Sinks& sinks) const {
        if (weighs) times_units(scores);
        float factor[2];
        exponentiate(scores, rows, results, factor);
        if (weighs) weigh(scores, rows, factor);
        store_probabilities(scores);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (lane() % 4 == 0) store_of_row(Smem::factors, half, factor[half]);
            if (!is_last) continue;
            rows.sum[half] = quad_sum(rows.sum[half]);
            const float inverse = sinks.normalise(half, rows.sum[half], rows.maximum[half]);
            if (lane() % 4 == 0)
                store_of_row(Smem::inverse_sums, half,
                             rows.sum[half] == 0.0f ? 0.0f : inverse * (rows.unit[half] * cache_scale(params_)));
        }
    }

    // Scores to probabilities, in place, both rows side by side. A quad looks for its maximum only where some row of the warp may
    // outgrow its own.
    MLA_DEVICE void exponentiate(float (&scores)[kThreadScores], Rows& rows, SinkAndLargest& results, float (&factor)[2]) const {
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
            tile_maximum[half] = fmaxf(pair[0], pair[1]) * rows.scale[half];
            results.see(half, tile_maximum[half]);
            outgrows |= tile_maximum[half] > rows.maximum[half] + kRescaleThreshold;
            factor[half] = 1.0f;
        }
        if (__any_sync(kFullWarp, outgrows)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float largest = quad_max(tile_maximum[half]);
                if (largest > rows.maximum[half] + kRescaleThreshold) {
                    factor[half] = fast_exp2(rows.maximum[half] - largest);
                    rows.maximum[half] = largest;
                    rows.sum[half] *= factor[half];
                }
            }
        }
        float tile_sum[2][2] = {};
        const float shift[2] = {rows.maximum[0] == minus_infinity() ? 0.0f : rows.maximum[0],
                                rows.maximum[1] == minus_infinity() ? 0.0f : rows.maximum[1]};
#pragma unroll
        for (int i = 0; i < 16; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& score = scores[score_index(half, i)];
                score = fast_exp2(fmaf(score, rows.scale[half], -shift[half]));
                tile_sum[half][i % 2] += score;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) rows.sum[half] += tile_sum[half][0] + tile_sum[half][1];
    }

    // What V's rows lack is in P, in proportion to the row's largest, which O's unit is then. `factor` is that of the maxima,
    // and becomes what O is multiplied by.
    MLA_DEVICE void weigh(float (&probabilities)[kThreadScores], Rows& rows, float (&factor)[2]) const {
        times_units(probabilities);
        bool any = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = probabilities[score_index(half, 0)];
#pragma unroll
            for (int i = 1; i < 16; ++i) most = fmaxf(most, probabilities[score_index(half, i)]);
            const float unit = unit_for(fmaxf(quad_max(most), rows.unit[half] * factor[half]));
            const float inverse = inverse_of_unit(unit);
            factor[half] = factor[half] * rows.unit[half] * inverse;  // in this order nothing overflows
            rows.unit[half] = unit;
            any |= unit != 1.0f;
#pragma unroll
            for (int i = 0; i < 16; ++i) probabilities[score_index(half, i)] *= inverse;
        }
        rows.have_units = __any_sync(kFullWarp, any);
    }

    MLA_DEVICE void store_of_row(u32 place, int half, float value) const {
        store_shared_f32(smem_ + place + (ring_.stage * kRows + first_row() + half * 8) * sizeof(f32), value);
    }

    MLA_DEVICE void store_probabilities(const float (&probabilities)[kThreadScores]) const {
        const u32 box = stage_address(smem_, ring_.stage) + kProbabilities;
        const u32 row = warp() * 16 + lane() % 16;
        const u32 chunk = lane() / 16;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {  // 16 columns: chunks 2 * pair and 2 * pair + 1
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i] = pack2<Operand>(probabilities[pair * 8 + i * 2], probabilities[pair * 8 + i * 2 + 1]);
            store_matrix_x4(box + box_chunk_offset(row, pair * 2 + chunk), words[0], words[1], words[2], words[3]);
        }
    }

    // Lets wgmma see P. Tiles too are written by threads, and wgmma sees them only past a proxy fence: by now the next one has
    // come, if it is not late, and the fence will do for both. The converters would wait there for rows on their way.
    MLA_DEVICE void publish(bool is_last) {
        tile_is_visible_ = !is_last && mbarrier_test_wait(tile_full(smem_, ring_.stage), ring_.parity);
        fence_async_proxy();
        __syncwarp();
    }

    // Of the tile before ring_'s.
    MLA_DEVICE void release_probabilities() const { mbarrier_arrive(probabilities_full(smem_, ring_.stage ^ 1)); }

    MLA_DEVICE void store_results(const BlockWork& work, const Rows& rows, SinkAndLargest& results) const {
        results.finish();
        if (lane() % 4 != 0) return;
        u32 first = first_row();
        pin_register(first);  // or what comes of it is kept from the start, for which no registers are left
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 row = first + half * 8;
            if (!row_exists(work, row)) continue;
            const f32 lse = lse_of(params_, work, rows.maximum[half], rows.sum[half]);
            *lse_row(params_, work, row) = mark_lse(work, lse, kScaledMark);  // as the wide kernel's scores warps do
            results.store(params_, work, row, half);
        }
    }

    Rows rows_;
    SinkAndLargest results_;
    i32 pending_ = -1;
    u32 query_parity_ = 0;
    const GatherParams& params_;
    u32 smem_;
    RingPosition ring_;
    bool tile_is_visible_ = false;  // the one at ring_, to wgmma
};

}  // namespace mla
