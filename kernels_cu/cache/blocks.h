// What kernels share that round tokens to a cache of fewer bits or read them from it: how its values and scales are stored.
#pragma once
#include "cache/places.h"

namespace mla {

using Row = MLA_DTYPE;

constexpr i32 kLanes = 32;
constexpr u32 kFullWarp = 0xFFFFFFFFu;
constexpr i32 kChunkValues = 8;  // of a lane at a time
constexpr i32 kChunksInFlight = 3;  // of a lane: a token of 576 values is in flight at once
constexpr i64 kChunkBytes = kChunkValues * Row::kBytes;
constexpr i32 kMantissaBits = 23;  // of a float32

enum Codes : i32 { kCodesE4m3, kCodesE2m1 };
enum Scales : i32 { kScalesFloat32, kScalesE8m0, kScalesE4m3 };

struct BlocksParams {
    AppendSegment segments[2];
    AppendPlaces places;
    i64 rows_page_steps[2];   // of each segment's rows: bytes that lie between the last token of a page and the next page's
                              // first, beside one token's; 0 where rows have no pages
    u8* scales;               // of the first token of the cache; null: one scale for all
    i64 scales_page_stride;   // in bytes
    i64 scales_token_stride;
    const f32* kv_scale;      // one scale for all; null: it is kv_scale_value
    f32 kv_scale_value;
    i32 block_shift;          // 2^block_shift lanes share a scale
    i32 second_is_plain;      // whether the second segment is bfloat16 in the cache, without a scale
    i32 codes;
    i32 scale_format;
    i32 reserved;
};

// cupy_mla/kernels/structs.py mirrors it; a test compares the sizes.
static_assert(sizeof(BlocksParams) == 272, "BlocksParams is packed by the host");

// The two segments of a token and head, one behind the other: where each chunk lies on both sides.
struct TokenChunks {
    u8* rows[2];
    i32 first_chunks;  // of the first segment
    i32 chunks;

    MLA_DEVICE TokenChunks(const BlocksParams& params, i32 token, i32 head)
        : first_chunks(params.segments[0].chunks), chunks(first_chunks + params.segments[1].chunks) {
#pragma unroll
        for (i32 index = 0; index < 2; ++index) {
            const i64 step = params.rows_page_steps[index];
            rows[index] = token_row(params.segments[index], token, head) + (step == 0 ? 0 : token / params.places.page_size * step);
        }
    }

    MLA_DEVICE bool in_second(i32 chunk) const { return chunk >= first_chunks; }
    MLA_DEVICE i32 in_segment(i32 chunk) const { return chunk - (in_second(chunk) ? first_chunks : 0); }
    MLA_DEVICE uint4* row(i32 chunk) const {
        return reinterpret_cast<uint4*>(in_second(chunk) ? rows[1] : rows[0]) + in_segment(chunk);
    }
};

MLA_DEVICE u8* token_scales(const BlocksParams& params, CachePlace place) {
    return params.scales + place.page * params.scales_page_stride + place.offset * params.scales_token_stride;
}

MLA_DEVICE f32 whole_scale(const BlocksParams& params) {
    return params.kv_scale != nullptr ? *params.kv_scale : params.kv_scale_value;
}

}  // namespace mla
