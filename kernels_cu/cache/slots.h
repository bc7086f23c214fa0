// Token numbers of requests to slots of a paged cache.
#pragma once
#include "core/types.h"

namespace mla {

constexpr i32 kNoToken = -1;
constexpr i64 kMaxSlot = 0x7FFFFFFF;  // that an index can hold

// cupy_mla/kernels/structs.py mirrors it; a test compares the two.
struct SlotsParams {
    const i32* tokens;        // [num_rows, row_tokens], each counted from its request's first token
    const i32* block_table;   // [num_requests, max_pages_per_seq]
    const i32* requests;      // [num_rows] row of block_table; null: as many in turn
    i32* slots;               // [num_rows, row_tokens]
    i64 block_table_stride;
    i64 row_tokens;
    i32 blocks_per_row;
    i32 page_size;
    i32 num_requests;
    i32 max_pages_per_seq;
};

static_assert(sizeof(SlotsParams) == 6 * sizeof(i64) + 4 * sizeof(i32), "no padding");

// kNoToken for a token, a page or a slot that there is not; whether the cache has the page is for the reader of the slot.
MLA_DEVICE i32 slot_of(const SlotsParams& params, i32 request, i32 token) {
    if (token < 0 || request < 0 || request >= params.num_requests) return kNoToken;
    const i32 page_index = token / params.page_size;
    if (page_index >= params.max_pages_per_seq) return kNoToken;
    const i64 page = params.block_table[request * params.block_table_stride + page_index];
    const i64 slot = page * params.page_size + (token - page_index * params.page_size);
    return page < 0 || slot > kMaxSlot ? kNoToken : static_cast<i32>(slot);
}

}  // namespace mla
