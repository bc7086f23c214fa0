// What scores warpgroups of up to 32 query rows share: S^T = K Q^T of a tile on fp16 tensor cores, masks, and the rows that a warp
// serves at an item's end.
#pragma once
#include "decode/fp8/exact_product.h"
#include "decode/fp8/query.h"
#include "decode/fp8/served_rows.h"
#include "decode/masks.h"
#include "ptx/wgmma.h"

namespace mla {

class TileScores {
protected:
    // `thread` counts the warpgroup's.
    MLA_DEVICE TileScores(const Fp8Params& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads) {}

    MLA_DEVICE void await_part(u32 part) const { mbarrier_wait(part_full(smem_, stage_.index(), part), stage_.parity()); }

    MLA_DEVICE void multiply_exact(float rope_ratio, float (&scores)[kFragment]) const {
        constexpr u32 kPartTurns = kRopeApart ? 0 : kLatentBoxes / kTileParts;  // of the first part
        if (kTileParts > 1 && kRopeApart) await_part(1);
        const auto ahead = [&](u32 turn) {
            if (kTileParts == 1 || turn + 1 != kPartTurns) return;
            wgmma_wait<0>();  // no wgmma may be under way over a wait
            await_part(1);
        };
        multiply_keys(smem_, rope_ratio, scores, [&](u32 box, u32 (&raw)[2][4]) { load_keys(box, raw); }, ahead, [] {});
    }

    // The tokens of a tile that this thread has scores of, and where its 16 bytes of their 64 columns of a latent box lie in a
    // stage; query.h says which columns they are.
    MLA_DEVICE u32 token_of(u32 half) const { return warp_ * kWarpTokens + half * 8 + lane_ / 4; }
    MLA_DEVICE u32 latent_offset(u32 half, u32 box) const {
        return latent_chunk_offset(token_of(half), box / 2, lane_ % 4 * 2 + box % 2);
    }

    MLA_DEVICE void load_keys(u32 box, u32 (&raw)[2][4]) const {
        const u32 stage = stage_address(smem_, stage_.index());
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            load_shared_words(stage + (box < kLatentBoxes ? latent_offset(half, box)
                                                          : kStageRope + rope_chunk_offset(token_of(half), lane_ % 4)),
                              raw[half]);
        }
    }

    // Hidden scores are overwritten, not added to: K past a sequence's end may be NaN. V past it may be too, or left over from
    // another tile, and 0 * NaN is NaN: each thread clears what load_keys gives it of these tokens, so that it overwrites only
    // what it has read itself; the values warps read it after P, which follows. `sequence_end`: keys that there are, counted from
    // the tile's first.
    MLA_DEVICE void mask(i32 item, i32 sequence_end, float (&scores)[kFragment]) const {
        const BlockWork work = load_block_work(params_, item);
        const i32 key = work.seqlen_k - sequence_end + static_cast<i32>(warp_ * kWarpTokens + lane_ / 4);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const i32 end = row_visible_end(params_, work, row_of_lane(lane_, i));
            float& upper = scores[row_element(i)];
            float& lower = scores[row_element(i) + 2];
            upper = key < end ? upper : minus_infinity();
            lower = key + 8 < end ? lower : minus_infinity();
        }
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            if (static_cast<i32>(token_of(half)) < sequence_end) continue;
#pragma unroll
            for (u32 box = 0; box < kLatentBoxes; ++box)
                store_shared_16b(stage_address(smem_, stage_.index()) + latent_offset(half, box), uint4{0, 0, 0, 0});
        }
    }

    MLA_DEVICE void store_probabilities(u32 buffer, const float (&scores)[kFragment], const RowStatistics& rows,
                                        float (&probabilities)[kFragment]) const {
        exponentiate(scores, rows, probabilities);
        store_fragment_transposed<Operand>(smem_ + Fp8Smem::probabilities + buffer * kRowBoxBytes, warp_, lane_,
                                           probabilities);
        fence_async_proxy();
    }

    // Hands the values warpgroups what O is to be multiplied by, and writes the lse. `place`: of the sums, where there are
    // several.
    MLA_DEVICE void serve(const BlockWork& work, f32 latent_scale, const float (&maxima)[kThreadRows],
                          const float (&sums)[kThreadRows], u32 place) const {
        const u32 inverse_sums = smem_ + Fp8Smem::inverse_sums + place * kRows * sizeof(f32);
        float lse[kServedRows];
#pragma unroll
        for (u32 i = 0; i < kServedRows; ++i) {
            const float maximum = served_value(i, warp_, maxima), own = served_value(i, warp_, sums);
            const float inverse = own == 0.0f ? 0.0f : latent_scale * fast_reciprocal(own);
            lse[i] = lse_of(params_, work, maximum, own);
            if (lane_ < kRowLanes) store_shared_f32(inverse_sums + served_row(i, warp_, lane_) * sizeof(f32), inverse);
        }
        __syncwarp();
        // Each thread for what it has written itself, or racecheck reports it.
        mbarrier_arrive(barrier_of(smem_, Fp8Smem::sums_full, place));
#pragma unroll
        for (u32 i = 0; i < kServedRows; ++i) {
            if (lane_ < kRowLanes) store_lse(params_, work, served_row(i, warp_, lane_), lse[i]);
        }
    }

    const Fp8Params& params_;
    u32 smem_, warp_, lane_;
    RingPosition<kStages> stage_;
};

}  // namespace mla
