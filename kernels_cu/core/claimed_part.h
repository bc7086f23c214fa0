// The arithmetic of decode/claim.h.
#pragma once
#include "core/types.h"

namespace mla {

// The part of a CTA, given how many of its half and of the other have claimed before it; `half_parts` and `other_parts`
// are for the CTAs of these halves, `spare` CTAs are left over and get a number past the last part. CTAs may come from the
// halves in any numbers: whoever is one too many for its half and for those left over takes a part for which the other half
// will not have a CTA. Parts of the first half are counted up from the first part, those of the second down from the last.
constexpr MLA_DEVICE i32 claimed_part(bool second, i32 half_parts, i32 other_parts, i32 spare, i32 half_before,
                                      i32 other_before) {
    i32 place = half_before;  // in the order of a CTA's own half, which goes on into the parts of the other
    if (half_before >= half_parts) {
        place += max_i32(other_before - other_parts, 0) - spare;
        if (place < half_parts) return half_parts + other_parts;
    }
    return second ? half_parts + other_parts - 1 - place : place;
}

}  // namespace mla
