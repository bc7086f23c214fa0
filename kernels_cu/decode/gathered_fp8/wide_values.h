// A values warpgroup of the kernel for 64 rows of gathered FP8 tokens: O += P V for half of the latent columns; stores O.
#pragma once
#include "decode/gathered/work.h"
#include "decode/gathered_fp8/token_unit.h"
#include "decode/gathered_fp8/wide_query.h"
#include "decode/gathered_fp8/wide_smem.h"
#include "decode/wide/output.h"
#include "ptx/wgmma.h"

namespace mla {

class ValuesRole {
    using Out = WideOutput<GatherParams, !kIsPlanned>;

public:
    MLA_DEVICE ValuesRole(const GatherParams& params, u32 smem) : params_(params), smem_(smem) {}

    MLA_DEVICE void run_item(i32 item) {
        i32 tiles;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
            // The scores warps are done with the queries before: they have released the last P.
            if (tiles > 0) load_query(work);
        }
        float output[kAccumulators];
#pragma unroll
        for (u32 i = 0; i < kAccumulators; ++i) output[i] = 0.0f;
        if (tiles > 0) {
            for (;;) {  // as in the wide kernel: what only the last tile needs is behind it
                mbarrier_wait(probabilities_full(smem_, ring_.stage), ring_.parity);
                scale_by(Smem::factors, output);
                multiply(output);
                if (--tiles == 0) break;
                release(kSlabs - 1);
                ring_.advance();
            }
            scale_by(Smem::inverse_sums, output);
            release(kSlabs - 1);
            ring_.advance();
        }
        Out::store(params_, item, output);
    }

private:
    // This warpgroup's share of an item's queries.
    MLA_DEVICE void load_query(const BlockWork& work) const {
        const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0) - 1;
        const u32 first_row = kScoresQueryRows + warpgroup * QueryLoad::kLoadedRows;
        QueryLoad query;
        query.read(params_, work, first_row);
        query.write(smem_, first_row, params_.scale_log2 * cache_scale(params_));
        mbarrier_arrive(smem_ + Smem::query_full);
    }

    MLA_DEVICE void scale_by(u32 place, float (&output)[kAccumulators]) const {
        const u32 row = smem_ + place + (ring_.stage * kRows + Out::warp() * 16 + Out::lane() / 4) * sizeof(f32);
        const float upper = load_shared_f32(row);
        const float lower = load_shared_f32(row + 8 * sizeof(f32));
        if (__any_sync(kFullWarp, upper != 1.0f || lower != 1.0f)) Out::scale(upper, lower, output);
    }

    // This warp has read the slab for the last time.
    MLA_DEVICE void release(u32 slab) const {
        __syncwarp();
        if (Out::lane() == 0) mbarrier_arrive(slab_empty(smem_, ring_.stage, slab));
    }

    // Frees all slabs but the last, one by one.
    MLA_DEVICE void multiply(float (&output)[kAccumulators]) const {
        const u32 stage = stage_address(smem_, ring_.stage);
        const u64 p = descriptor_at(kBoxKMajor, stage + kProbabilities);
        const u64 v = descriptor_at(kLatentNMajor, stage + Out::first_column() / kBoxColumns * kSwizzleAtomBytes);
        wgmma_pin(output);
        wgmma_fence();
#pragma unroll
        for (u32 slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
            for (u32 product = 0; product < kProducts; ++product) {
                float(&part)[kProductAccumulators] =
                    *reinterpret_cast<float(*)[kProductAccumulators]>(output + product * kProductAccumulators);
                const u32 columns = product * kProductColumns / kBoxColumns * kSwizzleAtomBytes;
                wgmma_ss<Operand, 0, 1>(part, p + descriptor_offset(slab * kStepBytes),
                                        v + descriptor_offset(slab * kSlabTokens / kAtomRows * kLatentGroupBytes + columns), 1);
            }
            wgmma_commit();
        }
        free_slabs<0>();
        wgmma_pin(output);
    }

    template <u32 kSlab>
    MLA_DEVICE void free_slabs() const {
        wgmma_wait<kSlabs - 1 - kSlab>();
        if constexpr (kSlab + 1 < kSlabs) {
            release(kSlab);
            free_slabs<kSlab + 1>();
        }
    }

    const GatherParams& params_;
    u32 smem_;
    RingPosition ring_;
};

}  // namespace mla
