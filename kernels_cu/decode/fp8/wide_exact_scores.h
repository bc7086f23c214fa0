// The scores warpgroup of the exact kernel for 64 query rows: S^T = K Q^T for one tile after the other, K made in registers, online
// softmax, P in fp16 to shared memory. Operands are swapped: a thread has 16 query rows and two tokens of a tile.
#pragma once
#include "decode/fp8/exact_product.h"
#include "decode/fp8/query.h"
#include "decode/fp8/served_rows.h"
#include "decode/masks.h"
#include "ptx/wgmma.h"

namespace mla {

class WideExactScoresRole {
public:
    MLA_DEVICE WideExactScoresRole(const Fp8Params& params, u32 smem, u32) : params_(params), smem_(smem) {}

    // The item is read again where a mask or its end needs it: over its tiles it would cost registers. Half of the first one's
    // queries are the values warps' to load.
    MLA_DEVICE void run_item(i32 item) {
        Tiles tiles;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            if (!work.has_tiles()) {  // only a whole job is without tiles
                pdl_wait();
                if (threadIdx.x < kRows) store_lse(params_, work, threadIdx.x, empty_lse(params_, work));
                return;
            }
            tiles = {work.tile_end - work.tile_begin, block_visible_end(params_, work) - work.tile_begin * kTileTokens};
            Fp8Query::make(params_, work, smem_, thread(), buffer_.is_at_start());
        }
        float row_sums[kThreadRows] = {};  // of this thread's tokens
        run_tiles(item, tiles, row_sums);
        finish(item, row_sums);
    }

private:
    // From the special register each time: no register is left to keep them in.
    static MLA_DEVICE u32 thread() {
        u32 thread = threadIdx.x;
        pin_register(thread);
        return thread;
    }
    static MLA_DEVICE u32 lane() { return thread() % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return thread() / kWarpThreads; }
    static MLA_DEVICE void barrier() { named_barrier_sync(kScoresBarrier, kWarpgroupThreads); }

    // Of an item: tiles that are left, and keys, counted from the current tile, that all rows may see.
    struct Tiles {
        i32 left, visible_end;

        MLA_DEVICE void next() {
            --left;
            visible_end -= kTileTokens;
        }
    };

    MLA_DEVICE void run_tiles(i32 item, Tiles tiles, float (&row_sums)[kThreadRows]) {
        const float rope_ratio = kRopeApart ? params_.rope_ratio() : 1.0f;
        for (bool is_first = true; tiles.left > 0; tiles.next(), is_first = false) {
            mbarrier_wait(barrier_of(smem_, Fp8Smem::tile_full, stage_.index()), stage_.parity());
            float scores[kFragment], scales[kThreadRows];
            multiply(rope_ratio, scores, scales);
            if (tiles.visible_end < kTileTokens) mask(item, tiles, scores);
            if (kCausal) load_rows(smem_ + Fp8Smem::row_scales, scales);
            __syncwarp();
            if (lane() == 0) mbarrier_arrive(barrier_of(smem_, Fp8Smem::tile_empty, stage_.index()));
            softmax(is_first, scores, scales, row_sums);
            stage_.advance();
            buffer_.advance();
        }
    }

    // What turns the rows' scores to log2 units is read while the last steps are multiplied, into the registers of K's codes, unless a
    // mask needs these.
    MLA_DEVICE void multiply(float rope_ratio, float (&scores)[kFragment], float (&scales)[kThreadRows]) const {
        const u32 stage = stage_address(smem_, stage_.index());
        const auto meanwhile = [&] {
            if (!kCausal) load_rows(smem_ + Fp8Smem::row_scales, scales);
        };
        multiply_keys(smem_, rope_ratio, scores, [&](u32 box, u32 (&raw)[2][4]) { load_keys(stage, box, raw); }, [](u32) {}, meanwhile);
    }

