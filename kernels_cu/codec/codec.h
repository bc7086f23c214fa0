// How the tokens of an FP8 cache are stored: the codec that this kernel is compiled for. A codec has
//   kCoded, kUncoded  a token's values: so many e4m3 from its first byte on, then so many bf16 from kUncodedOffset on
//   kHasScales        whether tokens have scales; else there is one of the whole cache, a parameter, and theirs are 1
//   kScales           a token's scales, each of kCoded / kScales neighbouring coded values
//   kRowBytes         bytes of a token that lie together, a multiple of 16: what one bulk copy brings
//   kScalesOffset     where in a token's row its scales begin, kScaleBytes of them
//   kPageEndBytes     what more of it lies at the end of its page, behind the rows of all tokens: 0, or 8 with scales in e8m0,
//                     which are then there
//   kNoScales         a word that stands for each of the stored scales of a token that there is not, and needs no care
//   kNeedsUnits       whether fp16 does not hold what some scales make of codes
//   scale             one of a token's scales as a number, where it needs units
//   fp16_scales       scales i and i + n of a token in a pair of fp16, for i below n; whether fp16 operands hold what they make
//                     of codes. A second scale that there is not is anything
//   load_scales       those of its scales that a lane of four needs, given where in shared memory the row lies, or what is of the
//                     page's end if anything is. A lane has 16 neighbouring columns of each box, which share a scale
//   kLaneWords        words that these columns' codes take
//   pairs             four of them (of a k16 step) as two pairs of fp16 values
#pragma once
#include "codec/ds_mla.h"
#include "codec/e4m3.h"
#include "codec/e8m0.h"
#include "codec/fp16_range.h"
#include "codec/model1.h"
#include "codec/v41.h"
#include "decode/config.h"

namespace mla {

using CachedE4m3 = E4m3Rows<kLatent + kRope>;
using Codec = MLA_CODEC;
#ifdef MLA_EXTRA_CODEC
using ExtraCodec = MLA_EXTRA_CODEC;  // of a second cache
#else
using ExtraCodec = Codec;
#endif
constexpr bool kMixesCodecs = !kSameType<Codec, ExtraCodec>;
static_assert(kSameType<Stored, E4m3>, "codecs are of e4m3 caches");
static_assert(Codec::kCoded + Codec::kUncoded == kLatent + kRope, "a codec stores tokens of its own widths");
static_assert(Codec::kCoded % kBoxColumns == 0 && Codec::kUncoded % kBoxColumns == 0, "a box is of one kind of values");
static_assert(Codec::kRowBytes % 16 == 0 && ExtraCodec::kRowBytes % 16 == 0, "bulk copies are of 16 bytes and multiples");
static_assert(!kMixesCodecs || (Codec::kCoded == ExtraCodec::kCoded && Codec::kHasScales && ExtraCodec::kHasScales &&
                                Codec::kPageEndBytes == 0 && ExtraCodec::kPageEndBytes == 0),
              "tiles of two codecs are multiplied alike");

constexpr u32 kCodedBoxes = Codec::kCoded / kBoxColumns;
// Of a lane: scales of a token, each of so many neighbouring boxes.
template <class C>
constexpr u32 kLaneScales = C::kScales < kCodedBoxes ? C::kScales : kCodedBoxes;
template <class C>
constexpr u32 kScaleBoxes = kCodedBoxes / kLaneScales<C>;
constexpr bool kUncodedIsValue = kCodedBoxes < kLatentBoxes;  // whether the uncoded values are of V, too
}  // namespace mla
