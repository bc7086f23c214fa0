// How the partial results of a piece lie between the decode kernel and the merge: a row of D_v values, and a row's lse.
//
// Where the output is bf16, 16-bit partial results may be fp16: eleven significant bits instead of eight. Nearly always they
// are the values as they are. Where these are too large, or all too small, they are divided by powers of two: one serves all
// values of a piece that a warp holds, so a row has one for each part of its columns. The row's lse then has its last bit
// set, else clear, which no weight notices; and the powers lie behind the lses of the slot, as the exponents of float32, a
// row's in one word.
#pragma once
#include "core/types.h"

namespace mla {

// Column c belongs to part c / kScaleColumns % kScaleParts. No parts: the values are as they are.
constexpr u32 kScaleParts = MLA_SCALE_PARTS;
constexpr u32 kScaleColumns = MLA_SCALE_COLUMNS;
constexpr bool kPartialIsScaled = kScaleParts > 0;
constexpr u32 kRowWords = kPartialIsScaled ? 2 : 1;  // of a row of a slot: its lse, and its exponents
constexpr u32 kScaledBit = 1;                        // of an lse
static_assert(kScaleParts <= 4, "a word holds so many exponents");

constexpr u32 kExponentShift = 23;  // of float32
constexpr u32 kExponentOfOne = 127, kExponentsOfOne = 0x7F7F7F7F;
constexpr u32 kExponentBits = 8, kExponentMask = 0xFF;

MLA_DEVICE f32 power_of_exponent(u32 exponent) { return __uint_as_float(exponent << kExponentShift); }

}  // namespace mla
