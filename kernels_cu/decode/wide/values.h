// A values warpgroup: O += P V for half of the latent columns; rescales O when the running maximum moved; stores O.
#pragma once
#include "core/quad.h"
#include "decode/partial.h"
#include "decode/wide/smem.h"
#include "ptx/convert.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

constexpr u32 kValueColumns = kLatent / kValueWarpgroups;
static_assert(kLatent % (kValueWarpgroups * kBoxColumns) == 0, "each values warpgroup takes whole boxes");
constexpr u32 kAccumulators = kRows * kValueColumns / kWarpgroupThreads;

// Kernel: decode/wide/scores.h.
template <class Kernel>
class ValuesRole {
    using Params = typename Kernel::Params;

public:
    MLA_DEVICE ValuesRole(const Params& params, u32 smem)
        : params_(params), smem_(smem) {}

    // `after_tile(position)` runs when this warp is done with the tile at that ring position.
    template <class AfterTile>
    MLA_DEVICE void run_item(i32 item, AfterTile after_tile) {
        i32 tiles;
        {
            const BlockWork work = load_block_work(params_, item);
            if (!work.exists()) return;
            tiles = work.tile_end - work.tile_begin;
        }
        if (kGathered && tiles > 0) {  // the item's first stage has its queries
            after_tile(ring_);
            ring_.advance();
        }
        float output[kAccumulators];
#pragma unroll
        for (u32 i = 0; i < kAccumulators; ++i) output[i] = 0.0f;
        for (; tiles > 0; --tiles) {
            mbarrier_wait(probabilities_full(smem_, ring_.stage), ring_.parity);
            rescale(output);
            multiply(output);
            __syncwarp();
            if (lane() == 0) mbarrier_arrive(tile_empty(smem_, ring_.stage));
            after_tile(ring_);
            ring_.advance();
        }
        store(item, output);
    }

private:
    // From the special register each time: no registers are left to keep them in.
    static MLA_DEVICE u32 lane() { return thread() % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return thread() % kWarpgroupThreads / kWarpThreads; }
    static MLA_DEVICE u32 first_column() { return (thread() / kWarpgroupThreads - 1) * kValueColumns; }
    static MLA_DEVICE u32 thread() {
        u32 thread = threadIdx.x;
        if (kGathered) pin_register(thread);
        return thread;
    }

    MLA_DEVICE void rescale(float (&output)[kAccumulators]) {
        const u32 factors = smem_ + WideSmem::factors + (ring_.stage * kRows + warp() * 16 + lane() / 4) * sizeof(f32);
        const float upper = load_shared_f32(factors);
        const float lower = load_shared_f32(factors + 8 * sizeof(f32));
        if (__any_sync(kFullWarp, upper != 1.0f || lower != 1.0f)) {
#pragma unroll
            for (u32 i = 0; i < kAccumulators; i += 4) {
                output[i] *= upper;
                output[i + 1] *= upper;
                output[i + 2] *= lower;
                output[i + 3] *= lower;
            }
        }
    }

    MLA_DEVICE void multiply(float (&output)[kAccumulators]) {
        const u32 stage = stage_address(smem_, ring_.stage);
        const u64 p = descriptor_at(kBoxKMajor, stage + kProbabilities);
        const u64 v = descriptor_at(kLatentNMajor, stage + first_column() / kBoxColumns * kSwizzleAtomBytes);
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

    MLA_DEVICE void store(i32 item, float (&output)[kAccumulators]) {
        if (kPartialIsScaled) pin_register(item);  // looked up after the last tile: there are no registers to keep it in
        // Packing first frees the registers that the addresses below need.
        u32 packed[kAccumulators / 2];
        if (kPartialIsScaled && load_block_work(params_, item).is_partial()) {
            const u32 exponent = fit_half(output);
            pack<Fp16>(output, packed);
            const BlockWork work = load_block_work(params_, item);
            const i32 row = warp() * 16 + lane();
            if (lane() < 16 && row_exists(work, row))
                partial_exponents(params_, work, row)[first_column() / kValueColumns] = exponent;
        } else {
            pack<Output>(output, packed);
        }
        const BlockWork work = load_block_work(params_, item);
        const u32 lane_in_quad = lane() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const i32 row = warp() * 16 + lane() / 4 + half * 8;
            const bool exists = row_exists(work, row);
            u16* destination = output_row(params_, work, row) + first_column() + lane_in_quad * 8;
#pragma unroll
            for (u32 block = 0; block < kValueColumns / 32; ++block) {
                u32 words[4];
#pragma unroll
                for (u32 j = 0; j < 4; ++j) words[j] = packed[(block * 4 + j) * 2 + half];
                quad_transpose(words, lane_in_quad);
                const uint4 chunk{words[0], words[1], words[2], words[3]};
                if (exists && Kernel::kStreamsOutput) store_streaming_16b(destination + block * 32, chunk);
                if (exists && !Kernel::kStreamsOutput) *reinterpret_cast<uint4*>(destination + block * 32) = chunk;
            }
        }
    }

    // Divides by a power of two, if need be, so that fp16 holds the values; its exponent.
    static MLA_DEVICE u32 fit_half(float (&output)[kAccumulators]) {
        MagnitudeBound bound;
#pragma unroll
        for (u32 i = 0; i < kAccumulators; ++i) bound.add(i, output[i]);
        const u32 exponent = choose_exponent(bound.get());
        if (exponent != kExponentOfOne) {
#pragma unroll
            for (u32 i = 0; i < kAccumulators; ++i) output[i] *= inverse_power(exponent);
        }
        return exponent;
    }

    template <class T>
    static MLA_DEVICE void pack(const float (&output)[kAccumulators], u32 (&packed)[kAccumulators / 2]) {
#pragma unroll
        for (u32 i = 0; i < kAccumulators / 2; ++i) {
            packed[i] = pack2<T>(output[2 * i], output[2 * i + 1]);
            pin_register(packed[i]);
        }
    }

    const Params& params_;
    u32 smem_;
    RingPosition ring_;
};

}  // namespace mla
