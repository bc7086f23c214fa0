// Stands in for kernels_cu/ptx/convert.h on the CPU, for bf16.
#pragma once
#include "core/types.h"

namespace mla {

inline u32 bf16_of(f32 value) {  // to the nearest, ties to even
    const u32 bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

template <typename T>
u32 pack2(f32 first, f32 second) {
    static_assert(std::is_same<T, Bf16>::value, "only bf16 is emulated");
    return bf16_of(first) | bf16_of(second) << 16;
}

template <typename T>
void unpack2(u32 pair, f32& first, f32& second) {
    static_assert(std::is_same<T, Bf16>::value, "only bf16 is emulated");
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xFFFF0000u);
}

}  // namespace mla
