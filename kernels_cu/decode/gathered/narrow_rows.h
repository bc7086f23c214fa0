// What the softmaxes of the narrow kernels of gathered tokens do with rows.
#pragma once
#include "core/softmax.h"
#include "decode/gathered/narrow_work.h"
#include "decode/narrow/store.h"
#include "decode/rows.h"

namespace mla {

// Four neighbouring lanes hold all rows between them, and all warps hold the same: the first four threads tell the values
// warpgroup. Each arrives for what it has written itself, or racecheck would report it; and so with P does lane 0 of the other
// warps, for what it has read.
constexpr u32 kRowLanes = 4;
constexpr u32 kProbabilityArrivals = kRowLanes + kWarpgroupWarps - 1;

// Named barriers of the scores and the values warpgroup, and of a second scores warpgroup.
constexpr u32 kScoresBarrier = 1;
constexpr u32 kValuesBarrier = 2;
constexpr u32 kSecondScoresBarrier = 3;

// The statistics, and the largest score that this thread has seen of each row: the maximum may lag behind.
struct SoftmaxRows : RowStatistics {
    float largest[kThreadRows];
    bool is_refined;  // decode/work_item.h

    explicit MLA_DEVICE SoftmaxRows(const BlockWork& work) : is_refined(work.is_refined()) {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) largest[i] = minus_infinity();
    }
};

// What is no token: bits of this warp's 16. Its values are zeros already.
MLA_DEVICE void hide_absent_tokens(u32 valid, u32 lane, float (&scores)[kFragment]) {
    const bool has_upper = valid >> (lane / 4) & 1;
    const bool has_lower = valid >> (lane / 4 + 8) & 1;
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
        float& upper = scores[row_element(i)];
        float& lower = scores[row_element(i) + 2];
        upper = has_upper ? upper : minus_infinity();
        lower = has_lower ? lower : minus_infinity();
    }
}

// What a row's sum is divided by: a sink is one more score, of a key without value. A partial result is without: the merge adds
// it.
MLA_DEVICE float with_sink(const GatherParams& params, const BlockWork& work, i32 row_in_block, float maximum, float sum) {
    if (params.attn_sink == nullptr || work.is_partial()) return sum;
    const RowPlace row = locate_row(params, work, row_in_block);
    return row.exists ? sum + fast_exp2(__ldg(params.attn_sink + row.head) * kLog2e - maximum) : sum;
}

}  // namespace mla
