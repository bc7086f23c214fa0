// A values warp's share of a partial result as fp16, where each values warpgroup's columns have an lse of their own with the power
// of two in it (core/partial_format.h). A warp decides for its rows and columns by itself: nobody waits for anybody.
#pragma once
#include "decode/wide/output.h"
#include "decode/wide/smem.h"

namespace mla {

static_assert(kLseCopies == 1 || (kLseCopies == kValueWarpgroups && kScaleColumns == kValueColumns),
              "each values warpgroup has one of the parts");
static_assert(kLseCopies == 1 || !kRefines, "rows lie one after the other");
static_assert(kLseCopies == 1 || !kSharded, "partial results of shares have no powers of two in their lses");

// Where no registers are left for O while it is stored, it is looked at before, which takes half a microsecond more.
constexpr bool kLooksFirst = kRope == 0 && !kHasRegisters;

template <class Params, class Out>
class ScaledPartial {
public:
    // Whether fp16 holds it well is looked at when it is on its way already; where it does not, which is rare, it is multiplied by
    // another power of two and stored once more.
    static MLA_DEVICE void store(const Params& params, u32 smem, i32 item, i32 slot, float (&output)[kAccumulators]) {
        u32 mark = kUsualMark;
        if (kLooksFirst) {
            mark = choose_mark(output);
            if (mark != kUsualMark) scale(mark, output);
            store_halves(params, slot, output);
            if (mark == kUsualMark) return;
        } else {
            for (;;) {
                store_halves(params, slot, output);
                if (mark != kUsualMark) break;
                mark = choose_mark(output);
                if (mark == kUsualMark) return;
                scale(mark, output);
            }
        }
        mark_lses(params, smem, item, mark);
    }

private:
    // From the special register at each of its places, or what comes of it is kept over the loop over tiles, for which no registers
    // are left.
    static MLA_DEVICE u32 thread() {
        u32 thread = threadIdx.x;
        pin_register(thread);
        return thread;
    }

    // That of this warp's share.
    static MLA_DEVICE u32 choose_mark(const float (&output)[kAccumulators]) {
        f32 sums[2] = {};  // of this thread's rows
#pragma unroll
        for (u32 i = 0; i < kAccumulators; ++i) sums[i / 2 % 2] += fabsf(output[i]);
        const f32 bound = fmaxf(bound_of(sums[0]), bound_of(sums[1]));
        const u32 largest = __reduce_max_sync(kFullWarp, __float_as_uint(bound));
        const u32 exponent = largest >> kExponentShift;
        if (largest == 0 || !(is_too_large(exponent) || is_too_small(exponent))) return kUsualMark;
        return mark_for(exponent);
    }

    static MLA_DEVICE void scale(u32 mark, float (&output)[kAccumulators]) { Out::scale(factor_of(mark), factor_of(mark), output); }

    // Rows that do not exist have room in the slot, too.
    static MLA_DEVICE void store_halves(const Params& params, i32 slot, const float (&output)[kAccumulators]) {
        const u32 own = thread();
        const u32 lane = own % kWarpThreads, warp = own % kWarpgroupThreads / kWarpThreads;
        const u32 first_column = (own / kWarpgroupThreads - 1) * kValueColumns;
        const u32 lane_in_quad = lane % kQuadLanes;
        BlockWork work;
        work.slot = slot;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const i32 row = warp * 16 + lane / kQuadLanes + half * 8;
            u16* const destination = partial_row<u16>(params, work, row) + first_column + lane_in_quad * 8;
#pragma unroll
            for (u32 block = 0; block < kValueColumns / 32; ++block) {
                u32 words[4];
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    const u32 first = (block * 4 + j) * 4 + half * 2;
                    words[j] = pack2<Fp16>(output[first], output[first + 1]);
                }
                quad_transpose(words, lane_in_quad);
                *reinterpret_cast<uint4*>(destination + block * 32) = uint4{words[0], words[1], words[2], words[3]};
            }
        }
    }

    // In the lses that are there, or soon will be: the scores warp of these rows has nothing to wait for.
    static MLA_DEVICE void mark_lses(const Params& params, u32 smem, i32 item, u32 mark) {
        const u32 own = thread();
        const u32 lane = own % kWarpThreads, warp = own % kWarpgroupThreads / kWarpThreads;
        pin_register(item);
        while (load_shared_acquire(stored_item(smem, warp)) < item) {
        }
        const BlockWork work = load_block_work(params, item);
        const i32 row = warp * 16 + lane;
        if (lane >= 16 || !row_exists(work, row)) return;
        volatile f32* const lse = lse_row(params, work, row) + (own / kWarpgroupThreads - 1) * slot_rows(params);
        *lse = mark_lse(work, *lse, mark);
    }
};

}  // namespace mla
