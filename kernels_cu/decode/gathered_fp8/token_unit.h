// What the e4m3 values of a cache are multiplied by, and how fp16 holds the products.
#pragma once
#include "codec/codec.h"
#include "core/quad.h"
#include "decode/gathered/params.h"

namespace mla {

// What all coded values are multiplied by besides their own scales: scores and sums are, not they.
MLA_DEVICE f32 cache_scale(const GatherParams& params) {
    if (Codec::kHasScales) return 1.0f;
    return params.kv_scale_at != nullptr ? __ldg(params.kv_scale_at) : params.kv_scale_value;
}

// What decides a token's unit: whether fp16 holds its values as they are, and the largest of its scales, which is not NaN.
struct ScaleRange {
    bool fits;
    f32 largest;
};

MLA_DEVICE void widen(ScaleRange& range, f32 scale) {
    range.fits &= fits_fp16(scale);
    range.largest = fmaxf(range.largest, fabsf(scale));
}

// By the largest of a token's uncoded values, where V has them, too: as if it were the largest code, times a scale.
MLA_DEVICE void widen_by_uncoded(ScaleRange& range, f32 largest) {
    const f32 scale = largest / kLargestCode;
    range.fits &= scale <= kLargestFp16Scale;
    range.largest = fmaxf(range.largest, scale);
}

template <u32 kCount>
MLA_DEVICE ScaleRange range_of(const f32 (&scales)[kCount]) {
    ScaleRange range{true, 0.0f};
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) widen(range, scales[i]);
    return range;
}

// The lanes of a quad, each of which knows a part of the same two tokens, agree; if any token of the warp needs it.
MLA_DEVICE void agree(ScaleRange (&ranges)[2]) {
    if (!__any_sync(kFullWarp, !ranges[0].fits || !ranges[1].fits)) return;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        ScaleRange& range = ranges[half];
#pragma unroll
        for (u32 distance = 1; distance < kQuadLanes; distance *= 2) {
            const i32 other_fits = __shfl_xor_sync(kFullWarp, static_cast<i32>(range.fits), distance);
            range.fits &= other_fits != 0;
            range.largest = fmaxf(range.largest, __shfl_xor_sync(kFullWarp, range.largest, distance));
        }
    }
}

constexpr i32 kFloatBias = 127, kFloatMantissaBits = 23;

// Of a power of two as take_unit takes them.
MLA_DEVICE f32 inverse_of_unit(f32 unit) { return __int_as_float((2 * kFloatBias << kFloatMantissaBits) - __float_as_int(unit)); }

// The unit of a token: 1 where fp16 holds what its scales make of e4m3 values, else a power of two with which it does.
// Returns its inverse. A scale that is NaN stays.
MLA_DEVICE f32 take_unit(const ScaleRange& range, f32& unit) {
    constexpr i32 kRoom = 6;  // bits of the largest scale over the unit: 448 * 2^7 is an fp16
    constexpr i32 kLeast = -100, kMost = 113;  // exponents of units: P times them and their ratios are float32
    unit = 1.0f;
    if (range.fits || range.largest == 0.0f) return 1.0f;
    const i32 exponent = clamp_i32((__float_as_int(range.largest) >> kFloatMantissaBits) - kFloatBias - kRoom, kLeast, kMost);
    unit = __int_as_float((kFloatBias + exponent) << kFloatMantissaBits);
    return inverse_of_unit(unit);
}

}  // namespace mla
