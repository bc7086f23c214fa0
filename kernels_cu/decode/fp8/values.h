// A values warpgroup: O^T += V^T P^T for half of the latent columns. V^T is made in registers: bytes of two tokens are
// interleaved, which transposes them into pairs along the tokens, and converted to fp16.
#pragma once
#include "decode/fp8/columns.h"
#include "decode/fp8/query.h"
#include "ptx/mbarrier.h"

namespace mla {

// A is made for so many M blocks of one k16 step at a time, in so many sets of registers in turn. Made for two at 64 rows, in as
// many registers, ptxas serialises wgmma. At 64 rows fewer products of PV queued leave QK more of the tensor cores: the longer QK, the
// fewer.
constexpr u32 kUnitBlocks = kWide ? 1 : 2;
constexpr u32 kUnits = kWide && kSwapped ? 1 : 2;

class ValuesRole {
public:
    // `index`: of the warpgroup among those for values, known to be the same in all of a warp. Else what follows a branch on it is
    // kept out of the uniform registers, descriptors among it.
    MLA_DEVICE ValuesRole(const Fp8Params& params, u32 smem, u32 index) : params_(params), smem_(smem), index_(index) {}

    // The item is read again for its stores: over its tiles it would cost registers.
    MLA_DEVICE void run_item(i32 item) {
        i32 tiles;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
            if (tiles <= 0) {
                const float zeros[kLaneColumns] = {};
                pdl_wait();
#pragma unroll 1
                for (u32 i = 0; i < kThreadRows; ++i) store_row(row_address(work, row_of_lane(lane(), i)), zeros);
                return;
            }
            if (buffer_.is_at_start())
                Fp8Query::help(params_, work, smem_, index_, thread() % kWarpgroupThreads);
        }
        u64 addresses[kAddresses];
        if constexpr (!kWide) find_rows(item, addresses);  // while there is nothing else to do
        float output[kMBlocks][kFragment];
#pragma unroll
        for (u32 block = 0; block < kMBlocks; ++block)
#pragma unroll
            for (u32 i = 0; i < kFragment; ++i) output[block][i] = 0.0f;
        do {
#pragma unroll
            for (u32 part = 0; part < kTileParts; ++part) mbarrier_wait(part_full(smem_, stage_.index(), part), stage_.parity());
            mbarrier_wait(barrier_of(smem_, Fp8Smem::probabilities_full, buffer_.index()), buffer_.parity());
            rescale(output);
            multiply(output);
            __syncwarp();
            if (lane() == 0) {
                mbarrier_arrive(barrier_of(smem_, Fp8Smem::tile_empty, stage_.index()));
                mbarrier_arrive(barrier_of(smem_, Fp8Smem::probabilities_empty, buffer_.index()));
            }
            stage_.advance();
            buffer_.advance();
        } while (--tiles > 0);
        if constexpr (kWide) find_rows(item, addresses);  // no registers are left to keep them in
        store(addresses, output);
    }

private:
    // Counted from the last scores warpgroup. Wide: from the special register each time, as no register is left to keep what comes of
    // it in.
    static MLA_DEVICE u32 thread() {
        u32 thread = threadIdx.x - (kScoresWarpgroups - 1) * kWarpgroupThreads;
        if (kWide) pin_register(thread);
        return thread;
    }
    static MLA_DEVICE u32 lane() { return thread() % kWarpThreads; }
    // The first of this thread's columns.
    static MLA_DEVICE u32 column() { return first_column(thread()); }

    MLA_DEVICE void rescale(float (&output)[kMBlocks][kFragment]) const {
        u32 moved[kMovedWords];
        load_shared_words(smem_ + Fp8Smem::moved + buffer_.index() * kMovedWords * sizeof(u32), moved);
        u32 any = 0;
#pragma unroll
        for (u32 word = 0; word < kMovedWords; ++word) any |= moved[word];
        if (any == 0) return;
        const u32 factors = smem_ + Fp8Smem::factors + buffer_.index() * kRows * sizeof(f32);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const float factor = load_shared_f32(factors + row_of_lane(lane(), i) * sizeof(f32));
#pragma unroll
            for (u32 block = 0; block < kMBlocks; ++block) {
                output[block][row_element(i)] *= factor;
                output[block][row_element(i) + 2] *= factor;
            }
        }
    }

    // While some units of A are multiplied, the next is made in other registers.
    MLA_DEVICE void multiply(float (&output)[kMBlocks][kFragment]) const {
        constexpr u32 kSteps = kTileTokens / kStepTokens;
        const u32 tokens[2] = {token_address(0), token_address(1)};
        const u64 p = descriptor_at(kBoxKMajor, smem_ + Fp8Smem::probabilities + buffer_.index() * kRowBoxBytes);
        u32 raw[4][kLaneWords];
        u32 a[kUnits][kUnitBlocks][4];
#pragma unroll
        for (u32 block = 0; block < kMBlocks; ++block) wgmma_pin(output[block]);
#pragma unroll
        for (u32 step = 0; step < kSteps; ++step) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i)  // of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of the step
                load_shared_words(tokens[i % 2] + (step * 2 + i / 2) * kLatentGroupBytes, raw[i]);
