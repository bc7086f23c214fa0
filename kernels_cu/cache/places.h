// What kernels that write new tokens to a paged cache share: the columns they move, and where each token goes.
#pragma once
#include "core/types.h"

namespace mla {

constexpr i64 kNoSlot = -1;

// Columns that lie together on both sides: the latent part, the rope part, or the whole packed row. Strides in bytes.
struct AppendSegment {
    u8* cache;       // [num_pages, page_size, num_heads_kv, bytes]
    const u8* rows;  // [num_tokens, num_heads_kv, bytes]
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
    const i32* block_table;   // [num_requests, max_pages_per_seq]
    const i32* positions;     // [num_tokens] place of the token in its request
    const i32* requests;      // [num_tokens] row of block_table; null: token / tokens_per_request
    i64 block_table_stride;   // in int32 values
    i32 num_tokens;
    i32 num_heads_kv;
    i32 page_size;
    i32 num_pages;
    i32 num_requests;
    i32 max_pages_per_seq;
    i32 tokens_per_request;
    i32 reserved;
};

// cupy_mla/kernels/structs.py mirrors them; a test compares the sizes.
static_assert(sizeof(AppendSegment) == 64, "AppendSegment is packed by the host");
static_assert(sizeof(AppendPlaces) == 72, "AppendPlaces is packed by the host");

// A slot outside the cache, whatever led to it, is kNoSlot: that token is not stored.
MLA_DEVICE i64 find_slot(const AppendPlaces& places, i32 token) {
    if (places.slot_mapping != nullptr) {
        const i64 slot = places.slot_mapping[token];
        const i64 num_slots = static_cast<i64>(places.num_pages) * places.page_size;
        return slot >= 0 && slot < num_slots ? slot : kNoSlot;
    }
    const i32 request = places.requests != nullptr ? places.requests[token] : token / places.tokens_per_request;
    if (request < 0 || request >= places.num_requests) return kNoSlot;
    const i32 position = places.positions[token];
    if (position < 0) return kNoSlot;
    const i32 page_index = position / places.page_size;
    if (page_index >= places.max_pages_per_seq) return kNoSlot;
    const i32 page = places.block_table[request * places.block_table_stride + page_index];
    if (page < 0 || page >= places.num_pages) return kNoSlot;
    return static_cast<i64>(page) * places.page_size + position % places.page_size;
}

}  // namespace mla
