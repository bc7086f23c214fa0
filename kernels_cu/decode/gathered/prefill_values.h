// A values warpgroup of the wide prefill kernel: O += P V for half of the latent columns; rescales O when the running maximum moved; stores O.
#pragma once
#include "decode/gathered/output.h"
#include "decode/gathered/prefill_smem.h"
#include "decode/gathered/work.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

class ValuesRole {
    using Out = GatheredOutput;

public:
    MLA_DEVICE ValuesRole(const GatherParams& params, u32 smem) : params_(params), smem_(smem) {}

    MLA_DEVICE void run_item(i32 item) {
        i32 tiles;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
        }
        if (tiles > 0) {  // the item's first stage has its queries
            mbarrier_wait(probabilities_full(smem_, ring_.stage), ring_.parity);
            ring_.advance();
        }
        float output[kAccumulators];
#pragma unroll
        for (u32 i = 0; i < kAccumulators; ++i) output[i] = 0.0f;
        for (; tiles > 0; --tiles) {
            mbarrier_wait(probabilities_full(smem_, ring_.stage), ring_.parity);
            rescale(output);
            multiply(output);
            if (kRefines && tiles == 1 && is_refined()) Out::add_refinement(output);
            if (!kRefines && tiles == 1 && is_only()) rescale(output);
            mbarrier_arrive(tile_empty(smem_, ring_.stage));  // every lane, which has read factors
            ring_.advance();
        }
        Out::store(params_, item, output);
    }

private:
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
        if (kRefines)
            lower = fabsf(lower);
        else
            upper = fabsf(upper);
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
        for (u32 step = 0; step < kTileTokens / kStepTokens; ++step) {
#pragma unroll
            for (u32 product = 0; product < kProducts; ++product) {
                float(&part)[kProductAccumulators] =
                    *reinterpret_cast<float(*)[kProductAccumulators]>(output + product * kProductAccumulators);
                const u32 columns = product * kProductColumns / kBoxColumns * kSwizzleAtomBytes;
                wgmma_ss<Operand, 0, 1>(part, p + descriptor_offset(step * kStepBytes),
                                        v + descriptor_offset(step * kStepTokens / kAtomRows * kLatentGroupBytes + columns), 1);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(output);
    }

    const GatherParams& params_;
    u32 smem_;
    RingPosition ring_;
};

}  // namespace mla
