// What kernels that move tokens to or from a paged cache share: the columns they move, and where each token lies.
#pragma once
#include "core/types.h"

namespace mla {

constexpr i32 kNoPage = -1;
constexpr i64 kMostU32 = 0xFFFFFFFF;

// Columns that lie together on both sides: the latent part, the rope part, or the whole packed row. Strides in bytes.
struct AppendSegment {
    u8* cache;       // [num_pages, page_size, num_heads_kv, bytes]
    u8* rows;        // [num_tokens, num_heads_kv, bytes]
    i64 cache_page_stride;
    i64 cache_token_stride;
    i64 cache_head_stride;
    i64 rows_token_stride;
    i64 rows_head_stride;
    i32 chunks;      // 16-byte chunks of one head's row in `rows`; 0: the segment is not used
    i32 reserved;
};

struct AppendPlaces {
    const i64* slot_mapping;  // [num_tokens] page * page_size + offset; null: found from the four fields below
    const i32* block_table;   // [num_requests, max_pages_per_seq]; null: pages 0, 1, 2, ... of one request
    const i32* positions;     // [num_tokens] place of the token in its request; null: the token's number
    const i32* requests;      // [num_tokens] row of block_table; null: token / tokens_per_request
    i64 block_table_stride;   // in int32 values
    i32 num_tokens;
    i32 num_heads_kv;
    i32 page_size;
    i32 num_pages;
    i32 num_requests;
    i32 max_pages_per_seq;
    i32 tokens_per_request;
    i32 tokens_per_warp;      // of kernels that have WarpTokens
};

// cupy_mla/kernels/structs.py mirrors them; a test compares the sizes.
static_assert(sizeof(AppendSegment) == 64, "AppendSegment is packed by the host");
static_assert(sizeof(AppendPlaces) == 72, "AppendPlaces is packed by the host");

// Where a token lies in the cache.
struct CachePlace {
    i32 page;  // kNoPage: nowhere, and that token is left out
    i32 offset;
};

// A slot outside the cache, whatever led to it, is nowhere.
MLA_DEVICE CachePlace find_place(const AppendPlaces& places, i32 token) {
    constexpr CachePlace kNowhere{kNoPage, 0};
    if (places.slot_mapping != nullptr) {
        const i64 slot = places.slot_mapping[token];
        const i64 num_slots = static_cast<i64>(places.num_pages) * places.page_size;
        if (slot < 0 || slot >= num_slots) return kNowhere;
        // A division of 32 bits takes a fifth of the instructions.
        const i32 page = num_slots <= kMostU32 ? static_cast<i32>(static_cast<u32>(slot) / static_cast<u32>(places.page_size))
                                               : static_cast<i32>(slot / places.page_size);
        return {page, static_cast<i32>(slot - static_cast<i64>(page) * places.page_size)};
    }
    const i32 request = places.requests != nullptr ? places.requests[token] : token / places.tokens_per_request;
    if (request < 0 || request >= places.num_requests) return kNowhere;
    const i32 position = places.positions != nullptr ? places.positions[token] : token;
    if (position < 0) return kNowhere;
    const i32 page_index = position / places.page_size;
    if (page_index >= places.max_pages_per_seq) return kNowhere;
    const i64 entry = request * places.block_table_stride + page_index;
    const i32 page = places.block_table != nullptr ? places.block_table[entry] : page_index;
    if (page < 0 || page >= places.num_pages) return kNowhere;
    return {page, position - page_index * places.page_size};
}

// The tokens of a warp, one behind the other, at most a lane for each. Each lane looks up where one of them goes, all at once.
class WarpTokens {
public:
    MLA_DEVICE explicit WarpTokens(const AppendPlaces& places) {
        const i64 warp = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
        const i64 first = warp * places.tokens_per_warp;
        first_ = static_cast<i32>(first);
        count_ = static_cast<i32>(min(static_cast<i64>(places.tokens_per_warp), places.num_tokens - first));
    }

    // 0 or less: this warp has none.
    MLA_DEVICE i32 count() const { return count_; }
    MLA_DEVICE i32 token(i32 index) const { return first_ + index; }

    MLA_DEVICE void find(const AppendPlaces& places) {
        const i32 lane = static_cast<i32>(threadIdx.x);
        own_ = find_place(places, first_ + min(lane, count_ - 1));
    }
    MLA_DEVICE CachePlace place(i32 index) const {
        return {__shfl_sync(kAllLanes, own_.page, index), __shfl_sync(kAllLanes, own_.offset, index)};
    }

private:
    static constexpr u32 kAllLanes = 0xFFFFFFFFu;

    i32 first_, count_;
    CachePlace own_;
};

// A head's row of a token, on both sides.
MLA_DEVICE u8* cache_row(const AppendSegment& segment, CachePlace place, i32 head) {
    return segment.cache + place.page * segment.cache_page_stride + place.offset * segment.cache_token_stride +
           head * segment.cache_head_stride;
}

MLA_DEVICE u8* token_row(const AppendSegment& segment, i32 token, i32 head) {
    return segment.rows + token * segment.rows_token_stride + head * segment.rows_head_stride;
}

}  // namespace mla
