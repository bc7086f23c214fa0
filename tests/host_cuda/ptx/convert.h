// Stands in for kernels_cu/ptx/convert.h on the CPU.
#pragma once
#include "core/types.h"

namespace mla {

inline u32 bf16_of(f32 value) {  // to the nearest, ties to even
    const u32 bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

inline u32 fp16_of(f32 value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    unsigned short bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    return bits;
}

inline f32 value_of_fp16(u32 word) {
    const unsigned short bits = static_cast<unsigned short>(word);
    _Float16 value;
    std::memcpy(&value, &bits, sizeof(value));
    return static_cast<f32>(value);
}

template <typename T>
u32 pack2(f32 first, f32 second) {
    if (std::is_same<T, Fp16>::value) return fp16_of(first) | fp16_of(second) << 16;
    return bf16_of(first) | bf16_of(second) << 16;
}

template <typename T>
void unpack2(u32 pair, f32& first, f32& second) {
    if (std::is_same<T, Fp16>::value) {
        first = value_of_fp16(pair);
        second = value_of_fp16(pair >> 16);
    } else {
        first = __uint_as_float(pair << 16);
        second = __uint_as_float(pair & 0xFFFF0000u);
    }
}

}  // namespace mla
