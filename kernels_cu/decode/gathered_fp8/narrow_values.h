// The values warpgroup of the narrow kernel for FP8 caches: O^T += V^T P^T, then the output.
#pragma once
#include "decode/gathered/narrow_work.h"
#include "decode/gathered_fp8/narrow_smem.h"
#include "decode/narrow/store.h"

namespace mla {

class ValuesRole {
public:
    MLA_DEVICE ValuesRole(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), thread_(thread) {}

    MLA_DEVICE void run(const Items& items) {
        for (i32 item = items.first(); item < items.end(); item += items.step()) {
            const BlockWork work = load_block_work(params_, item);
            if (work.exists()) run_item(work);
        }
    }

private:
    MLA_DEVICE u32 warp() const { return thread_ / kWarpThreads; }
    MLA_DEVICE u32 lane() const { return thread_ % kWarpThreads; }

    // The output turns into rows in the place of the last tile's last boxes.
    static constexpr u32 kStagedBytes = kLatentBoxes * kRowBoxBytes;
    static constexpr u32 kStagedGroups = ceil_div(kStagedBytes, kFreedBoxes * kBoxBytes);
    static constexpr u32 kFirstStaged = kFreedGroups - kStagedGroups;

    MLA_DEVICE void run_item(const BlockWork& work) {
        if (work.tile_begin >= work.tile_end) {
            store_empty(params_, work, thread_);
            if (thread_ < kRows) store_max_logit(params_, work, thread_, minus_infinity());
            return;
        }
        float output[kLatentBoxes][kFragment];
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            const bool is_first = tile == work.tile_begin, is_last = tile + 1 == work.tile_end;
            mbarrier_wait(probabilities_full_barrier(smem_, buffers_.index), buffers_.parity);
            if (!is_first && load_shared_u32(smem_ + Smem::rescales + buffers_.index * sizeof(u32)))
                rescale_by(Smem::factors, output);
            accumulate(!is_first, is_last ? kFirstStaged : kFreedGroups, output);
            if (!is_last) {
                release_probabilities();
                buffers_.advance();
            }
        }
        mbarrier_wait(sums_full_barrier(smem_, buffers_.index), sums_parities_ >> buffers_.index & 1);
        sums_parities_ ^= 1u << buffers_.index;
        rescale_by(Smem::inverse_sums, output);
        release_probabilities();
        store(work, output);
        buffers_.advance();
    }

    MLA_DEVICE u32 staged_box(u32 box) const {
        return smem_ + Smem::values + Smem::value_bytes - kStagedBytes + box * kRowBoxBytes;
    }

    MLA_DEVICE void barrier() const { named_barrier_sync(kValuesBarrier, kWarpgroupThreads); }

    MLA_DEVICE void rescale_by(u32 place, float (&output)[kLatentBoxes][kFragment]) const {
        float factor[kThreadRows];
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            factor[i] = load_shared_f32(smem_ + place + (buffers_.index * kRows + row_of_lane(lane(), i)) * sizeof(f32));
        rescale(factor, output);
    }

    // PV of the tile. Groups of boxes before `kept` are freed one by one as they have been multiplied.
    MLA_DEVICE void accumulate(bool onto_output, u32 kept, float (&output)[kLatentBoxes][kFragment]) const {
        const u64 p = descriptor_at(kBoxKMajor, smem_ + Smem::probabilities + buffers_.index * kRowBoxBytes);
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) wgmma_pin(output[box]);
        wgmma_fence();
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) {
            accumulate_box(smem_ + Smem::values + box * kBoxBytes, p, onto_output, output[box]);
            if (box % kFreedBoxes == kFreedBoxes - 1) wgmma_commit();
        }
        free_groups<0>(kept);
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) wgmma_pin(output[box]);
    }

    template <u32 kGroup>
    MLA_DEVICE void free_groups(u32 kept) const {
        wgmma_wait<kFreedGroups - 1 - kGroup>();
        if (kGroup < kept) release(kGroup, kGroup + 1);
        if constexpr (kGroup + 1 < kFreedGroups) free_groups<kGroup + 1>(kept);
    }

    // This warp has read these groups of the tile for the last time.
    MLA_DEVICE void release(u32 begin, u32 end) const {
        __syncwarp();
        const u32 group = begin + lane();
        if (group < end) mbarrier_arrive(values_empty_barrier(smem_, group));
    }

    MLA_DEVICE void release_probabilities() const {
        __syncwarp();
        if (lane() == 0) mbarrier_arrive(probabilities_empty_barrier(smem_, buffers_.index));
    }

    MLA_DEVICE void store(const BlockWork& work, float (&output)[kLatentBoxes][kFragment]) const {
        if (kPartialIsFloat && work.is_partial()) {
            release(kFirstStaged, kFreedGroups);
            store_float_partial(params_, work, warp(), lane(), output);
            return;
        }
        barrier();  // PV of all warps has read the boxes that the output goes to
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box)
            store_fragment_transposed<Output>(staged_box(box), warp(), lane(), output[box]);
        barrier();  // all of the output is staged
        // Of prefill it is much, nobody reads it soon, and tokens are read again.
        store_output_rows<!kIsPlanned>(params_, work, thread_, [this](u32 box, u32 row, u32 index) {
            return load_shared_16b(staged_box(box) + box_chunk_offset(row, index));
        });
        release(kFirstStaged, kFreedGroups);
    }

    const GatherParams& params_;
    u32 smem_, thread_;
    u32 sums_parities_ = 0;  // a bit for each buffer
    Buffers buffers_;
};

}  // namespace mla
