// KV tokens that indices name: slot -> address and whether there is a token.
#pragma once
#include "decode/gathered/work.h"

namespace mla {

// Whether a copy brings 256 bytes around it into L2. TRIED_GATHERED.md: up to 2% of a prefill, whose tokens are wanted again
// soon; in a decode it would move bytes that nobody wants.
constexpr bool kWholeLines = !kIsPlanned;

// A query token's row of `indices`; by request, the row of all of its query tokens.
MLA_DEVICE const i32* indices_of(const GatherParams& params, const BlockWork& work) {
    if constexpr (kByRequest) return params.indices + work.request * params.indices_stride_batch;
    return params.indices + work.request * params.indices_stride_batch + work.q_begin * params.indices_stride_seq +
           work.kv_head * params.indices_stride_head;
}

MLA_DEVICE const i32* extra_indices_of(const GatherParams& params, const BlockWork& work) {
    return params.extra_indices + work.request * params.extra_indices_stride_batch +
           work.q_begin * params.extra_indices_stride_seq + work.kv_head * params.extra_indices_stride_head;
}

// Tiles of the first list of a job: those of the second follow.
MLA_DEVICE i32 first_list_tiles(const BlockWork& work) { return ceil_div(work.first_list, kTileTokens); }
MLA_DEVICE bool is_extra_tile(const BlockWork& work, i32 tile) { return kHasExtra && tile >= first_list_tiles(work); }

// By request, with pages of several tokens: the block table has the page of a token, not its slot.
constexpr bool kHasBlockTable = kByRequest && kPageSize > 1;

// Tokens that follow each other in a list, by their indices; with a block table, tokens of a request from one on.
struct TokenRun {
    const i32* indices;
    i32 left;
    bool is_extra;
    i32 first = 0;  // with a block table, whose row `indices` is

    MLA_DEVICE void next_tile() {
        if (kHasBlockTable)
            first += kTileTokens;
        else
            indices += kTileTokens;
        left -= kTileTokens;
    }

    // The slot of one of them. A page outside the cache has none.
    MLA_DEVICE i32 slot(const GatherParams& params, u32 place) const {
        if (!kHasBlockTable) return __ldg(indices + place);
        const u32 token = first + place, in_row = token / kPageSize;
        const u32 page = __ldg(indices + in_row);
        if (page >= params.num_slots / kPageSize) return -1;
        return page * kPageSize + token - in_row * kPageSize;
    }
};

// Those of an item from one of its tiles on, as far as they are in that tile's list.
MLA_DEVICE TokenRun tokens_from(const GatherParams& params, const BlockWork& work, i32 tile) {
    const i32 first = tile * kTileTokens;
    const i32 end = min_i32(work.tile_end * kTileTokens, work.seqlen_k);
    if constexpr (kHasExtra) {
        const i32 begin_of_extra = first_list_tiles(work) * kTileTokens;
        if (first >= begin_of_extra) return {extra_indices_of(params, work) + first - begin_of_extra, end - first, true};
        return {indices_of(params, work) + first, min_i32(end, work.first_list) - first, false};
    }
    if constexpr (kHasBlockTable) return {indices_of(params, work), end - first, false, first};
    return {indices_of(params, work) + first, end - first, false};
}

// The functions below are of a slot of the first cache, or of the extra one.
MLA_DEVICE bool is_token(const GatherParams& params, i32 slot, bool is_extra = false) {
    return static_cast<u32>(slot) < (kHasExtra && is_extra ? params.extra_num_slots : params.num_slots);
}

template <u32 kSlots>
MLA_DEVICE const u8* slot_address(const u8* cache, u32 slot, u32 stride_page, u32 stride_token) {
    const u32 page = slot / kSlots;
    u64 units = static_cast<u64>(page) * stride_page;
    if (kSlots > 1) units += static_cast<u64>(slot - page * kSlots) * stride_token;
    return cache + units * 16;
}

// Of kv head 0. A slot that is no token has an address too, which nobody may read.
MLA_DEVICE const u8* token_address(const GatherParams& params, u32 slot, bool is_extra = false) {
    if (kHasExtra && is_extra)
        return slot_address<kExtraPageSize>(params.extra_kv, slot, params.extra_kv_stride_page, params.extra_kv_stride_token);
    return slot_address<kPageSize>(params.kv, slot, params.kv_stride_page, params.kv_stride_token);
}

// Of a page whose rows of `row_bytes` lie one behind the other: what of the token lies behind them, `bytes` a token.
template <u32 kSlots>
MLA_DEVICE const u8* slot_page_end(const u8* cache, u32 slot, u32 stride_page, u32 row_bytes, u32 bytes) {
    const u32 page = slot / kSlots;
    return cache + static_cast<u64>(page) * stride_page * 16 + kSlots * row_bytes + (slot - page * kSlots) * bytes;
}

MLA_DEVICE const u8* page_end_address(const GatherParams& params, u32 slot, u32 row_bytes, u32 bytes, bool is_extra = false) {
    if (kHasExtra && is_extra)
        return slot_page_end<kExtraPageSize>(params.extra_kv, slot, params.extra_kv_stride_page, row_bytes, bytes);
    return slot_page_end<kPageSize>(params.kv, slot, params.kv_stride_page, row_bytes, bytes);
}

// From a kv head's token to that of the next, in bytes; 0 for one head.
MLA_DEVICE i64 head_stride(const GatherParams& params, bool is_extra = false) {
    return kHasExtra && is_extra ? params.extra_kv_stride_head : params.kv_stride_head;
}

// The rope part, where it may lie anywhere: by request.
MLA_DEVICE const u8* token_rope_address(const GatherParams& params, u32 slot) {
    return params.kv_rope + static_cast<u64>(slot) * params.kv_rope_stride_page * 16;
}

}  // namespace mla