    // The tokens of a tile that a thread has scores of, and where its 16 bytes of their 64 columns of a latent box lie in a
    // stage; query.h says which columns they are.
    static MLA_DEVICE u32 token_of(u32 half) { return warp() * kWarpTokens + half * 8 + lane() / 4; }
    static MLA_DEVICE u32 latent_offset(u32 half, u32 box) {
        return latent_chunk_offset(token_of(half), box / 2, lane() % 4 * 2 + box % 2);
    }
    static MLA_DEVICE void load_keys(u32 stage, u32 box, u32 (&raw)[2][4]) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            load_shared_words(stage + (box < kLatentBoxes ? latent_offset(half, box)
                                                          : kStageRope + rope_chunk_offset(token_of(half), lane() % 4)),
                              raw[half]);
    }

    // A number of each of a thread's rows.
    static MLA_DEVICE void load_rows(u32 place, float (&values)[kThreadRows]) {
        const u32 address = place + row_of_lane(lane(), 0) * sizeof(f32);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; i += 2) {
            u32 pair[2];
            load_shared_words(address + row_of_lane(0, i) * sizeof(f32), pair);
            values[i] = __uint_as_float(pair[0]);
            values[i + 1] = __uint_as_float(pair[1]);
        }
    }
    static MLA_DEVICE void store_rows(u32 place, const float (&values)[kThreadRows]) {
        if (lane() >= kQuadLanes) return;
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) store_shared_f32(place + row_of_lane(lane(), i) * sizeof(f32), values[i]);
    }

    // Running maxima of the rows, those of each warp its own: over QK they would cost registers.
    MLA_DEVICE u32 maxima() const { return smem_ + Fp8Smem::maxima + warp() * kRows * sizeof(f32); }

    // Hidden scores are overwritten, not added to: K past a sequence's end may be NaN. V past it may be too, or left over from
    // another tile, and 0 * NaN is NaN: each thread clears what load_keys gives it of these tokens, so that it overwrites only
    // what it has read itself; the values warps read it after P, which follows.
    MLA_DEVICE void mask(i32 item, const Tiles& tiles, float (&scores)[kFragment]) const {
        const BlockWork work = load_block_work(params_, item);
        const i32 first_key = (work.tile_end - tiles.left) * kTileTokens;
        const i32 key = first_key + static_cast<i32>(token_of(0));
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const i32 end = row_visible_end(params_, work, row_of_lane(lane(), i));
            float& upper = scores[row_element(i)];
            float& lower = scores[row_element(i) + 2];
            upper = key < end ? upper : minus_infinity();
            lower = key + 8 < end ? lower : minus_infinity();
        }
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            if (first_key + static_cast<i32>(token_of(half)) < work.seqlen_k) continue;
#pragma unroll
            for (u32 box = 0; box < kLatentBoxes; ++box)
                store_shared_16b(stage_address(smem_, stage_.index()) + latent_offset(half, box), uint4{0, 0, 0, 0});
        }
    }

    // Scores to P in shared memory, statistics, and the factors by which O is to be rescaled. Rows' maxima are looked for only
    // where a score may have outgrown its row's; all threads vote. Scales are positive (query.h).
    MLA_DEVICE void softmax(bool is_first, float (&scores)[kFragment], const float (&scales)[kThreadRows],
                            float (&row_sums)[kThreadRows]) {
        RowMaxima rows;
        bool move_maxima = is_first;
        if (!is_first) {
            load_rows(maxima(), rows.maximum);
            float above[kThreadRows];
#pragma unroll
            for (u32 i = 0; i < kThreadRows; ++i)  // from -inf any visible key moves it; no number is never the largest
                above[i] = fmaf(fmaxf(scores[row_element(i)], scores[row_element(i) + 2]), scales[i], -rows.maximum[i]);
#pragma unroll
            for (u32 i = 4; i < kThreadRows; ++i) above[i % 4] = fmaxf(above[i % 4], above[i]);
            const float most = fmaxf(fmaxf(above[0], above[1]), fmaxf(above[2], above[3]));
            move_maxima = named_barrier_or(kScoresBarrier, kWarpgroupThreads, most > kRescaleThreshold);
        }
        mbarrier_wait(barrier_of(smem_, Fp8Smem::probabilities_empty, buffer_.index()), buffer_.parity() ^ 1);
        if (move_maxima) this->move_maxima(scores, scales, rows, row_sums);
        if (thread() == 0)  // of an item's first tile there is nothing to rescale
            store_shared_u32(smem_ + Fp8Smem::moved + buffer_.index() * sizeof(u32), move_maxima && !is_first);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            // A row that has seen no key: its scores are -inf, and -inf - -inf would be NaN.
            const float shift = rows.maximum[i] == minus_infinity() ? 0.0f : rows.maximum[i];
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                float& score = scores[row_element(i) + half * 2];
                score = fast_exp2(fmaf(score, scales[i], -shift));
            }
        }
        store_fragment_transposed<Operand>(smem_ + Fp8Smem::probabilities + buffer_.index() * kRowBoxBytes, warp(), lane(), scores);
        fence_async_proxy();
        mbarrier_arrive(barrier_of(smem_, Fp8Smem::probabilities_full, buffer_.index()));  // each thread what it has written itself
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) row_sums[i] += scores[row_element(i)] + scores[row_element(i) + 2];
    }

    MLA_DEVICE void move_maxima(const float (&scores)[kFragment], const float (&scales)[kThreadRows], RowMaxima& rows,
                                float (&row_sums)[kThreadRows]) const {
        float tile_maxima[kThreadRows], factor[kThreadRows];
        column_maxima(scores, tile_maxima);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) tile_maxima[i] *= scales[i];
        reduce_across_warps(smem_ + Fp8Smem::exchange, warp(), lane(), kScoresBarrier, tile_maxima,
                            [](float a, float b) { return fmaxf(a, b); });
        rows.raise(tile_maxima, factor);
        __syncwarp();  // all lanes have read what was
        store_rows(maxima(), rows.maximum);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) row_sums[i] *= factor[i];
        if (warp() == 0) store_rows(smem_ + Fp8Smem::factors + buffer_.index() * kRows * sizeof(f32), factor);
        __syncwarp();
    }

    // Hands the values warpgroups what O is to be multiplied by, and writes the lse. Thread numbers are not thread(): rows chosen by
    // what the compiler does not know make all descriptors leave the uniform registers, over all tiles.
    MLA_DEVICE void finish(i32 item, float (&row_sums)[kThreadRows]) {
        const u32 warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
        const f32 latent_scale = params_.latent_scale();
        barrier();  // all have read the maxima
        reduce_across_warps(smem_ + Fp8Smem::exchange, warp, lane, kScoresBarrier, row_sums, [](float a, float b) { return a + b; });
        mbarrier_wait(smem_ + Fp8Smem::sums_empty, items_parity_ ^ 1);
        items_parity_ ^= 1;
#pragma unroll
        for (u32 i = 0; i < kServedRows; ++i) {
            const float sum = served_value(i, warp, row_sums);
            const float inverse = sum == 0.0f ? 0.0f : latent_scale * fast_reciprocal(sum);
            if (lane < kRowLanes) store_shared_f32(smem_ + Fp8Smem::inverse_sums + served_row(i, warp, lane) * sizeof(f32), inverse);
        }
        __syncwarp();
        mbarrier_arrive(smem_ + Fp8Smem::sums_full);  // each thread for what it has written itself, or racecheck reports it
        pin_register(item);  // no register is left to keep its address in
        const BlockWork work = load_block_work(params_, item);
#pragma unroll
        for (u32 i = 0; i < kServedRows; ++i) {
            const u32 row = served_row(i, warp, lane);
            const float lse = lse_of(params_, work, load_shared_f32(maxima() + row * sizeof(f32)), served_value(i, warp, row_sums));
            if (lane < kRowLanes) store_lse(params_, work, row, lse);
        }
    }

    const Fp8Params& params_;
    u32 smem_;
    u32 items_parity_ = 0;
    RingPosition<kStages> stage_;
    RingPosition<kProbabilityBuffers> buffer_;
};

}  // namespace mla
