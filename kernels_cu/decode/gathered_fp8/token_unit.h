// What the e4m3 values of a cache are multiplied by, and how fp16 holds the products.
#pragma once
#include "codec/codec.h"
#include "decode/gathered/params.h"

namespace mla {

// What all coded values are multiplied by besides their own scales: scores and sums are, not they.
MLA_DEVICE f32 cache_scale(const GatherParams& params) {
    if (Codec::kHasScales) return 1.0f;
    return params.kv_scale_at != nullptr ? __ldg(params.kv_scale_at) : params.kv_scale_value;
}

// The unit of a token: 1 where fp16 holds what its scales make of e4m3 values, else a power of two with which it does.
// Returns its inverse. A scale that is NaN stays.
MLA_DEVICE f32 take_unit(const f32 (&scales)[Codec::kScales], f32& unit) {
    constexpr i32 kBias = 127, kMantissaBits = 23;
    constexpr i32 kRoom = 6;  // bits of the largest scale over the unit: 448 * 2^7 is an fp16
    constexpr i32 kLeast = -100, kMost = 113;  // exponents of units: P times them and their ratios are float32
    unit = 1.0f;
    f32 largest = 0.0f;
    bool fit = true;
#pragma unroll
    for (u32 i = 0; i < Codec::kScales; ++i) {
        fit &= fits_fp16(scales[i]);
        largest = fmaxf(largest, fabsf(scales[i]));
    }
    if (fit || largest == 0.0f) return 1.0f;
    const i32 exponent = clamp_i32((__float_as_int(largest) >> kMantissaBits) - kBias - kRoom, kLeast, kMost);
    unit = __int_as_float((kBias + exponent) << kMantissaBits);
    return __int_as_float((kBias - exponent) << kMantissaBits);
}

}  // namespace mla
