// What the values warpgroups of 64 rows share: which part of O a thread holds, and how it is scaled and stored.
#pragma once
#include "core/quad.h"
#include "decode/partial.h"
#include "decode/wide/row_places.h"
#include "ptx/convert.h"
#include "ptx/warp.h"

namespace mla {

// Warpgroup 0: scores; 1 and 2: values.
constexpr u32 kValueWarpgroups = 2;
constexpr u32 kValueColumns = kLatent / kValueWarpgroups;
static_assert(kLatent % (kValueWarpgroups * kBoxColumns) == 0, "each values warpgroup takes whole boxes");
constexpr u32 kAccumulators = kRows * kValueColumns / kWarpgroupThreads;

// kStreams: whether the output is the first to leave L2.
template <class Params, bool kStreams>
class WideOutput {
public:
    // From the special register each time: no registers are left to keep them in.
    static MLA_DEVICE u32 lane() { return thread() % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return thread() % kWarpgroupThreads / kWarpThreads; }
    static MLA_DEVICE u32 first_column() { return (thread() / kWarpgroupThreads - 1) * kValueColumns; }
    static MLA_DEVICE u32 thread() {
        u32 thread = threadIdx.x;
        if (kGathered || kLseCopies > 1) pin_register(thread);
        return thread;
    }

    // Multiplies this thread's two rows, lane / 4 of its warp's 16 and the one 8 further.
    static MLA_DEVICE void scale(float upper, float lower, float (&output)[kAccumulators]) {
#pragma unroll
        for (u32 i = 0; i < kAccumulators; i += 4) {
            output[i] *= upper;
            output[i + 1] *= upper;
            output[i + 2] *= lower;
            output[i + 3] *= lower;
        }
    }

    // Of a refined block (decode/work_item.h): the row eight further is a thread's other row.
    static MLA_DEVICE void add_refinement(float (&output)[kAccumulators]) {
#pragma unroll
        for (u32 i = 0; i < kAccumulators; i += 4) {
            output[i] += output[i + 2];
            output[i + 1] += output[i + 3];
        }
    }

    // Before a row's results besides O are stored.
    static MLA_DEVICE void wait_for_room() {}

    static MLA_DEVICE void store(const Params& params, i32 item, float (&output)[kAccumulators]) {
        constexpr bool kHasExponents = kPartialIsScaled && !kPowerIsInLse;
        if (kHasExponents) pin_register(item);  // looked up after the last tile: there are no registers to keep it in
        // Packing first frees the registers that the addresses below need.
        u32 packed[kAccumulators / 2];
        if (kHasExponents && load_block_work(params, item).is_partial()) {
            const u32 exponent = fit_half(output);
            pack<Fp16>(output, packed);
            const BlockWork work = load_block_work(params, item);
            const i32 row = row_at(work, warp() * 16 + lane());
            if (lane() < 16 && row_exists(work, row))
                partial_exponents(params, work, row)[first_column() / kValueColumns] = exponent;
        } else {
            pack<Output>(output, packed);
        }
        const BlockWork work = load_block_work(params, item);
        const u32 lane_in_quad = lane() % 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            i32 row = warp() * 16 + lane() / 4 + half * 8;
            if constexpr (kRefines) row = row_at(work, row);  // without the if, other kernels get other registers
            const bool exists = row_exists(work, row);
            u16* destination = output_row(params, work, row) + first_column() + lane_in_quad * 8;
#pragma unroll
            for (u32 block = 0; block < kValueColumns / 32; ++block) {
                u32 words[4];
#pragma unroll
                for (u32 j = 0; j < 4; ++j) words[j] = packed[(block * 4 + j) * 2 + half];
                quad_transpose(words, lane_in_quad);
                const uint4 chunk{words[0], words[1], words[2], words[3]};
                if (exists && kStreams) store_streaming_16b(destination + block * 32, chunk);
                if (exists && !kStreams) *reinterpret_cast<uint4*>(destination + block * 32) = chunk;
            }
        }
    }

private:
    // Divides by a power of two, if need be, so that fp16 holds the values; its exponent.
    static MLA_DEVICE u32 fit_half(float (&output)[kAccumulators]) {
        f32 sums[2] = {};  // of this thread's rows
#pragma unroll
        for (u32 i = 0; i < kAccumulators; ++i) sums[i / 2 % 2] += fabsf(output[i]);
        const u32 exponent = choose_exponent(fmaxf(bound_of(sums[0]), bound_of(sums[1])));
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
};

}  // namespace mla
