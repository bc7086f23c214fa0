// The power of two of a warp's partial results: core/partial_format.h.
#pragma once
#include "core/partial_format.h"
#include "decode/rows.h"
#include "ptx/warp.h"

namespace mla {

// A bound on the magnitude of values by the sum of their magnitudes, which takes half the time of a maximum. What is not a
// number asks for nothing: it is stored as it is.
MLA_DEVICE f32 bound_of(f32 sum) { return sum == sum ? sum : 0.0f; }

// Of the largest of a warp's bounds.
MLA_DEVICE u32 exponent_of(f32 bound) { return __reduce_max_sync(kFullWarp, __float_as_uint(bound)) >> kExponentShift; }

// divisor_for a warp's values below these bounds.
MLA_DEVICE u32 choose_exponent(f32 bound) { return divisor_for(exponent_of(bound)); }

template <class Params>
MLA_DEVICE u8* partial_exponents(const Params& params, const BlockWork& work, i32 row_in_block) {
    return reinterpret_cast<u8*>(lse_row(params, work, row_in_block) + slot_rows(params));
}

}  // namespace mla
