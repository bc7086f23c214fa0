// Scales in e8m0: an exponent, with neither sign nor zero.
#pragma once
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

}  // namespace mla
