// What kernels that move tokens to or from a paged cache share: the columns they move, and where each token lies.
#pragma once
#include "core/hopper.h"

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
    i32 reserved;
};

// cupy_mla/kernels/structs.py mirrors them; a test compares the sizes.
static_assert(sizeof(AppendSegment) == 56, "AppendSegment is packed by the host");
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

// Lanes that share a token; a warp has four tokens, side by side. Eight times 16 bytes are a line of 128.
constexpr i32 kTokenLanes = 8;
constexpr i32 kWarpTokens = kWarpThreads / kTokenLanes;
constexpr i32 kBlockWarps = 4;
constexpr i32 kChunkBytes = 16;

// What a lane of a warp works on.
struct TokenLane {
    i32 token;  // one that exists, if any of the warp's do
    bool exists;
    i32 lane;   // of the token's

    MLA_DEVICE explicit TokenLane(const AppendPlaces& places) {
        const i64 warp = static_cast<i64>(blockIdx.x) * kBlockWarps + threadIdx.y;
        const i64 number = warp * kWarpTokens + threadIdx.x / kTokenLanes;
        exists = number < places.num_tokens;
        token = static_cast<i32>(min(number, static_cast<i64>(places.num_tokens) - 1));
        lane = static_cast<i32>(threadIdx.x % kTokenLanes);
    }

    MLA_DEVICE bool none_of_warp() const { return __all_sync(kFullWarp, !exists); }
};

// Chunks of 16 bytes of one head's row in `rows`, of each segment.
constexpr i32 kChunks[2] = {MLA_CHUNKS, MLA_SECOND_CHUNKS};

// A token's two segments in units of so many chunks, one for each of its lanes in a round; no round has units of both segments.
template <i32 kFirstUnit, i32 kSecondUnit>
struct TokenUnits {
    static constexpr i32 kUnit[2] = {kFirstUnit, kSecondUnit};
    static constexpr i32 kFirstRounds = (kChunks[0] + kFirstUnit * kTokenLanes - 1) / (kFirstUnit * kTokenLanes);
    static constexpr i32 kRounds = kFirstRounds + (kChunks[1] + kSecondUnit * kTokenLanes - 1) / (kSecondUnit * kTokenLanes);

    static constexpr MLA_DEVICE i32 rounds_in_flight(i32 most) { return min_i32(kRounds, most); }
};

// Of some rounds, the units of a lane.
template <class Units>
struct LaneUnits {
    i32 first_round;
    i32 first[2];  // unit of the first of these rounds, if it were one of this segment

    MLA_DEVICE LaneUnits(i32 first_round, i32 lane)
        : first_round(first_round),
          first{first_round * kTokenLanes + lane, (first_round - Units::kFirstRounds) * kTokenLanes + lane} {}

    MLA_DEVICE bool second(i32 round) const { return first_round + round >= Units::kFirstRounds; }

    // How many chunks there are, from the unit of a round on; none: the lane has no unit in it.
    MLA_DEVICE i32 chunks(i32 round) const {
        const i32 of_second = kChunks[1] - (first[1] + round * kTokenLanes) * Units::kUnit[1];
        const i32 of_first = kChunks[0] - (first[0] + round * kTokenLanes) * Units::kUnit[0];
        return first_round + round >= Units::kRounds ? 0 : second(round) ? of_second : of_first;
    }
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
