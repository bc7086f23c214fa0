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
enum Scales : i32 { kScalesGiven, kScalesFloat32, kScalesE8m0, kScalesE4m3 };

// Of the layout: what values become, and of which format their scales are; of those that are not given, how many lanes share
// one. Then the second segment, if there is one, is bfloat16 in the cache, without a scale.
constexpr Codes kCodes = MLA_CODES;
constexpr Scales kScales = MLA_SCALES;
constexpr i32 kBlockLanes = MLA_BLOCK_LANES;
static_assert(kBlockLanes > 0 && (kBlockLanes & (kBlockLanes - 1)) == 0 && kBlockLanes <= kLanes, "blocks lie within a warp");

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
static_assert(sizeof(BlocksParams) == 264, "BlocksParams is packed by the host");

// Chunks of a warp in flight: of one head of one of its tokens, from `first` on.
struct Round {
    i32 index = 0, head = 0, first = 0;  // which of the warp's tokens

    MLA_DEVICE void advance(i32 chunks, i32 heads) {
        first += kLanes * kChunksInFlight;
        if (first < chunks) return;
        first = 0;
        if (++head < heads) return;
        head = 0;
        ++index;
    }
};

// The two segments of a token, one behind the other: which chunk of which of them a chunk is.
struct ChunkPlace {
    bool second;
    i32 in_segment;

    MLA_DEVICE ChunkPlace(const BlocksParams& params, i32 chunk)
        : second(chunk >= params.segments[0].chunks), in_segment(chunk - (second ? params.segments[0].chunks : 0)) {}
};

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

    MLA_DEVICE uint4* chunk(ChunkPlace place) const {
        return reinterpret_cast<uint4*>(place.second ? rows[1] : rows[0]) + place.in_segment;
    }
};

MLA_DEVICE i32 chunks_of(const BlocksParams& params) { return params.segments[0].chunks + params.segments[1].chunks; }

MLA_DEVICE u8* token_scales(const BlocksParams& params, CachePlace place) {
    return params.scales + place.page * params.scales_page_stride + place.offset * params.scales_token_stride;
}

MLA_DEVICE f32 given_scale(const BlocksParams& params, i32 segment) {
    return params.kv_scales[segment] != nullptr ? *params.kv_scales[segment] : params.kv_scale_values[segment];
}

}  // namespace mla
