// Scales in e8m0: an exponent, with neither sign nor zero.
#pragma once
#include "codec/fp16_range.h"
#include "core/types.h"

namespace mla {

constexpr u32 kE8m0Ones = 0x7F7F7F7F;  // four scales of 1

// 2^(code - 127), also where that is no normal number (code 0); NaN for 255.
MLA_DEVICE f32 e8m0_to_float(u32 code) {
    constexpr u32 kMantissaBits = 23, kNan = 255;
    constexpr u32 kHalf = 1u << (kMantissaBits - 1);
    const bool is_special = code - 1 >= kNan - 1;  // 0 or 255: both have this bit of the mantissa
    return __uint_as_float(code << kMantissaBits | (is_special ? kHalf : 0));
}

// Of a token's e8m0 scales, four to a word, those numbered i and i + kCount as a pair of fp16. Whether fp16 operands hold what
// they make of codes: powers of two that fp16 has as normal numbers, up to the largest good one.
template <u32 kCount, u32 kWords>
MLA_DEVICE bool e8m0_fp16_scales(const u32 (&stored)[kWords], u32 (&pairs)[kCount]) {
    constexpr u32 kLeastExponent = 127 - 14, kMostExponent = 127 + 7;
    constexpr u32 kHalves = 0x00010001, kExponentOne = 0x0400;  // of fp16, whose exponent field is then 1: 2^-14
    static_assert(kCount % 4 == 0 && 2 * kCount == kWords * 4, "scale i + kCount has the byte of scale i in another word");
    u32 largest = 0;
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) {
        const u32 codes = __byte_perm(stored[i / 4], stored[(i + kCount) / 4], i % 4 | (i % 4 + 4) << 8) & 0x00FF00FF;
        const u32 above = codes - kLeastExponent * kHalves;  // huge where a code is smaller
        largest = max_u16_pairs(largest, above);
        pairs[i] = above * kExponentOne + kExponentOne * kHalves;
    }
    return both_at_most(largest, kMostExponent - kLeastExponent);
}

}  // namespace mla
