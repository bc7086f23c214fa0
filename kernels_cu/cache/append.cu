// Writes new KV rows of many requests to their places in the paged cache, one warp per token.
// A token moves as 16-byte chunks, whatever its element type: 72 of them at 512 + 64 16-bit values.
#include "cache/places.h"

namespace mla {

// Chunks a lane has in flight: 4 x 32 lanes = 2 KB, so that a 1152-byte token is one round of loads and one of stores.
constexpr i32 kChunksInFlight = 4;

struct AppendParams {
    AppendSegment segments[2];
    AppendPlaces places;
};

// cupy_mla/kernels/structs.py mirrors it; a test compares the sizes.
static_assert(sizeof(AppendParams) == 200, "AppendParams is packed by the host");

// A 16-byte chunk of a token: of which segment and head, and where in that row.
struct Chunk {
    const AppendSegment& segment;
    i32 head;
    i32 index;

    static MLA_DEVICE Chunk of(const AppendParams& params, i32 chunk) {
        const i32 chunks_per_head = params.segments[0].chunks + params.segments[1].chunks;
        const i32 head = params.places.num_heads_kv == 1 ? 0 : chunk / chunks_per_head;
        const i32 in_head = chunk - head * chunks_per_head;
        const bool second = in_head >= params.segments[0].chunks;
        return {params.segments[second ? 1 : 0], head, in_head - (second ? params.segments[0].chunks : 0)};
    }

    MLA_DEVICE uint4 load(i32 token) const { return reinterpret_cast<const uint4*>(token_row(segment, token, head))[index]; }

    MLA_DEVICE void store(CachePlace place, uint4 value) const {
        reinterpret_cast<uint4*>(cache_row(segment, place, head))[index] = value;
    }
};

}  // namespace mla

// Grid: ceil(num_tokens / blockDim.y) blocks of (32 lanes, blockDim.y warps).
extern "C" __global__ void mla_append(const __grid_constant__ mla::AppendParams params) {
    using namespace mla;
    const i32 lanes = static_cast<i32>(blockDim.x);
    const i64 token_index = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token_index >= params.places.num_tokens) return;
    const i32 token = static_cast<i32>(token_index);
    const i32 chunks = params.places.num_heads_kv * (params.segments[0].chunks + params.segments[1].chunks);

    // All loads before all stores: the compiler cannot know that the two sides do not overlap. The first ones do not wait
    // for where the token goes.
    uint4 values[kChunksInFlight];
    const auto load = [&](i32 first) {
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) {
            const i32 chunk = first + i * lanes;
            if (chunk < chunks) values[i] = Chunk::of(params, chunk).load(token);
        }
    };
    i32 first = static_cast<i32>(threadIdx.x);
    load(first);
    const CachePlace place = find_place(params.places, token);
    if (place.page == kNoPage) return;
    while (true) {
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) {
            const i32 chunk = first + i * lanes;
            if (chunk < chunks) Chunk::of(params, chunk).store(place, values[i]);
        }
        first += lanes * kChunksInFlight;
        if (first >= chunks) return;
        load(first);
    }
}
