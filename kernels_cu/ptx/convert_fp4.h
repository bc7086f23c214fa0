// From e2m1 to fp16, which Hopper has no instruction for.
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

}  // namespace mla
