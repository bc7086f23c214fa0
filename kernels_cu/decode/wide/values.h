// A values warpgroup: O += P V for half of the latent columns; rescales O when the running maximum moved; stores O.
#pragma once
#include "decode/wide/output.h"
#include "decode/wide/scaled_partial.h"
#include "decode/wide/smem.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

// Kernel: decode/wide/scores.h.
template <class Kernel>
class ValuesRole {
    using Params = typename Kernel::Params;
    using Out = typename Kernel::Out;

public:
    MLA_DEVICE ValuesRole(const Params& params, u32 smem)
        : params_(params), smem_(smem) {}

    // `after_tile(position)` runs when this warp is done with the tile at that ring position.
    template <class AfterTile>
    MLA_DEVICE void run_item(i32 item, AfterTile after_tile) {
        i32 tiles, slot;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
            slot = work.slot;
        }
        if (kGathered && tiles > 0) {  // the item's first stage has its queries
            mbarrier_wait(probabilities_full(smem_, ring_.stage), ring_.parity);
            after_tile(ring_);
            ring_.advance();
        }
        float output[kAccumulators];
#pragma unroll
        for (u32 i = 0; i < kAccumulators; ++i) output[i] = 0.0f;
        if (tiles > 0) {
            for (;;) {  // what only the last tile needs is behind it, or all others would jump over it
                mbarrier_wait(probabilities_full(smem_, ring_.stage), ring_.parity);
                rescale(output);
                multiply(output);
                if (--tiles == 0) break;
                end_tile(after_tile);
            }
            if (kRefines && is_refined()) Out::add_refinement(output);
            if (Kernel::kDividesOutput && is_only()) rescale(output);
            end_tile(after_tile);
        }
        if constexpr (kLseCopies > 1) {
            if (__any_sync(kFullWarp, slot != kWholeJob)) {  // as the compiler sees, all lanes or none
                ScaledPartial<Params, Out>::store(params_, smem_, item, slot, output);
                return;
            }
            if (kHasRegisters) pin_register(item);  // found again: where its results lie would be kept over the loop
        }
        Out::store(params_, item, output);
    }

private:
    // This warp is done with the tile at ring_.
    template <class AfterTile>
    MLA_DEVICE void end_tile(AfterTile after_tile) {
        __syncwarp();
        if (Out::lane() == 0) mbarrier_arrive(tile_empty(smem_, ring_.stage));
        after_tile(ring_);
        ring_.advance();
    }

    // Of this thread's two rows. Signs say whether the item has no other tile, and whether the block is refined
    // (decode/wide/softmax.h).
    MLA_DEVICE u32 factors() const {
        return smem_ + WideSmem::factors + (ring_.stage * kRows + Out::warp() * 16 + Out::lane() / 4) * sizeof(f32);
    }
    MLA_DEVICE bool is_only() const { return __float_as_int(load_shared_f32(factors())) < 0; }
    MLA_DEVICE bool is_refined() const { return __float_as_int(load_shared_f32(factors() + 8 * sizeof(f32))) < 0; }

    MLA_DEVICE void rescale(float (&output)[kAccumulators]) {
        const u32 address = factors();
        float upper = load_shared_f32(address);
        float lower = load_shared_f32(address + 8 * sizeof(f32));
        if (Kernel::kDividesOutput) upper = fabsf(upper);
        if (kRefines) lower = fabsf(lower);
        if (__any_sync(kFullWarp, upper != 1.0f || lower != 1.0f)) Out::scale(upper, lower, output);
    }

    MLA_DEVICE void multiply(float (&output)[kAccumulators]) {
        const u32 stage = stage_address(smem_, ring_.stage);
        const u64 p = descriptor_at(kBoxKMajor, stage + kProbabilities);
        const u64 v = descriptor_at(kLatentNMajor, stage + Out::first_column() / kBoxColumns * kSwizzleAtomBytes);
        constexpr u32 kStepTokens = 16;
        wgmma_pin(output);
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < kTileTokens / kStepTokens; ++step)
            wgmma_ss<Operand, 0, 1>(output, p + descriptor_offset(step * kStepBytes),
                                    v + descriptor_offset(step * kStepTokens / kAtomRows * kLatentGroupBytes), 1);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(output);
    }

    const Params& params_;
    u32 smem_;
    RingPosition ring_;
};

}  // namespace mla
