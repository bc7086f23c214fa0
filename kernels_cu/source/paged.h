// Paged KV tokens as TMA finds them: a block table names the pages, tensor maps say where a page's tokens lie.
#pragma once
#include "decode/config.h"
#include "decode/params.h"
#include "ptx/tma.h"

namespace mla {

constexpr MLA_DEVICE u32 greatest_common_divisor(u32 a, u32 b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }
// Tokens of a tile that surely lie in one page: what one TMA box takes.
constexpr u32 kChunkTokens = greatest_common_divisor(kPageSize, kTileTokens);
constexpr u32 kChunks = kTileTokens / kChunkTokens;
// Of a chunk, the tokens of one swizzle atom: boxes may lie side by side in it, and then one copy brings all columns.
constexpr u32 kGroupTokens = kChunkTokens < kAtomRows ? kChunkTokens : kAtomRows;

// Where a chunk of one kv head lies in the tensor maps that cupy_mla/kernels/tensor_maps.py makes. Their dimensions,
// innermost first: 64 columns, kGroupTokens tokens, boxes of 64 columns, groups of tokens of a page, pages and kv heads. A
// map has five dimensions at most, so the last one counts both, in the largest step that both strides are multiples of.
struct KvPlace {
    i32 group;         // its first
    i32 latent, rope;  // coordinates in the last dimension

    MLA_DEVICE KvPlace(const DecodeParams& params, i32 token, i32 page, i32 kv_head)
        : group(static_cast<u32>(token) % kPageSize / kGroupTokens),
          latent(page * params.latent_page_step + kv_head * params.latent_head_step),
          rope(page * params.rope_page_step + kv_head * params.rope_head_step) {}
};

MLA_DEVICE void prefetch_maps(const TensorMap* latent, const TensorMap* rope) {
    tma_prefetch_map(latent);
    if (kRopeBoxes > 0) tma_prefetch_map(rope);
}

// A request's row of the block table.
MLA_DEVICE const i32* pages_of(const DecodeParams& params, i32 request) {
    return params.block_table + request * params.block_table_stride;
}

// The page of a chunk of a tile. Entries past a sequence's last page may hold anything and are never read as pages.
MLA_DEVICE i32 page_of_chunk(const i32* pages, i32 tile, u32 chunk, const i32& seqlen_k) {
    const u32 token = tile * kTileTokens + chunk * kChunkTokens;
    return chunk < kChunks && token < static_cast<u32>(seqlen_k) ? __ldg(pages + token / kPageSize) : 0;
}

}  // namespace mla
