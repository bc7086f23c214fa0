// Between float32 and pairs of 16-bit values in one register. The first value of a pair is in the low half: lower address.
#pragma once
#include "core/types.h"

namespace mla {

template <typename T>
MLA_DEVICE u32 pack2(f32 first, f32 second);

template <>
MLA_DEVICE u32 pack2<Bf16>(f32 first, f32 second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

template <>
MLA_DEVICE u32 pack2<Fp16>(f32 first, f32 second) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

template <typename T>
MLA_DEVICE void unpack2(u32 pair, f32& first, f32& second);

// A bf16 is the upper half of the float32 of the same value.
template <>
MLA_DEVICE void unpack2<Bf16>(u32 pair, f32& first, f32& second) {
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xFFFF0000u);
}

template <>
MLA_DEVICE void unpack2<Fp16>(u32 pair, f32& first, f32& second) {
    asm("{\n"
        ".reg .f16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}\n"
        : "=f"(first), "=f"(second)
        : "r"(pair));
}

// What a pair of rounded values lacks of the values, as another pair.
template <typename T>
MLA_DEVICE u32 rest2(u32 pair, f32 first, f32 second) {
    f32 rounded_first, rounded_second;
    unpack2<T>(pair, rounded_first, rounded_second);
    return pack2<T>(first - rounded_first, second - rounded_second);
}

}  // namespace mla
