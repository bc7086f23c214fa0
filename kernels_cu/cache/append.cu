// Writes new KV rows of many requests to their places in the paged cache, eight lanes per token.
// A token moves as 16-byte chunks, whatever its element type: 72 of them at 512 + 64 16-bit values.
#include "cache/places.h"

namespace mla {

constexpr i32 kMostInFlight = 9;  // rounds of 128 bytes of a token: one of 1152 bytes at once

struct AppendParams {
    AppendSegment segments[2];
    AppendPlaces places;
};

// cupy_mla/kernels/structs.py mirrors it; a test compares the sizes.
static_assert(sizeof(AppendParams) == 184, "AppendParams is packed by the host");

using Units = TokenUnits<1, 1>;

// Of the four tokens of a warp, rounds from `begin` on, several at a time, `step` rounds from those to the next ones.
template <i32 kInFlight>
MLA_DEVICE void append(const AppendParams& params, i32 begin, i32 step) {
    const TokenLane at(params.places);
    if (!at.exists) return;

    // All loads before all stores: the compiler cannot know that the two sides do not overlap. The first ones do not wait
    // for where the token goes.
    uint4 values[kInFlight];
    const auto load = [&](i32 head, i32 first) {
        const LaneUnits<Units> mine(first, at.lane);
        const uint4* const sources[2] = {
            reinterpret_cast<const uint4*>(token_row(params.segments[0], at.token, head)) + mine.first[0],
            reinterpret_cast<const uint4*>(token_row(params.segments[1], at.token, head)) + mine.first[1]};
#pragma unroll
        for (i32 i = 0; i < kInFlight; ++i)
            if (mine.chunks(i) > 0) values[i] = (mine.second(i) ? sources[1] : sources[0])[i * kTokenLanes];
    };
    i32 head = 0, first = begin;
    load(head, first);
    const CachePlace place = find_place(params.places, at.token);
    if (place.page == kNoPage) return;
#pragma unroll 1
    while (true) {
        const LaneUnits<Units> mine(first, at.lane);
        uint4* const targets[2] = {reinterpret_cast<uint4*>(cache_row(params.segments[0], place, head)) + mine.first[0],
                                   reinterpret_cast<uint4*>(cache_row(params.segments[1], place, head)) + mine.first[1]};
#pragma unroll
        for (i32 i = 0; i < kInFlight; ++i)
            if (mine.chunks(i) > 0) (mine.second(i) ? targets[1] : targets[0])[i * kTokenLanes] = values[i];
        first += step;
        if (first >= Units::kRounds) {
            first = begin;
            if (++head >= params.places.num_heads_kv) return;
        }
        load(head, first);
    }
}

}  // namespace mla

// Grid: (blocks of four tokens a warp, 1; or so many that share their rounds); blocks of (32 lanes, kBlockWarps).
extern "C" __global__ void mla_append(const __grid_constant__ mla::AppendParams params) {
    using namespace mla;
    constexpr i32 kInFlight = Units::rounds_in_flight(kMostInFlight);
    if (gridDim.y == 1)
        append<kInFlight>(params, 0, kInFlight);
    else if (blockIdx.y < Units::kRounds)
        append<1>(params, blockIdx.y, gridDim.y);
}
