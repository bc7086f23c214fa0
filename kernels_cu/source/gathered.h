// KV tokens that indices name: slot -> address and whether there is a token.
#pragma once
#include "decode/gathered/work.h"

namespace mla {

// Whether a copy brings 256 bytes around it into L2. TRIED.md: up to 2% of a prefill, whose tokens are wanted again soon; in a
// decode it would move bytes that nobody wants.
constexpr bool kWholeLines = !kIsPlanned;

// A query token's row of `indices`; by request, the row of all of its query tokens.
MLA_DEVICE const i32* indices_of(const GatherParams& params, const BlockWork& work) {
    if constexpr (kByRequest) return params.indices + work.request * params.indices_stride_batch;
    return params.indices + work.request * params.indices_stride_batch + work.q_begin * params.indices_stride_seq +
           work.kv_head * params.indices_stride_head;
}

MLA_DEVICE bool is_token(const GatherParams& params, i32 slot) { return static_cast<u32>(slot) < params.num_slots; }

// Of kv head 0. A slot that is no token has an address too, which nobody may read.
MLA_DEVICE const u8* token_address(const GatherParams& params, u32 slot) {
    const u32 page = slot / kPageSize;
    u64 units = static_cast<u64>(page) * params.kv_stride_page;
    if (kPageSize > 1) units += static_cast<u64>(slot - page * kPageSize) * params.kv_stride_token;
    return params.kv + units * 16;
}

// The rope part, where it may lie anywhere: by request.
MLA_DEVICE const u8* token_rope_address(const GatherParams& params, u32 slot) {
    return params.kv_rope + static_cast<u64>(slot) * params.kv_rope_stride_page * 16;
}

}  // namespace mla
