// Between e4m3 and wider types. PTX ISA, "cvt".
#pragma once
#include "core/types.h"

namespace mla {

// The two e4m3 values in the low (high) half of a word as two fp16 values, which hold every e4m3 value exactly; NaN stays.
MLA_DEVICE u32 e4m3_pair_low(u32 word) {
    u32 pair;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}\n" : "=r"(pair) : "r"(word));
    return pair;
}

MLA_DEVICE u32 e4m3_pair_high(u32 word) {
    u32 pair;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}\n" : "=r"(pair) : "r"(word));
    return pair;
}

// Products of two pairs of fp16 values, rounded to nearest.
MLA_DEVICE u32 multiply_fp16_pairs(u32 a, u32 b) {
    u32 product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// a * b + c for pairs of fp16 values, rounded once.
MLA_DEVICE u32 fma_fp16_pairs(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// One value of a pair of 16 bits, the low one (0) or the high one (1), in both halves.
MLA_DEVICE u32 pair_of_half(u32 pair, u32 half) { return __byte_perm(pair, 0, half == 0 ? 0x1010 : 0x3232); }

// The larger of the unsigned 16-bit numbers in each half.
MLA_DEVICE u32 max_u16_pairs(u32 a, u32 b) {
    u32 larger;
    asm("max.u16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

// Two float32 rounded to e4m3, the first in the low byte. What is too large becomes 448; NaN stays.
MLA_DEVICE u32 pack_e4m3(f32 first, f32 second) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
}

// Four of them in a word, the first in its low byte.
MLA_DEVICE u32 pack_e4m3(f32 first, f32 second, f32 third, f32 fourth) {
    u32 word;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}\n"
        : "=r"(word)
        : "f"(first), "f"(second), "f"(third), "f"(fourth));
    return word;
}

// The same of four fp16 values.
MLA_DEVICE u32 pack_e4m3(u32 first_pair, u32 second_pair) {
    u32 word;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f16x2 low, %1;\ncvt.rn.satfinite.e4m3x2.f16x2 high, %2;\n"
        "mov.b32 %0, {low, high};\n}\n"
        : "=r"(word)
        : "r"(first_pair), "r"(second_pair));
    return word;
}

}  // namespace mla
