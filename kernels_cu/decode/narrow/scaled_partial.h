// Staging of O where partial results are fp16 (core/partial_format.h): a warp's columns have one power of two.
#pragma once
#include "decode/narrow/store.h"
#include "decode/partial.h"

namespace mla {

static_assert(kScaleParts <= 1 || (kScaleColumns == kWarpTokens && kScaleParts == kWarpgroupWarps),
              "of every box, a warp has the columns that it has the tokens of");

// O^T times a factor of each row, as rows of T in the boxes at `place(box)`, box by box: the products of all boxes, made for both
// types ahead of the choice between them, would take 64 registers more.
template <class T, class Place>
MLA_DEVICE void stage_product(const Place& place, u32 warp, u32 lane, const float (&factor)[kThreadRows],
                              const float (&output)[kLatentBoxes][kFragment]) {
    float own[kThreadRows];
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
        own[i] = factor[i];
        pin_register(own[i]);
    }
#pragma unroll
    for (u32 box = 0; box < kLatentBoxes; ++box) {
        float product[kFragment];
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            product[row_element(i)] = output[box][row_element(i)] * own[i];
            product[row_element(i) + 2] = output[box][row_element(i) + 2] * own[i];
        }
        store_fragment_transposed<T>(place(box), warp, lane, product);
    }
}

MLA_DEVICE void multiply(float (&factor)[kThreadRows], f32 by) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) factor[i] *= by;
}

// A bound on the magnitude of what this thread has of O times a factor of each row.
MLA_DEVICE f32 bound_of_product(const float (&factor)[kThreadRows], const float (&output)[kLatentBoxes][kFragment]) {
    f32 bound = 0.0f;
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
        f32 sum = 0.0f;
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box)
            sum += fabsf(output[box][row_element(i)]) + fabsf(output[box][row_element(i) + 2]);
        bound = fmaxf(bound, bound_of(sum * factor[i]));
    }
    return bound;
}

// O normalised by the inverse sums, as rows in the boxes at `place(box)`. Gives the exponent of what it was divided by.
template <class Place>
MLA_DEVICE u32 stage_normalised(const BlockWork& work, const Place& place, u32 warp, u32 lane, float (&inverse)[kThreadRows],
                                const float (&output)[kLatentBoxes][kFragment]) {
    if (!work.is_partial()) {
        stage_product<Output>(place, warp, lane, inverse, output);
        return kExponentOfOne;
    }
    const u32 exponent = choose_exponent(bound_of_product(inverse, output));
    multiply(inverse, inverse_power(exponent));  // nearly always 1
    stage_product<Fp16>(place, warp, lane, inverse, output);
    return exponent;
}

}  // namespace mla
