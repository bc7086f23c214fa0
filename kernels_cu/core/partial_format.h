// How the partial results of a piece lie between the decode kernel and the merge: a row of D_v values, and a row's lse.
//
// Where the output is bf16, 16-bit partial results may be fp16: eleven significant bits instead of eight. Nearly always they
// are the values as they are, or half of them. Where these are too large, or all too small, they are divided by other powers of
// two. The last bits of the row's lse, which no weight notices, tell the merge. There are two forms:
// - One power for all that a CTA has of a piece, 2^(16 * mark - 127): four bits of the lse. The merge reads nothing else and
//   does not branch, so it is what calls of a whole cache have. Where two warpgroups have half of the columns each, a row has an
//   lse for each of them, so that neither need know of the other's power.
// - One for each part of a row's columns, those of a warp, so that no part is less accurate for another's sake. The lse's
//   last bit says whether there are any; they lie behind the lses of the slot, as exponents of float32, a row's in one word.
#pragma once
#include "core/types.h"

namespace mla {

// Column c belongs to part c / kScaleColumns % kScaleParts. No parts: the values are as they are.
constexpr u32 kScaleParts = MLA_SCALE_PARTS;
constexpr u32 kScaleColumns = MLA_SCALE_COLUMNS;
constexpr bool kPartialIsScaled = kScaleParts > 0;
constexpr bool kPowerIsInLse = MLA_POWER_IN_LSE != 0;  // the first form
constexpr u32 kLseCopies = kPowerIsInLse ? kScaleParts : 1;  // of a row of a slot: one with the power of each part
constexpr u32 kRowWords = kPowerIsInLse ? kLseCopies : kScaleParts > 1 ? 2 : 1;  // of a row of a slot: lses; or lse, exponents
static_assert(!kPowerIsInLse || kPartialIsScaled, "of what has a power");
constexpr u32 kMarkBits = kPowerIsInLse ? 4 : 1;    // of an lse
constexpr u32 kMarkMask = (1 << kMarkBits) - 1;
constexpr u32 kUsualMark = kPowerIsInLse ? 8 : 0;   // values are to be multiplied by 2, or by nothing
constexpr u32 kScaledMark = 1;                      // of the second form: there are exponents
static_assert(kScaleParts <= 4, "a word holds so many exponents");

constexpr u32 kExponentShift = 23;  // of float32
constexpr u32 kExponentOfOne = 127, kExponentsOfOne = 0x7F7F7F7F;
constexpr u32 kExponentBits = 8, kExponentMask = 0xFF;

MLA_DEVICE f32 power_of_exponent(u32 exponent) { return __uint_as_float(exponent << kExponentShift); }

// Of the first form. The mark becomes the upper bits of an exponent, the bit ahead of it a sign.
MLA_DEVICE f32 power_in_lse(f32 lse) { return fabsf(__uint_as_float(__float_as_uint(lse) << (kExponentShift + kMarkBits))); }

// What fp16 holds well. Stored values stay below 2^15. With a sum of 2^-7, of at most 64 values, all errors of fp16's smallest
// ones together are below the rounding of the others.
constexpr u32 kRoom = 14;
MLA_DEVICE bool is_too_large(u32 exponent) { return exponent > kExponentOfOne + kRoom; }
MLA_DEVICE bool is_too_small(u32 exponent) { return exponent < kExponentOfOne - 7; }

// The exponent of what values below 2^(exponent - 126) are divided by.
MLA_DEVICE u32 divisor_for(u32 exponent) {
    if (!is_too_large(exponent) && !is_too_small(exponent)) return kExponentOfOne;  // the usual case
    return exponent > kRoom ? exponent - kRoom : 1;
}

// What such values are multiplied by.
MLA_DEVICE f32 inverse_power(u32 exponent) { return power_of_exponent(2 * kExponentOfOne - exponent); }

// Of the form whose power is in the lse: what values are multiplied by whose mark is the usual one; the mark for such products
// below 2^(exponent - 126), so that they stay below 2^15; and what it asks them to be multiplied by then.
// With several lses nobody multiplies by the usual 1, and the merge multiplies its result by what is left.
constexpr f32 kUsualFactor = kLseCopies > 1 ? 1.0f : 0.5f;
constexpr f32 kMergedFactor = 0.5f / kUsualFactor;
MLA_DEVICE u32 mark_for(u32 exponent) {
    const u32 mark = (exponent + 2) >> kMarkBits;
    return mark < 1 ? 1 : mark > kMarkMask ? kMarkMask : mark;
}
MLA_DEVICE f32 factor_of(u32 mark) { return power_of_exponent(kExponentOfOne + ((kUsualMark - mark) << kMarkBits)); }

}  // namespace mla
