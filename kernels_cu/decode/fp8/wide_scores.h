// The scores warpgroup of the wide kernel for e4m3 caches: S = Q K^T for one tile after the other, online softmax, P in fp16 to
// shared memory. Query rows are wgmma's M: a thread has rows lane / 4 and lane / 4 + 8 of its warp's 16, and a quarter of the
// tokens.
#pragma once
#include "decode/fp8/query.h"
#include "decode/fp8/wide_product.h"
#include "decode/masks.h"
#include "decode/wide/softmax.h"

namespace mla {

class WideScoresRole {
public:
    MLA_DEVICE WideScoresRole(const Fp8Params& params, u32 smem, u32) : params_(params), smem_(smem) {}

    // The item is read again where a mask or its end needs it: over its tiles it would cost registers. Half of the first one's
    // queries are the values warps' to load.
    MLA_DEVICE void run_item(i32 item) {
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
            tiles = {work.tile_end - work.tile_begin, block_visible_end(params_, work) - work.tile_begin * kTileTokens};
            barrier();  // the queries before are read
            split = Fp8Query::make(params_, work, smem_, thread(), buffer_.is_at_start());
        }
        Rows rows;
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            rows.scale[half] = load_shared_f32(smem_ + Fp8Smem::row_scales + row(half) * sizeof(f32));
        if (kSplitQuery && split)
            run_tiles<SplitProduct>(item, tiles, rows);
        else
            run_tiles<ExactProduct>(item, tiles, rows);
        finish(item, rows);
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
    static MLA_DEVICE u32 row(u32 half) { return warp() * 16 + lane() / 4 + half * 8; }
    static MLA_DEVICE void barrier() { named_barrier_sync(kScoresBarrier, kWarpgroupThreads); }

    // Of an item: tiles that are left, and keys, counted from the current tile, that all rows may see.
    struct Tiles {
        i32 left, visible_end;

        MLA_DEVICE void next() {
            --left;
            visible_end -= kTileTokens;
        }
    };

    // Of this thread's two: what turns scores to log2 units, the maximum of the quad's scores in them, the sum of the thread's P.
    struct Rows {
        float scale[2];
        float maximum[2] = {minus_infinity(), minus_infinity()};
        float sum[2] = {0.0f, 0.0f};
    };

    template <class Product>
    MLA_DEVICE void run_tiles(i32 item, Tiles tiles, Rows& rows) {
        const Product product(smem_);
        for (bool is_first = true; tiles.left > 0; tiles.next(), is_first = false) {
            bool holds_previous = !is_first;
            wait_for_tile(holds_previous);
            float scores[kThreadScores];
            product.multiply(stage_address(smem_, stage_.index()), scores, [&] {
                if (holds_previous) release_probabilities();
            });
            if (tiles.visible_end < kTileTokens) mask(item, tiles, scores);
            __syncwarp();
            if (lane() == 0) mbarrier_arrive(barrier_of(smem_, Fp8Smem::tile_empty, stage_.index()));
            softmax(is_first, scores, rows);
            stage_.advance();
            buffer_.advance();
        }
        release_probabilities();
    }

    // If the tile is late there is no product to keep the tensor cores free for, and PV frees a stage for the loader: so P of
    // the tile before is released at once, and not once more.
    MLA_DEVICE void wait_for_tile(bool& holds_previous) const {
        const u32 full = part_full(smem_, stage_.index(), 0);
        if (mbarrier_test_wait(full, stage_.parity())) return;
        if (holds_previous) release_probabilities();
        holds_previous = false;
        mbarrier_wait(full, stage_.parity());
    }

    // Of the tile before buffer_'s. Each thread releases what it has written itself.
    MLA_DEVICE void release_probabilities() const {
        const u32 previous = (buffer_.index() + kProbabilityBuffers - 1) % kProbabilityBuffers;
        mbarrier_arrive(barrier_of(smem_, Fp8Smem::probabilities_full, previous));
    }

