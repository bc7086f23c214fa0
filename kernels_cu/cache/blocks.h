// What kernels share that round tokens to a cache of fewer bits or read them from it: how its values and scales are stored.
#pragma once
#include "cache/places.h"

namespace mla {

using Row = MLA_DTYPE;

constexpr i32 kChunkValues = kChunkBytes / 2;
constexpr i32 kMantissaBits = 23;  // of a float32

enum Codes : i32 { kCodesE4m3, kCodesE2m1 };
enum Scales : i32 { kScalesGiven, kScalesFloat32, kScalesE8m0, kScalesE4m3 };

// Of the layout: what values become, and of which format their scales are; of those that are not given, how many values share
// one. Then the second segment, if there is one, is bfloat16 in the cache, without a scale.
constexpr Codes kCodes = MLA_CODES;
constexpr Scales kScales = MLA_SCALES;
constexpr i32 kBlock = MLA_BLOCK;
constexpr bool kSecondIsPlain = kScales != kScalesGiven;
constexpr i32 kRowScaleBytes = MLA_ROW_SCALE_BYTES;  // between a token's codes and its bfloat16 values

// Bytes of a chunk's codes.
constexpr i32 kCodeBytes = kCodes == kCodesE2m1 ? kChunkValues / 2 : kChunkValues;

struct BlocksParams {
    AppendSegment segments[2];
    AppendPlaces places;
    i64 rows_page_steps[2];   // of each segment's rows: bytes that lie between the last token of a page and the next page's
                              // first, beside one token's; 0 where rows have no pages
    u8* scales;               // of the first token of the cache
    i64 scales_page_stride;   // in bytes
    i64 scales_token_stride;
    const f32* kv_scales[2];  // kScalesGiven: that of all values of a segment; null: it is in kv_scale_values
    f32 kv_scale_values[2];
};

// cupy_mla/kernels/structs.py mirrors it; a test compares the sizes.
static_assert(sizeof(BlocksParams) == 248, "BlocksParams is packed by the host");

// A head's rows of a token, in both segments.
struct TokenRows {
    u8* rows[2];

    MLA_DEVICE TokenRows(const BlocksParams& params, i32 token, i32 head) {
#pragma unroll
        for (i32 index = 0; index < 2; ++index) {
            const i64 step = params.rows_page_steps[index];
            rows[index] = token_row(params.segments[index], token, head) + (step == 0 ? 0 : token / params.places.page_size * step);
        }
    }
};

MLA_DEVICE u8* token_scales(const BlocksParams& params, CachePlace place) {
    return params.scales + place.page * params.scales_page_stride + place.offset * params.scales_token_stride;
}

MLA_DEVICE f32 given_scale(const BlocksParams& params, i32 segment) {
    return params.kv_scales[segment] != nullptr ? *params.kv_scales[segment] : params.kv_scale_values[segment];
}

}  // namespace mla
