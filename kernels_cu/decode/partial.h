// The power of two of a warp's partial results: core/partial_format.h.
#pragma once
#include "core/partial_format.h"
#include "decode/rows.h"
#include "ptx/warp.h"

namespace mla {

// A bound on the magnitude of values by the sum of their magnitudes, which takes half the time of a maximum. What is not a
// number asks for nothing: it is stored as it is.
MLA_DEVICE f32 bound_of(f32 sum) { return sum == sum ? sum : 1.0f; }

// The exponent of what the values of a warp, below these bounds, are divided by to be stored as fp16.
MLA_DEVICE u32 choose_exponent(f32 bound) {
    // Stored values stay below 2^15. With a sum of 2^-7, of at most 64 values, all errors of fp16's smallest ones together
    // are below the rounding of the others: the usual case, in which nothing is multiplied.
    constexpr u32 kRoom = 14, kLeastOfOne = kExponentOfOne - 7, kMostOfOne = kExponentOfOne + kRoom;
    const u32 exponent = __reduce_max_sync(kFullWarp, __float_as_uint(bound)) >> kExponentShift;
    if (exponent >= kLeastOfOne && exponent <= kMostOfOne) return kExponentOfOne;
    return exponent > kRoom ? exponent - kRoom : 1;
}

// What such values are multiplied by.
MLA_DEVICE f32 inverse_power(u32 exponent) { return power_of_exponent(2 * kExponentOfOne - exponent); }

template <class Params>
MLA_DEVICE u8* partial_exponents(const Params& params, const BlockWork& work, i32 row_in_block) {
    return reinterpret_cast<u8*>(lse_row(params, work, row_in_block) + slot_rows(params));
}

}  // namespace mla
