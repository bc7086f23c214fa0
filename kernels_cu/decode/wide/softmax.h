// The online softmax of the wide kernel, on the accumulators of S = Q K^T: a thread holds 16 columns of two rows, 8 apart.
#pragma once
#include "core/quad.h"
#include "core/softmax.h"
#include "decode/work_item.h"
#include "ptx/warp.h"

namespace mla {

constexpr int kThreadScores = 32;  // of a tile of 64 rows and 64 tokens

// Column i (of the thread's 16) of row `half` among the thread's scores.
constexpr MLA_DEVICE int score_index(int half, int i) { return i / 2 * 4 + half * 2 + i % 2; }

// 1 / sum, rounded as by an exact division, without its branches for what no sum here is: a sum is at least 1, the weight of a row's
// largest score, and at most 2^8 times the row's tokens; or it is not a number, and stays that.
MLA_DEVICE f32 reciprocal_of_sum(f32 sum) {
    const f32 estimate = fast_reciprocal(sum);
    return fmaf(estimate, fmaf(-sum, estimate, 1.0f), estimate);
}

// What O must be multiplied by before this tile's P V is added, and P before it is stored.
struct RowFactors {
    float rescale[2];
    float normalise[2] = {1.0f, 1.0f};
};

// Of a refined block (decode/work_item.h): the row eight further is a thread's other row. That it is one says the maximum of
// that row, which is no number then and otherwise always is one: no register is left to keep it in. The values warps know it
// by the sign of that row's factor.
MLA_DEVICE void mark_refined(float (&maximum)[2]) { maximum[1] = __int_as_float(0x7fc00000); }
MLA_DEVICE bool is_refined(const float (&maximum)[2]) { return kRefines && maximum[1] != maximum[1]; }

// Scores to probabilities, in place, with the running maxima (log2 units, the same in the quad) and sums (of the thread's
// columns) of the thread's two rows: arrays, as a struct of the two gets other registers. The last tile carries the division
// by the sum in P and in the rescale factor, so O comes out normalised; the quad then has the whole sum. `results` sees every
// tile's maxima; `sinks` divides.
//
// Of an item's only tile O is divided by the sum, and not P. Where tokens weigh the same, all P of a row would be rounded alike, by
// up to 2^-8 of the output; undivided they are 1. A first tile's rescale factor is for an O of zeros, so it has room for this one;
// the sign of the first row's tells the values warps to take it when they have the tile's product, too. Refined P need none of it.
template <class Results>
MLA_DEVICE RowFactors softmax(bool is_last, bool divides_output, float scale_log2, float (&scores)[kThreadScores],
                              float (&maximum)[2], float (&sum)[2], Results& results,
                              const typename Results::Sinks& sinks) {
    RowFactors factors;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float tile_maximum = scores[score_index(half, 0)];
#pragma unroll
        for (int i = 1; i < 16; ++i) tile_maximum = fmaxf(tile_maximum, scores[score_index(half, i)]);
        tile_maximum = quad_max(tile_maximum) * scale_log2;
        results.see(half, tile_maximum);
        factors.rescale[half] = 1.0f;
        if (tile_maximum > maximum[half] + kRescaleThreshold) {
            factors.rescale[half] = fast_exp2(maximum[half] - tile_maximum);
            maximum[half] = tile_maximum;
        }
        const float shift = maximum[half] == minus_infinity() ? 0.0f : maximum[half];
        float tile_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float& score = scores[score_index(half, i)];
            score = fast_exp2(fmaf(score, scale_log2, -shift));
            tile_sum += score;
        }
        sum[half] = sum[half] * factors.rescale[half] + tile_sum;
        if (is_last) {
            sum[half] = quad_sum(sum[half]);
            const float inverse = sum[half] == 0.0f ? 0.0f : sinks.normalise(half, sum[half], maximum[half]);  // NaN stays NaN
            factors.normalise[half] = divides_output ? 1.0f : inverse;
            factors.rescale[half] = divides_output ? (half == 0 ? -fabsf(inverse) : inverse) : factors.rescale[half] * inverse;
        }
    }
    return factors;
}

}  // namespace mla