#pragma unroll
            for (u32 first = 0; first < kMBlocks; first += kUnitBlocks) {
                const u32 index = (step * kMBlocks + first) / kUnitBlocks;
                u32(&unit)[kUnitBlocks][4] = a[index % kUnits];
                if (index >= kUnits) wgmma_wait<kUnits - 1>();
#pragma unroll
                for (u32 i = 0; i < kUnitBlocks; ++i) transpose_codes(raw, first + i, unit[i]);
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

    // Where this thread's columns of token 2 t + e lie, t = lane % 4; those of tokens 8 further are kLatentGroupBytes further.
    MLA_DEVICE u32 token_address(u32 e) const {
        return stage_address(smem_, stage_.index()) + column() % 16 +
               latent_chunk_offset(lane() % 4 * 2 + e, column() / kByteBoxColumns, column() % kByteBoxColumns / 16);
    }

    // Where this lane's rows (of 64, two) begin in the result: the whole warp asks it.
    static constexpr u32 kAddresses = ceil_div(kRows, kWarpThreads);
    MLA_DEVICE void find_rows(i32 item, u64 (&addresses)[kAddresses]) const {
        if (kWide) pin_register(item);  // no register is left to keep what comes of it in
        const BlockWork work = load_block_work(params_, item);
#pragma unroll
        for (u32 i = 0; i < kAddresses; ++i) addresses[i] = row_address(work, lane() + i * kWarpThreads);
    }

    // Normalises and stores. Where rows lie and their factors are read for some rows at once, as many as there are registers for:
    // one latency, not one a row.
    MLA_DEVICE void store(const u64 (&addresses)[kAddresses], const float (&output)[kMBlocks][kFragment]) {
        constexpr u32 kAhead = kWide ? 4 : kThreadRows;
        u64 places[kAhead];
        find_places(0, addresses, places);
        mbarrier_wait(barrier_of(smem_, Fp8Smem::sums_full, sums_.index()), sums_.parity());
        pdl_wait();
#pragma unroll
        for (u32 first = 0; first < kThreadRows; first += kAhead) {
            if (first > 0) find_places(first, addresses, places);
            float inverse[kAhead];
#pragma unroll
            for (u32 i = 0; i < kAhead; ++i)
                inverse[i] = load_shared_f32(smem_ + Fp8Smem::inverse_sums +
                                             (sums_.index() * kRows + row_of_lane(lane(), first + i)) * sizeof(f32));
#pragma unroll
            for (u32 i = 0; i < kAhead; ++i) {
                float columns[kLaneColumns];
#pragma unroll
                for (u32 c = 0; c < kLaneColumns; ++c)
                    columns[c] = output[c / 2][row_element(first + i) + c % 2 * 2] * inverse[i];
                store_row(places[i], columns);
            }
        }
        __syncwarp();
        if (lane() == 0) mbarrier_arrive(barrier_of(smem_, Fp8Smem::sums_empty, sums_.index()));
        sums_.advance();
    }

    // Of this thread's rows from its `first` on.
    template <u32 Count>
    static MLA_DEVICE void find_places(u32 first, const u64 (&addresses)[kAddresses], u64 (&places)[Count]) {
#pragma unroll
        for (u32 i = 0; i < Count; ++i)
            places[i] = __shfl_sync(kFullWarp, addresses[(first + i) * 4 / kWarpThreads], row_of_lane(lane(), first + i) % kWarpThreads);
    }

    MLA_DEVICE u64 row_address(const BlockWork& work, u32 row) const { return result_address(params_, work, row); }
    static MLA_DEVICE void store_row(u64 address, const float (&columns)[kLaneColumns]) {
        store_columns(address, columns, [] { return column(); });
    }

    const Fp8Params& params_;
    u32 smem_, index_;
    RingPosition<kSumsPlaces> sums_;
    RingPosition<kStages> stage_;
    RingPosition<kProbabilityBuffers> buffer_;
};

}  // namespace mla
