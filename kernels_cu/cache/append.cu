// Writes new KV rows of many requests to their places in the paged cache, one warp per token.
// A token moves as 16-byte chunks, whatever its element type: 72 of them at 512 + 64 16-bit values.
#include "core/types.h"

namespace mla {

constexpr i64 kChunkBytes = 16;
// Chunks a lane has in flight: 4 x 32 lanes = 2 KB, so that a 1152-byte token is one round of loads and one of stores.
constexpr i32 kChunksInFlight = 4;
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
    i32 chunks;      // 16-byte chunks of one head's row; 0: the segment is not used
    i32 reserved;
};

struct AppendParams {
    AppendSegment segments[2];
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

// cupy_mla/cache/append.py packs these structs; its tests compare the sizes.
static_assert(sizeof(AppendSegment) == 64, "AppendSegment is packed by the host");
static_assert(sizeof(AppendParams) == 200, "AppendParams is packed by the host");

// A slot outside the cache, whatever led to it, is kNoSlot: that token is not stored.
MLA_DEVICE i64 find_slot(const AppendParams& params, i32 token) {
    if (params.slot_mapping != nullptr) {
        const i64 slot = params.slot_mapping[token];
        const i64 num_slots = static_cast<i64>(params.num_pages) * params.page_size;
        return slot >= 0 && slot < num_slots ? slot : kNoSlot;
    }
    const i32 request = params.requests != nullptr ? params.requests[token] : token / params.tokens_per_request;
    if (request < 0 || request >= params.num_requests) return kNoSlot;
    const i32 position = params.positions[token];
    if (position < 0) return kNoSlot;
    const i32 page_index = position / params.page_size;
    if (page_index >= params.max_pages_per_seq) return kNoSlot;
    const i32 page = params.block_table[request * params.block_table_stride + page_index];
    if (page < 0 || page >= params.num_pages) return kNoSlot;
    return static_cast<i64>(page) * params.page_size + position % params.page_size;
}

struct ChunkPlace {
    const uint4* source;
    uint4* target;
};

MLA_DEVICE ChunkPlace place_chunk(const AppendParams& params, i32 chunk, i32 token, i64 page, i64 offset) {
    const i32 chunks_per_head = params.segments[0].chunks + params.segments[1].chunks;
    const i32 head = chunk / chunks_per_head;
    const i32 in_head = chunk % chunks_per_head;
    const bool second = in_head >= params.segments[0].chunks;
    const AppendSegment& segment = params.segments[second ? 1 : 0];
    const i64 byte = (in_head - (second ? params.segments[0].chunks : 0)) * kChunkBytes;
    const u8* source = segment.rows + token * segment.rows_token_stride + head * segment.rows_head_stride + byte;
    u8* target = segment.cache + page * segment.cache_page_stride + offset * segment.cache_token_stride +
                 head * segment.cache_head_stride + byte;
    return {reinterpret_cast<const uint4*>(source), reinterpret_cast<uint4*>(target)};
}

}  // namespace mla

// Grid: ceil(num_tokens / blockDim.y) blocks of (32 lanes, blockDim.y warps).
extern "C" __global__ void mla_append(const __grid_constant__ mla::AppendParams params) {
    using namespace mla;
    const i32 lanes = static_cast<i32>(blockDim.x);
    const i64 token_index = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token_index >= params.num_tokens) return;
    const i32 token = static_cast<i32>(token_index);
    const i64 slot = find_slot(params, token);
    if (slot == kNoSlot) return;
    const i64 page = slot / params.page_size;
    const i64 offset = slot % params.page_size;
    const i32 chunks = params.num_heads_kv * (params.segments[0].chunks + params.segments[1].chunks);

    for (i32 first = static_cast<i32>(threadIdx.x); first < chunks; first += lanes * kChunksInFlight) {
        // All loads before all stores: the compiler cannot know that the two sides do not overlap.
        uint4 values[kChunksInFlight];
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) {
            const i32 chunk = first + i * lanes;
            if (chunk < chunks) values[i] = *place_chunk(params, chunk, token, page, offset).source;
        }
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) {
            const i32 chunk = first + i * lanes;
            if (chunk < chunks) *place_chunk(params, chunk, token, page, offset).target = values[i];
        }
    }
}
