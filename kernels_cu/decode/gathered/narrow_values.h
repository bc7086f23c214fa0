// The values warpgroup of the narrow kernel for gathered tokens: O^T += V^T P^T, then the output.
#pragma once
#include "decode/gathered/narrow_smem.h"
#include "decode/gathered/narrow_work.h"
#include "decode/narrow/scaled_partial.h"
#include "decode/narrow/store.h"
#include "decode/rows.h"

namespace mla {

class ValuesRole {
public:
    MLA_DEVICE ValuesRole(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), thread_(thread), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads) {}

    MLA_DEVICE void run(const Items& items) {
        for (i32 item = items.first(); item < items.end(); item += items.step()) {
            const BlockWork work = load_block_work(params_, item);
            if (work.exists()) run_item(work, item);
        }
        if constexpr (kIsClustered) {
            cluster_sync();
            merge_cluster<kWarpgroupWarps>(params_, warp_, lane_);
        }
    }

private:
    MLA_DEVICE void run_item(const BlockWork& work, i32 item) {
        if (work.tile_begin >= work.tile_end) {
            if constexpr (kIsClustered) {
                if (thread_ < kRows * kRowValues) *row_value(0, thread_) = minus_infinity();
                return;
            }
            store_empty(params_, work, thread_);
            if (thread_ < kRows) store_max_logit(params_, work, thread_, minus_infinity());
            return;
        }
        ring_.skip_query();  // the scores warps free it
        float output[kLatentBoxes][kFragment];
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            const bool is_first = tile == work.tile_begin;
            mbarrier_wait(probabilities_full_barrier(smem_, buffers_.index), buffers_.parity);
            if (!is_first && any_rescales())
                rescale_by(Smem::factors, output);
            const bool is_last = tile + 1 == work.tile_end;
            accumulate(!is_first, is_last ? kStagedFrees : 0, output);
            if (!is_last) {
                release_probabilities();
                ring_.advance();
                buffers_.advance();
            }
        }
        mbarrier_wait(sums_full_barrier(smem_, buffers_.index), sums_parities_ >> buffers_.index & 1);
        sums_parities_ ^= 1u << buffers_.index;
        if (work.is_refined()) add_refinement(output);
        float inverse[kThreadRows];
        load_of_rows(Smem::inverse_sums, inverse);
        if (!kPartialIsScaled) rescale(inverse, output);
        release_probabilities();
        store(work, item, inverse, output);
        ring_.advance();
        buffers_.advance();
    }

    // With rows along M there is a word of each scores warp, and lane 0 reads them, which announces that the buffer is free: racecheck
    // follows whoever reads and arrives himself.
    MLA_DEVICE bool any_rescales() const {
        u32 words[Smem::rescales_bytes / sizeof(u32)] = {};
        if (!kRowsAlongM || lane_ == 0) load_shared_words(rescales(smem_, buffers_.index), words);
        u32 any = 0;
#pragma unroll
        for (const u32 word : words) any |= word;
        return kRowsAlongM ? __any_sync(kFullWarp, any != 0) : any != 0;
    }

    // The output turns into rows in the place of the last tile's first boxes.
    static constexpr u32 kBoxesPerStagedBox = kBoxBytes / kRowBoxBytes;
    static constexpr u32 kStagedBoxes = (kLatentBoxes + kBoxesPerStagedBox - 1) / kBoxesPerStagedBox;
    static constexpr u32 kStagedFrees = (kStagedBoxes + kFreedBoxes - 1) / kFreedBoxes;

    MLA_DEVICE u32 staged_box(u32 box) const {
        return box_address(smem_, ring_, box / kBoxesPerStagedBox) + box % kBoxesPerStagedBox * kRowBoxBytes;
    }

    MLA_DEVICE void barrier() const { named_barrier_sync(kValuesBarrier, kWarpgroupThreads); }

    MLA_DEVICE void load_of_rows(u32 place, float (&values)[kThreadRows]) const {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            values[i] = load_shared_f32(smem_ + place + (buffers_.index * kRows + row_of_lane(lane_, i)) * sizeof(f32));
    }

    MLA_DEVICE void rescale_by(u32 place, float (&output)[kLatentBoxes][kFragment]) const {
        float factor[kThreadRows];
        load_of_rows(place, factor);
        rescale(factor, output);
    }

    // PV of the tile at ring_. Boxes (or groups) from `first_freed` on are freed one by one as they have been multiplied.
    MLA_DEVICE void accumulate(bool onto_output, u32 first_freed, float (&output)[kLatentBoxes][kFragment]) const {
        const u64 p = descriptor_at(kBoxKMajor, smem_ + Smem::probabilities + buffers_.index * kRowBoxBytes);
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) wgmma_pin(output[box]);
        wgmma_fence();
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            if (box < kLatentBoxes) accumulate_box(box_address(smem_, ring_, box), p, onto_output, output[box]);
            if (kFreesBoxes && box < kLatentBoxes)
                free_box_before(box, first_freed);
            else if (!kFreesBoxes && box % kGroupBoxes == kGroupBoxes - 1)
                wgmma_commit();
        }
        if (kFreesBoxes) {
            wgmma_wait<0>();
            release(first_freed < kLatentBoxes ? kLatentBoxes - 1 : first_freed, kTileBoxes);
        } else {
            free_groups<0>(first_freed);
        }
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) wgmma_pin(output[box]);
    }

    // The one before, while the box is multiplied. Products are not let far ahead of who asks for them: behind all it would be too late.
    MLA_DEVICE void free_box_before(u32 box, u32 first_freed) const {
        wgmma_commit();
        if (box == 0) return;
        wgmma_wait<1>();
        if (box > first_freed) release(box - 1, box);
        if (box + 1 < kLatentBoxes) wgmma_fence();  // past a branch
    }

    template <u32 kGroup>
    MLA_DEVICE void free_groups(u32 first_freed) const {
        wgmma_wait<kTileGroups - 1 - kGroup>();
        if (kGroup >= first_freed) release(kGroup, kGroup + 1);
        if constexpr (kGroup + 1 < kTileGroups) free_groups<kGroup + 1>(first_freed);
    }

    // Of the i-th of a tile's boxes, or groups.
    MLA_DEVICE u32 empty_barrier_of(u32 i) const {
        return empty_barrier(smem_, ring_.place(i / kGroupFrees).index, i % kGroupFrees);
    }

    // PV of this warp has read these boxes, or groups, of the tile for the last time.
    MLA_DEVICE void release(u32 begin, u32 end) const {
        __syncwarp();
        const u32 i = begin + lane_;
        if (i < end) mbarrier_arrive(empty_barrier_of(i), kWarpThreads);
    }

    // This lane has read what was staged: racecheck follows whoever reads and arrives himself.
    MLA_DEVICE void release_staged() const {
#pragma unroll
        for (u32 i = 0; i < kStagedFrees; ++i) mbarrier_arrive(empty_barrier_of(i));
    }

    MLA_DEVICE void release_probabilities() const {
        __syncwarp();
        if (lane_ == 0) mbarrier_arrive(probabilities_empty_barrier(smem_, buffers_.index));
    }

    MLA_DEVICE void store(const BlockWork& work, i32 item, float (&inverse)[kThreadRows],
                          float (&output)[kLatentBoxes][kFragment]) const {
        if (kPartialIsFloat && work.is_partial()) {
            release(0, kStagedFrees);
            store_float_partial(params_, work, warp_, lane_, output);
            return;
        }
        barrier();  // PV of all warps has read the boxes that the output goes to
        if constexpr (kIsClustered) {
            store_shared(output);
            return;
        }
        if constexpr (kPartialIsScaled) {
            const auto place = [this](u32 box) { return staged_box(box); };
            const u32 exponent = stage_normalised(work, place, warp_, lane_, inverse, output);
            if (work.is_partial() && lane_ < kRows && row_exists(work, lane_))
                partial_exponents(params_, work, lane_)[warp_] = exponent;
        } else {
#pragma unroll
            for (u32 box = 0; box < kLatentBoxes; ++box)
                store_fragment_transposed<Output>(staged_box(box), warp_, lane_, output[box]);
        }
        barrier();  // all of the output is staged
        // Of prefill it is much, nobody reads it soon, and tokens are read again.
        // The work is read again where no register is left to keep all of it in.
        const BlockWork place = kByRequest ? load_block_work(params_, item) : work;
        store_output_rows<!kIsPlanned>(params_, place, thread_, [this](u32 box, u32 row, u32 index) {
            return load_shared_16b(staged_box(box) + box_chunk_offset(row, index));
        });
        release_staged();
    }

    // The whole output, for the cluster.
    MLA_DEVICE void store_shared(const float (&output)[kLatentBoxes][kFragment]) const {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const u32 place = shared_output(smem_, row_of_lane(lane_, i), warp_ * kWarpTokens + lane_ / 4);
#pragma unroll
            for (u32 box = 0; box < kLatentBoxes; ++box) {
                store_shared_f32(place + box * kBoxColumns * sizeof(f32), output[box][row_element(i)]);
                store_shared_f32(place + (box * kBoxColumns + 8) * sizeof(f32), output[box][row_element(i) + 2]);
            }
        }
    }

    const GatherParams& params_;
    u32 smem_, thread_, warp_, lane_;
    u32 sums_parities_ = 0;  // a bit for each buffer
    GroupRing ring_;
    Buffers buffers_;
};

}  // namespace mla
