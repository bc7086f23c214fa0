// Powers of two by which a row of Q, or of O, is divided, so that narrower types hold what it is or is made of.
#pragma once
#include "core/types.h"

namespace mla {

constexpr f32 kFp16Headroom = 64.0f;  // a row's largest value is at most 448 in e4m3, and 28,672 in fp16

// 2^e with largest / 2^e in (224, 448], the upper half of what e4m3 holds; 1 for a row of zeros. A row with infinities has
// no scores: NaN shows that.
MLA_DEVICE f32 power_for_row(f32 largest) {
    constexpr u32 kMantissa = 0x007FFFFF, kExponent = 0x7F800000, kNan = 0x7FC00000, kMantissaBits = 23;
    constexpr u32 kMantissaOf448 = 0x00600000, kExponentOf448 = 8;
    if (largest == 0.0f) return 1.0f;
    const u32 bits = __float_as_uint(largest);
    if (bits >= kExponent) return __uint_as_float(kNan);
    const u32 exponent = (bits >> kMantissaBits) + ((bits & kMantissa) > kMantissaOf448 ? 1 : 0);
    const u32 of_power = exponent > kExponentOf448 ? exponent - kExponentOf448 : 1;  // at least the smallest normal number
    return __uint_as_float(of_power << kMantissaBits);
}

// 1 / power, of a power of two that power_for_row gives, exactly. Of NaN: any number.
MLA_DEVICE f32 inverse_power(f32 power) {
    constexpr u32 kTwiceBias = 254u << 23;
    return __uint_as_float(kTwiceBias - __float_as_uint(power));
}

// 1 if numbers up to `largest` are what fp16 is good at; else the power of two that is not above it. 1 for 0.
MLA_DEVICE f32 unit_for(f32 largest) {
    constexpr f32 kGood = 1024.0f;
    constexpr u32 kExponent = 0x7F800000;
    if (largest == 0.0f || (largest >= 1.0f / kGood && largest <= kGood)) return 1.0f;
    return __uint_as_float(__float_as_uint(largest) & kExponent);
}

}  // namespace mla
