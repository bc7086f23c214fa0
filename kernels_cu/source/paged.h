// Where KV tokens lie in the tensor maps that cupy_mla/kernels/tensor_maps.py makes. Their dimensions, innermost first: 64 columns,
// kGroupTokens tokens, boxes of 64 columns, groups of tokens of a page, pages and kv heads. A map has five dimensions at
// most, so the last one counts both, in the largest step that both strides are multiples of.
#pragma once
#include "decode/config.h"
#include "decode/params.h"
#include "ptx/tma.h"

namespace mla {

// A chunk of one kv head.
struct KvPlace {
    i32 group;         // its first
    i32 latent, rope;  // coordinates in the last dimension

    MLA_DEVICE KvPlace(const DecodeParams& params, i32 token, i32 page, i32 kv_head)
        : group(static_cast<u32>(token) % kPageSize / kGroupTokens),
          latent(page * params.latent_page_step + kv_head * params.latent_head_step),
          rope(page * params.rope_page_step + kv_head * params.rope_head_step) {}
};

}  // namespace mla
