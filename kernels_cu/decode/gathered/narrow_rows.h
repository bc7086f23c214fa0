// What the softmaxes of the narrow kernels of gathered tokens do with rows.
#pragma once
#include "core/row_power.h"
#include "core/softmax.h"
#include "decode/gathered/narrow_work.h"
#include "decode/masks.h"
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

// Powers of two that stay out of V: of a thread's two tokens, whose V is as much smaller than it should be.
struct TokenUnits {
    float of[2];

    MLA_DEVICE bool are_one() const { return of[0] == 1.0f && of[1] == 1.0f; }
};

// kHasUnits: whether V may have units.
template <bool kHasUnits>
struct UnitRows : SoftmaxRows {
    float unit[kThreadRows];  // a power of two by which O of the row is to be multiplied

    explicit MLA_DEVICE UnitRows(const BlockWork& work) : SoftmaxRows(work) {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) unit[i] = 1.0f;
    }

    MLA_DEVICE bool have_units() const {
        bool any = false;
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) any |= unit[i] != 1.0f;
        return kHasUnits && any;
    }
};

// Of a thread's values of P, the largest of each row as it is to be stored.
MLA_DEVICE void weighted_maxima(const float (&probabilities)[kFragment], const TokenUnits& units, float (&most)[kThreadRows]) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i)
        most[i] = fmaxf(probabilities[row_element(i)] * units.of[0], probabilities[row_element(i) + 2] * units.of[1]);
}

// P as it is stored: what V's rows lack is in it, in proportion to the row's largest (`most`, of all threads), which O's unit is
// then. `factor` is that of the maxima, and becomes what O is multiplied by.
template <class Rows>
MLA_DEVICE void weigh_probabilities(bool is_first, const float (&probabilities)[kFragment], const TokenUnits& units,
                                    const float (&most)[kThreadRows], Rows& rows, float (&factor)[kThreadRows],
                                    float (&weighted)[kFragment]) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
        const float unit = unit_for(is_first ? most[i] : fmaxf(most[i], rows.unit[i] * factor[i]));
        factor[i] = factor[i] * rows.unit[i] / unit;  // in this order nothing overflows
        rows.unit[i] = unit;
        weighted[row_element(i)] = probabilities[row_element(i)] * units.of[0] / unit;
        weighted[row_element(i) + 2] = probabilities[row_element(i) + 2] * units.of[1] / unit;
    }
}

// Of a scores warpgroup that makes P.
class RowSoftmax {
public:
    MLA_DEVICE RowSoftmax(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), thread_(thread), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads) {}

    // By request: what is past a row's end, as in decode/narrow/consumer.h. Nothing else is hidden; a page outside of the cache is
    // zeros.
    MLA_DEVICE void hide_unseen(const BlockWork& work, i32 tile, float (&scores)[kFragment]) const {
        const i32 first_key = tile * kTileTokens;
        if (first_key + static_cast<i32>(kTileTokens) <= block_visible_end(params_, work)) return;
        const i32 key = first_key + static_cast<i32>(warp_ * kWarpTokens + lane_ / 4);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            const i32 end = row_visible_end(params_, work, row_of_lane(lane_, i));
            float& upper = scores[row_element(i)];
            float& lower = scores[row_element(i) + 2];
            upper = key < end ? upper : minus_infinity();
            lower = key + 8 < end ? lower : minus_infinity();
        }
    }

protected:
    const GatherParams& params_;
    u32 smem_, thread_, warp_, lane_;
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

// A sink is one more score of a row, of a key without value. A partial result is without: the merge adds it.
MLA_DEVICE bool has_sinks(const GatherParams& params, const BlockWork& work) {
    return params.attn_sink != nullptr && !work.is_partial();
}

MLA_DEVICE float sum_with_sink(const GatherParams& params, const BlockWork& work, i32 row_in_block, float maximum, float sum) {
    const RowPlace row = locate_row(params, work, row_in_block);
    return row.exists ? sum + fast_exp2(__ldg(params.attn_sink + row.head) * kLog2e - maximum) : sum;
}

// What a row's sum is divided by.
MLA_DEVICE float with_sink(const GatherParams& params, const BlockWork& work, i32 row_in_block, float maximum, float sum) {
    return has_sinks(params, work) ? sum_with_sink(params, work, row_in_block, maximum, sum) : sum;
}

// The same of all rows of a thread: one branch, as code that runs once waits for each line of it.
MLA_DEVICE void with_sinks(const GatherParams& params, const BlockWork& work, u32 lane, const RowStatistics& rows,
                           float (&sums)[kThreadRows]) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) sums[i] = rows.sum[i];
    if (!has_sinks(params, work)) return;
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i)
        sums[i] = sum_with_sink(params, work, row_of_lane(lane, i), rows.maximum[i], rows.sum[i]);
}

}  // namespace mla
