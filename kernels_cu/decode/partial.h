// The power of two of a warp's partial results: core/partial_format.h.
#pragma once
#include "core/partial_format.h"
#include "decode/rows.h"
#include "ptx/warp.h"

namespace mla {

// A bound on the magnitude of values: the largest of a few sums of magnitudes, which take half the time of a maximum.
struct MagnitudeBound {
    static constexpr u32 kSums = 2;  // independent of each other
    f32 sums[kSums] = {};

    MLA_DEVICE void add(u32 index, f32 value) { sums[index % kSums] += fabsf(value); }

    // Of this thread. What is not a number counts as nothing: it is stored as it is.
    MLA_DEVICE f32 get() const {
        const f32 bound = fmaxf(sums[0], sums[1]);
        return bound == bound ? bound : 0.0f;
    }
};

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
    return reinterpret_cast<u8*>(lse_row(params, work, row_in_block) + 1);
}

}  // namespace mla
