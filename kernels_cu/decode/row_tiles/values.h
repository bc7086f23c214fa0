// A values warpgroup: O^T += V^T P^T for half of the latent columns, as for e4m3 caches (decode/fp8/values.h), but that V is
// multiplied by its tokens' scales. All columns of a warp have the same ones.
#pragma once
#include "decode/row_tiles/smem.h"
#include "decode/fp8/columns.h"
#include "ptx/wgmma.h"

namespace mla {

static_assert(kGroupColumns % kWarpColumns == 0, "a warp's columns have one scale");
// A is made for two M blocks of one k16 step at a time, in two sets of registers in turn.
constexpr u32 kUnitBlocks = 2;
constexpr u32 kUnits = 2;
constexpr u32 kTileSteps = kTileTokens / kStepTokens;

class ValuesRole {
public:
    // `thread` counts from the warpgroup ahead of those for values.
    MLA_DEVICE ValuesRole(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), lane_(thread % kWarpThreads), column_(first_column(thread)) {}

    MLA_DEVICE void run(const Items& items) {
        for (i32 item = items.first(); item < items.end(); item += items.step()) {
            const BlockWork work = load_block_work(params_, item);
            if (work.exists()) run_item(work);
        }
    }

private:
    MLA_DEVICE void run_item(const BlockWork& work) {
        i32 tiles = work.tile_end - work.tile_begin;
        if (tiles <= 0) {
            store_nothing(work);
            return;
        }
        const u64 row = result_address(params_, work, lane_);  // a lane for each row: the warp asks it
        float output[kMBlocks][kFragment];
#pragma unroll
        for (u32 block = 0; block < kMBlocks; ++block)
#pragma unroll
            for (u32 i = 0; i < kFragment; ++i) output[block][i] = 0.0f;
        for (;;) {
            mbarrier_wait(barrier_of(smem_, Smem::tile_full, ring_.index()), ring_.parity());
            mbarrier_wait(barrier_of(smem_, Smem::probabilities_full, buffers_.index), buffers_.parity);
            if (load_shared_u32(smem_ + Smem::rescales + buffers_.index * sizeof(u32)) != 0) rescale(output);
            multiply(output);
            __syncwarp();
            if (lane_ == 0) mbarrier_arrive(barrier_of(smem_, Smem::tile_empty, ring_.index()));
            ring_.advance();
            if (--tiles == 0) break;
            release_probabilities();
        }
        store(row, output);
        release_probabilities();
    }

    // Of an item's last tile, when its inverse sums have been read, too.
    MLA_DEVICE void release_probabilities() {
        __syncwarp();
        if (lane_ == 0) mbarrier_arrive(barrier_of(smem_, Smem::probabilities_empty, buffers_.index));
        buffers_.advance();
    }

    MLA_DEVICE f32 of_row(u32 place, u32 i) const {
        return load_shared_f32(smem_ + place + (buffers_.index * kRows + row_of_lane(lane_, i)) * sizeof(f32));
    }

    MLA_DEVICE void rescale(float (&output)[kMBlocks][kFragment]) const {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const float factor = of_row(Smem::factors, i);
#pragma unroll
            for (u32 block = 0; block < kMBlocks; ++block) {
                output[block][row_element(i)] *= factor;
                output[block][row_element(i) + 2] *= factor;
            }
        }
    }

    // While some units of A are multiplied, the next is made in other registers.
    MLA_DEVICE void multiply(float (&output)[kMBlocks][kFragment]) const {
        const u64 p = descriptor_at(kBoxKMajor, smem_ + Smem::probabilities + buffers_.index * kRowBoxBytes);
        const u32 rows = stage_address(smem_, ring_.index()) + lane_ % kQuadLanes * 2 * kRowBytes + column_;
        u32 scales[kTileSteps / 2][4];  // for each step two pairs of tokens
#pragma unroll
        for (u32 i = 0; i < kTileSteps / 2; ++i)
            load_shared_words(value_scales_address(smem_, ring_.index(), column_ / kGroupColumns, lane_ % kQuadLanes) + i * 16,
                              scales[i]);
        u32 raw[4][kLaneWords];
        u32 a[kUnits][kUnitBlocks][4];
#pragma unroll
        for (u32 block = 0; block < kMBlocks; ++block) wgmma_pin(output[block]);
#pragma unroll
        for (u32 step = 0; step < kTileSteps; ++step) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i)  // of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of the step
                load_shared_words(rows + (step * kStepTokens + i / 2 * 8 + i % 2) * kRowBytes, raw[i]);
#pragma unroll
            for (u32 first = 0; first < kMBlocks; first += kUnitBlocks) {
                const u32 index = (step * kMBlocks + first) / kUnitBlocks;
                u32(&unit)[kUnitBlocks][4] = a[index % kUnits];
                if (index >= kUnits) wgmma_wait<kUnits - 1>();
#pragma unroll
                for (u32 i = 0; i < kUnitBlocks; ++i) {
                    transpose_codes(raw, first + i, unit[i]);
#pragma unroll
                    for (u32 j = 0; j < 4; ++j)
                        unit[i][j] = multiply_fp16_pairs(unit[i][j], scales[step / 2][step % 2 * 2 + j / 2]);
                }
                wgmma_fence();
#pragma unroll
                for (u32 i = 0; i < kUnitBlocks; ++i)
                    wgmma_rs<Operand, 0>(output[first + i], unit[i][0], unit[i][1], unit[i][2], unit[i][3],
                                         p + descriptor_offset(step * kStepBytes), 1);
                wgmma_commit();
            }
        }
        wgmma_wait<0>();
#pragma unroll
        for (u32 block = 0; block < kMBlocks; ++block) wgmma_pin(output[block]);
    }

    // Normalises and stores one row after the other.
    MLA_DEVICE void store(u64 lane_row, const float (&output)[kMBlocks][kFragment]) {
        mbarrier_wait(barrier_of(smem_, Smem::sums_full, buffers_.index), sums_parities_ >> buffers_.index & 1);
        sums_parities_ ^= 1u << buffers_.index;
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const float inverse = of_row(Smem::inverse_sums, i);
            float columns[kLaneColumns];
#pragma unroll
            for (u32 c = 0; c < kLaneColumns; ++c) columns[c] = output[c / 2][row_element(i) + c % 2 * 2] * inverse;
            store_row(__shfl_sync(kFullWarp, lane_row, row_of_lane(lane_, i)), columns);
        }
    }

    // No key is visible to any row.
    MLA_DEVICE void store_nothing(const BlockWork& work) const {
        const float zeros[kLaneColumns] = {};
#pragma unroll 1
        for (u32 i = 0; i < kThreadRows; ++i) store_row(result_address(params_, work, row_of_lane(lane_, i)), zeros);
        if (column_ / kWarpColumns == 0 && lane_ < kRows) store_lse(params_, work, lane_, empty_lse(params_, work));
    }

    MLA_DEVICE void store_row(u64 address, const float (&columns)[kLaneColumns]) const {
        store_columns(address, columns, [this] { return column_; });
    }

    const GatherParams& params_;
    u32 smem_, lane_, column_;
    u32 sums_parities_ = 0;  // a bit for each buffer
    Buffers buffers_;
    StageRing ring_;
};

}  // namespace mla
