// How the partial results of a piece lie between the decode kernel and the merge: a row of D_v values, and a row's lse.
//
// Where the output is bf16, 16-bit partial results are fp16 with a power of two: eleven significant bits instead of eight,
// and no value that bf16 holds overflows. One power of two serves all values of a piece that a warp holds; so a row has
// one for each part of its columns. They lie behind the row's lse, as the exponents of float32, in one word.
#pragma once
#include "core/types.h"

namespace mla {

// Column c belongs to part c / kScaleColumns % kScaleParts. No parts: the values are as they are.
constexpr u32 kScaleParts = MLA_SCALE_PARTS;
constexpr u32 kScaleColumns = MLA_SCALE_COLUMNS;
constexpr bool kPartialIsScaled = kScaleParts > 0;
constexpr u32 kLseWords = kPartialIsScaled ? 2 : 1;  // from a row's lse to the next row's
static_assert(kScaleParts <= 4, "a word holds so many exponents");

constexpr u32 kExponentShift = 23;  // of float32
constexpr u32 kExponentOfOne = 127;
constexpr u32 kExponentBits = 8, kExponentMask = 0xFF;

MLA_DEVICE f32 power_of_exponent(u32 exponent) { return __uint_as_float(exponent << kExponentShift); }

}  // namespace mla
