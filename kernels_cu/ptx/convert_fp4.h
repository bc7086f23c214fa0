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

// Two fp16 values rounded to e2m1, ties to the even code, in bits 0 to 3 and 16 to 19; what is too large becomes 6, NaN
// anything. To add a power of two whose last bit is worth half of the value's own rounds it to multiples of that half: 2 or 3,
// below 1 also 0 and 1, or 4, the next 2.
MLA_DEVICE u32 to_e2m1_pair(u32 pair) {
    constexpr u32 kBoth = 0x00010001, kLargest = 0x4600 * kBoth, kOne = 0x3C00 * kBoth, kExponent = 0x7C00 * kBoth;
    constexpr u32 kRounding = (9 << 10) * kBoth;
    u32 size, power, sum;
    asm("min.u16x2 %0, %1, %2;" : "=r"(size) : "r"(pair & 0x7FFF * kBoth), "r"(kLargest));
    asm("max.u16x2 %0, %1, %2;" : "=r"(power) : "r"(size & kExponent), "r"(kOne));
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(size), "r"(power + kRounding));
    const u32 code = sum - power + (power >> 9) - (kRounding + (kOne >> 9));
    return code | (pair >> 12 & 8 * kBoth);
}

// Eight quotients rounded to e2m1, the first in the lowest bits. Their last bits may be wrong: of values of at most 11 bits and
// divisors in e4m3, a quotient that is no tie of two codes is further from one than the rounding to fp16 moves it, and that
// rounding makes a tie of what is nearly one. (Tried for all of fp16 and bf16 and all divisors.)
MLA_DEVICE u32 pack_e2m1(const f32 (&quotients)[8]) {
    u32 word = 0;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u32 pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(quotients[i + 4]), "f"(quotients[i]));
        word += to_e2m1_pair(pair) << 4 * i;
    }
    return word;
}

}  // namespace mla
