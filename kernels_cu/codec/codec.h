// How the tokens of an FP8 cache are stored: the codec that this kernel is compiled for. A codec has
//   kCoded, kUncoded  a token's values: so many e4m3 from its first byte on, then so many bf16 from kUncodedOffset on
//   kHasScales        whether tokens have scales; else there is one of the whole cache, a parameter, and theirs are 1
//   kScales           a token's scales, each of kCoded / kScales neighbouring coded values
//   kRowBytes         bytes of a token that lie together, a multiple of 16: what one bulk copy brings
//   load_scales       the scales, given where in shared memory such a row lies
#pragma once
#include "codec/ds_mla.h"
#include "codec/e4m3.h"
#include "decode/config.h"

namespace mla {

using CachedE4m3 = E4m3Rows<kLatent + kRope>;
using Codec = MLA_CODEC;
static_assert(kSameType<Stored, E4m3>, "codecs are of e4m3 caches");
static_assert(Codec::kCoded + Codec::kUncoded == kLatent + kRope, "a codec stores tokens of its own widths");
static_assert(Codec::kCoded % kBoxColumns == 0 && Codec::kUncoded % kBoxColumns == 0, "a box is of one kind of values");
static_assert(Codec::kRowBytes % 16 == 0, "bulk copies are of 16 bytes and multiples");

constexpr u32 kCodedBoxes = Codec::kCoded / kBoxColumns;
constexpr u32 kScaleBoxes = kCodedBoxes / Codec::kScales;  // neighbouring boxes that share a scale
constexpr u32 kBoxCodes = kBoxColumns;                     // bytes of a box's columns in a row

// What fp16 operands hold of a block with such a scale: no value is too large, and none so small that bits are lost which
// bf16 would keep of the block's largest. Not NaN.
constexpr f32 kSmallestFp16Scale = 1.0f / 16384, kLargestFp16Scale = 146.0f;
MLA_DEVICE bool fits_fp16(f32 scale) {
    const f32 magnitude = fabsf(scale);
    return (magnitude >= kSmallestFp16Scale && magnitude <= kLargestFp16Scale) || magnitude == 0.0f;
}

}  // namespace mla
