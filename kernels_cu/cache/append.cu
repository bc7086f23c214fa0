// Writes new KV rows of many requests to their places in the paged cache, one warp per token.
// A token moves as 16-byte chunks, whatever its element type: 72 of them at 512 + 64 16-bit values.
#include "cache/places.h"

namespace mla {

constexpr i64 kChunkBytes = 16;
// Chunks a lane has in flight: 4 x 32 lanes = 2 KB, so that a 1152-byte token is one round of loads and one of stores.
constexpr i32 kChunksInFlight = 4;

struct AppendParams {
    AppendSegment segments[2];
    AppendPlaces places;
};

// cupy_mla/kernels/structs.py mirrors it; a test compares the sizes.
static_assert(sizeof(AppendParams) == 200, "AppendParams is packed by the host");

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
    if (token_index >= params.places.num_tokens) return;
    const i32 token = static_cast<i32>(token_index);
    const i64 slot = find_slot(params.places, token);
    if (slot == kNoSlot) return;
    const i64 page = slot / params.places.page_size;
    const i64 offset = slot % params.places.page_size;
    const i32 chunks = params.places.num_heads_kv * (params.segments[0].chunks + params.segments[1].chunks);

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
