// Between e2m1 and wider types, which Hopper has no instruction for.
#pragma once
#include "core/types.h"

namespace mla {

// The four e2m1 values in the low half of a word, the first in its lowest bits, as two pairs of fp16 values. Of a magnitude the
// upper byte of its fp16 is all there is: 0, 0.5, 1, 1.5, 2, 3, 4, 6, chosen by the lower three bits.
MLA_DEVICE void e2m1_quad(u32 word, u32 (&pairs)[2]) {
    constexpr u32 kSmall = 0x3E3C3800, kLarge = 0x46444240;
    constexpr u32 kSigns = 0x80808080;
    const u32 magnitudes = __byte_perm(kSmall, kLarge, word & 0x7777);
    const u32 with_signs = __byte_perm(word << 4, word, 0x5140);  // each value's bits are the upper ones of a byte
    const u32 upper = magnitudes | (with_signs & kSigns);
    pairs[0] = __byte_perm(upper, 0, 0x1404);
    pairs[1] = __byte_perm(upper, 0, 0x3424);
}

// A float32 rounded to e2m1, ties to the even code; what is too large becomes 6, NaN anything. To add a power of two whose last
// bit is worth half of the value's own rounds it to multiples of that half: 2 or 3, below 1 also 0 and 1, or 4, the next 2.
MLA_DEVICE u32 to_e2m1(f32 value) {
    constexpr f32 kLargest = 6.0f;
    constexpr u32 kOne = 0x3F800000, kExponent = 0x7F800000, kRounding = 22u << 23;
    const f32 size = fminf(fabsf(value), kLargest);
    const u32 power = max(__float_as_uint(size) & kExponent, kOne);
    const u32 multiple = __float_as_uint(size + __uint_as_float(power + kRounding)) - (power + kRounding);
    const u32 code = multiple + ((power - kOne) >> 22);
    return code | (__float_as_uint(value) >> 28 & 8);
}

}  // namespace mla