    // Hidden scores are overwritten, not added to: K past a sequence's end may be NaN. V past it may be too, or left over from
    // another tile, and 0 * NaN is NaN: these tokens are cleared; the values warps read them after P, which follows.
    MLA_DEVICE void mask(i32 item, const Tiles& tiles, float (&scores)[kThreadScores]) const {
        const BlockWork work = load_block_work(params_, item);
        const i32 first_key = (work.tile_end - tiles.left) * kTileTokens;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 end = row_visible_end(params_, work, row(half)) - first_key - static_cast<i32>(lane() % 4 * 2);
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float& score = scores[score_index(half, i)];
                score = i / 2 * 8 + i % 2 < end ? score : minus_infinity();
            }
        }
        barrier();  // all warps have multiplied the tile
        clear_dead_values(item, tiles);
    }

    MLA_DEVICE void clear_dead_values(i32 item, const Tiles& tiles) const {
        i32 first_dead = tiles.visible_end;
        if constexpr (kCausal) {
            pin_register(item);  // looked up again: no registers are left to keep what comes of it in
            const BlockWork work = load_block_work(params_, item);
            first_dead = work.seqlen_k - (work.tile_end - tiles.left) * kTileTokens;
        }
        for (i32 token = max_i32(first_dead, 0) + static_cast<i32>(thread() / kChunksPerBoxRow); token < kTileTokens;
             token += kWarpgroupThreads / kChunksPerBoxRow) {
#pragma unroll 1
            for (u32 box = 0; box < kByteBoxes; ++box)
                store_shared_16b(stage_address(smem_, stage_.index()) + latent_chunk_offset(token, box, lane() % kChunksPerBoxRow),
                                 uint4{0, 0, 0, 0});
        }
    }

    // Scores to P in shared memory, statistics, and the factors by which O is to be rescaled. Quads look for their maxima only
    // where one of the warp's rows may have outgrown its own. Both rows go side by side: one hides the other's latencies.
    MLA_DEVICE void softmax(bool is_first, float (&scores)[kThreadScores], Rows& rows) {
        float factors[2] = {1.0f, 1.0f}, maxima[2], shift[2], sums[2] = {0.0f, 0.0f};
        bool outgrown = false, moved = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float even = scores[score_index(half, 0)], odd = scores[score_index(half, 1)];
#pragma unroll
            for (int i = 2; i < 16; i += 2) {
                even = fmaxf(even, scores[score_index(half, i)]);
                odd = fmaxf(odd, scores[score_index(half, i + 1)]);
            }
            maxima[half] = fmaxf(even, odd) * rows.scale[half];
            outgrown |= maxima[half] > rows.maximum[half] + kRescaleThreshold;  // from -inf any visible key moves it
        }
        if (__any_sync(kFullWarp, outgrown)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float maximum = quad_max(maxima[half]);
                if (maximum <= rows.maximum[half] + kRescaleThreshold) continue;
                factors[half] = fast_exp2(rows.maximum[half] - maximum);
                rows.maximum[half] = maximum;
                rows.sum[half] *= factors[half];
                moved = !is_first;  // of an item's first tile there is nothing to rescale
            }
        }
        // A row that has seen no key: its scores are -inf, and -inf - -inf would be NaN.
#pragma unroll
        for (int half = 0; half < 2; ++half) shift[half] = rows.maximum[half] == minus_infinity() ? 0.0f : rows.maximum[half];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& score = scores[score_index(half, i)];
                score = fast_exp2(fmaf(score, rows.scale[half], -shift[half]));
                sums[half] += score;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) rows.sum[half] += sums[half];
        mbarrier_wait(barrier_of(smem_, Fp8Smem::probabilities_empty, buffer_.index()), buffer_.parity() ^ 1);
        store_probabilities(scores);
        const u32 address = smem_ + Fp8Smem::factors + buffer_.index() * kRows * sizeof(f32);
        if (lane() % 4 == 0) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) store_shared_f32(address + row(half) * sizeof(f32), factors[half]);
        }
        const bool any_moved = __any_sync(kFullWarp, moved);
        if (lane() == 0)
            store_shared_u32(smem_ + Fp8Smem::moved + (buffer_.index() * kMovedWords + warp()) * sizeof(u32), any_moved);
    }

    MLA_DEVICE void store_probabilities(const float (&probabilities)[kThreadScores]) const {
        const u32 box = smem_ + Fp8Smem::probabilities + buffer_.index() * kRowBoxBytes;
        const u32 matrix_row = warp() * 16 + lane() % 16;
#pragma unroll
        for (u32 pair = 0; pair < 4; ++pair) {  // 16 tokens: chunks 2 * pair and 2 * pair + 1
            const float* p = probabilities + pair * 8;
            store_matrix_x4(box + box_chunk_offset(matrix_row, pair * 2 + lane() / 16), pack2<Operand>(p[0], p[1]),
                            pack2<Operand>(p[2], p[3]), pack2<Operand>(p[4], p[5]), pack2<Operand>(p[6], p[7]));
        }
        fence_async_proxy();
    }

    // Hands the values warpgroups what O is to be multiplied by, and writes the lse.
    MLA_DEVICE void finish(i32 item, const Rows& rows) {
        const f32 latent_scale = params_.latent_scale();
        mbarrier_wait(smem_ + Fp8Smem::sums_empty, items_parity_ ^ 1);
        items_parity_ ^= 1;
        const float sums[2] = {quad_sum(rows.sum[0]), quad_sum(rows.sum[1])};
        const bool serves = lane() % 4 == 0;
        if (serves) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half)
                store_shared_f32(smem_ + Fp8Smem::inverse_sums + row(half) * sizeof(f32),
                                 sums[half] == 0.0f ? 0.0f : latent_scale * fast_reciprocal(sums[half]));
        }
        mbarrier_arrive(smem_ + Fp8Smem::sums_full);
        if (!serves) return;
        pin_register(item);  // no register is left to keep its address in
        const BlockWork work = load_block_work(params_, item);
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            store_lse(params_, work, row(half), lse_of(params_, work, rows.maximum[half], sums[half]));
    }

    const Fp8Params& params_;
    u32 smem_;
    u32 items_parity_ = 0;
    RingPosition<kStages> stage_;
    RingPosition<kProbabilityBuffers> buffer_;
};

}  // namespace mla
