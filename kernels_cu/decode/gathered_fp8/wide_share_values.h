// A values warpgroup of the kernel for 64 rows of gathered FP8 tokens: O += P V for half of the latent columns; stores O.
#pragma once
#include "decode/gathered/work.h"
#include "decode/gathered_fp8/token_unit.h"
#include "decode/gathered_fp8/wide_query.h"
#include "decode/gathered_fp8/wide_share.h"
#include "decode/gathered_fp8/wide_smem.h"
#include "decode/wide/output.h"
#include "ptx/wgmma.h"

namespace mla {

class ValuesRole {
    using Out = WideOutput<GatherParams, !kIsPlanned>;

public:
    MLA_DEVICE ValuesRole(const GatherParams& params, u32 smem) : params_(params), smem_(smem), share_(smem) {}

    MLA_DEVICE void run(const Items& items) {
        float output[kAccumulators];  // of the item before, packed, until it has been stored
        i32 pending = kNone;  // the item whose output this is
        bool owes_share = false;
        for (i32 item = items.first();; item += items.step()) {
            i32 tiles = 0;
            if (item < items.end()) {
                const BlockWork work = load_block_work(params_, item);
                if (!work.exists()) continue;
                tiles = work.tile_end - work.tile_begin;
                // The scores warps are done with the queries before: they have released the last P.
                if (tiles > 0) load_query(work);
            }
            // Behind the queries, which everything else waits for.
            if (pending != kNone) {
                if (owes_share) share();
                typename Out::Packed packed;
#pragma unroll
                for (u32 i = 0; i < kAccumulators / 2; ++i) packed[i] = __float_as_uint(output[i]);
                Out::store(params_, pending, packed);
            }
            if (item >= items.end()) return;
            if (tiles > 0) {
                for (u32 tile = share_.asked_for(); tile <= kStages; ++tile) share_.convert(tile - 1, 1);
            }
#pragma unroll
            for (u32 i = 0; i < kAccumulators; ++i) output[i] = 0.0f;
            owes_share = tiles > 0;
            if (tiles > 0) {
                for (;;) {  // as in the wide kernel: what only the last tile needs is behind it
                    mbarrier_wait(probabilities_full(smem_, ring_.stage), ring_.parity);
                    scale_by(Smem::factors, output);
                    multiply(output);
                    if (--tiles == 0) break;
                    release(kSlabs - 1);
                    share();
                }
                scale_by(Smem::inverse_sums, output);
                release(kSlabs - 1);
            }
            typename Out::Packed packed;
            Out::pack(params_, item, output, packed);
#pragma unroll
            for (u32 i = 0; i < kAccumulators / 2; ++i) output[i] = __uint_as_float(packed[i]);
            pending = item;
        }
    }

private:
    static constexpr i32 kNone = -1;

    // This warpgroup's share of an item's queries.
    MLA_DEVICE void load_query(const BlockWork& work) {
        const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0) - 1;
        const u32 first_row = kScoresQueryRows + warpgroup * QueryLoad::kLoadedRows;
        QueryLoad query;
        query.read(params_, work, first_row);
        share_.begin();
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

    // Converts this warp's share of the tile after the next in the stage at ring_, which it has released.
    MLA_DEVICE void share() {
        share_.convert(ring_.stage, ring_.parity);
        ring_.advance();
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
    SlabShare share_;
};

}  // namespace mla
