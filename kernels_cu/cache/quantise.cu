// Writes KV rows of 16-bit values to their places in a paged cache of e4m3 or e2m1 values.
// Scales are those of the whole cache's segments, which are given, or one for each block of values, which neighbouring lanes
// find together.
#include "cache/rounding.h"
#include "cache/staged_row.h"

namespace mla {

constexpr i32 kMostInFlight = 5;  // rounds of 16 values a lane: a token of 576 values at once
constexpr i32 kSecondChunks = kSecondIsPlain ? 1 : kCodedChunks;
using Units = TokenUnits<kCodedChunks, kSecondChunks>;

template <i32 kInFlight>
MLA_DEVICE void read_rounds(const BlocksParams& params, const TokenLane& at, i32 head, i32 first, Words (&words)[kInFlight]) {
    const LaneUnits<Units> mine(first, at.lane);
    const TokenRows rows(params, at.token, head);
    const uint4* const sources[2] = {reinterpret_cast<const uint4*>(rows.rows[0]) + mine.first[0] * kCodedChunks,
                                     reinterpret_cast<const uint4*>(rows.rows[1]) + mine.first[1] * kSecondChunks};
#pragma unroll
    for (i32 i = 0; i < kInFlight; ++i) {
        const bool is_plain = kSecondIsPlain && mine.second(i);
        const i32 chunks = mine.chunks(i);
        const i32 unit_chunks = is_plain ? kSecondChunks : kCodedChunks;
        const uint4* const source = (mine.second(i) ? sources[1] : sources[0]) + i * kTokenLanes * unit_chunks;
        words[i].chunks[0] = chunks > 0 ? source[0] : uint4{0, 0, 0, 0};
        words[i].chunks[1] = chunks > 1 && !is_plain ? source[1] : uint4{0, 0, 0, 0};
    }
}

// What a lane's values become, in shared memory or in the cache.
struct Targets {
    u8* segments[2];
    u8* scales;
    bool aligned[2];  // for all codes of a round at once
    bool exist;
};

template <i32 kInFlight, bool kDivides>
MLA_DEVICE void round_values(const Words (&words)[kInFlight], i32 first, i32 lane, const Targets& targets,
                             const Divisor& latent, const Divisor& rope) {
    constexpr i32 kUnitBytes = kCodedChunks * kCodeBytes, kSecondBytes = kSecondIsPlain ? kChunkBytes : kUnitBytes;
    const LaneUnits<Units> mine(first, lane);
    u8* const units[2] = {targets.segments[0] + mine.first[0] * kUnitBytes, targets.segments[1] + mine.first[1] * kSecondBytes};
#pragma unroll
    for (i32 i = 0; i < kInFlight; ++i) {
        if (first + i >= Units::kRounds) break;  // all lanes stay together: they exchange values
        const bool second = mine.second(i);
        const i32 chunks = mine.chunks(i);
        if (kSecondIsPlain && second) {
            if (targets.exist && chunks > 0)
                *reinterpret_cast<uint4*>(units[1] + i * kTokenLanes * kSecondBytes) = plain(words[i].chunks[0]);
            continue;
        }
        const Divisor divisor = Divisor::one_of(second, latent, rope);
        f32 factor = 1.0f;
        if constexpr (kSecondIsPlain) {
            const i32 block = mine.first[0] / kBlockLanes + i * (kTokenLanes / kBlockLanes);
            factor = settle_scale(targets.scales, block, words[i], targets.exist && lane % kBlockLanes == 0, chunks > 0);
        }
        Coded coded;
#pragma unroll
        for (i32 j = 0; j < kCodedChunks; ++j) {
            Chunk chunk(words[i].chunks[j]);
            if constexpr (kSecondIsPlain)
                chunk.multiply(factor);
            else
                chunk.divide<kDivides>(divisor);
            chunk.codes(coded.words[j]);
        }
        u8* const target = (second ? units[1] : units[0]) + i * kTokenLanes * kUnitBytes;
        if (targets.exist) coded.store(target, second ? targets.aligned[1] : targets.aligned[0], chunks);
    }
}

// Of the four tokens of a warp, rounds from `begin` on, several at a time, `step` rounds from those to the next ones.
template <i32 kInFlight, bool kDivides>
MLA_DEVICE void quantise(const BlocksParams& params, const Divisor& latent, const Divisor& rope, i32 begin, i32 step) {
    const TokenLane at(params.places);
    if (at.none_of_warp()) return;

    // The first rows are read while it is looked up where the tokens go.
    i32 head = 0, first = begin;
    Words words[kInFlight];
    read_rounds(params, at, head, first, words);
    const CachePlace place = find_place(params.places, at.token);
    Targets targets;
    targets.scales = kSecondIsPlain ? token_scales(params, place) : nullptr;
    targets.exist = at.exists && place.page != kNoPage;
#pragma unroll
    for (i32 i = 0; i < 2; ++i) targets.aligned[i] = has_aligned_units(params.segments[i]);
#pragma unroll 1
    while (true) {
#pragma unroll
        for (i32 i = 0; i < 2; ++i) targets.segments[i] = cache_row(params.segments[i], place, head);
        round_values<kInFlight, kDivides>(words, first, at.lane, targets, latent, rope);
        first += step;
        if (first >= Units::kRounds) {
            first = begin;
            if (++head >= params.places.num_heads_kv) return;
        }
        read_rounds(params, at, head, first, words);
    }
}

// All of four tokens of a layout with scales, through shared memory.
MLA_DEVICE void quantise_rows(const BlocksParams& params, const Divisor& none) {
    const TokenLane at(params.places);
    if (at.none_of_warp()) return;
    Words words[Units::kRounds];
    read_rounds(params, at, 0, 0, words);
    const CachePlace place = find_place(params.places, at.token);
    const CacheRow target(params, place, at.exists && place.page != kNoPage);
    if (at.lane == 0) target.prefetch_partial_sectors();
    const StagedRow staged;
    const Targets targets{{staged.row, staged.row + kPlainStart}, staged.scales, {true, true}, true};
    round_values<Units::kRounds, false>(words, 0, at.lane, targets, none, none);
    target.write(staged, at.lane);
}

}  // namespace mla

// Grid: (blocks of four tokens a warp, 1; or so many that share their rounds); blocks of (32 lanes, kBlockWarps).
extern "C" __global__ void mla_quantise(const __grid_constant__ mla::BlocksParams params) {
    using namespace mla;
    constexpr i32 kInFlight = Units::rounds_in_flight(kMostInFlight);
    const Divisor latent(given_scale(params, 0)), rope(given_scale(params, 1));
    const i32 begin = static_cast<i32>(blockIdx.y), parts = static_cast<i32>(gridDim.y);
    if (begin >= Units::kRounds) return;
    if (kScales == kScalesGiven && (latent.divides || rope.divides))
        quantise<1, true>(params, latent, rope, begin, parts);
    else if (parts > 1)
        quantise<1, false>(params, latent, rope, begin, parts);
    else if constexpr (kSecondIsPlain)
        quantise_rows(params, latent);
    else
        quantise<kInFlight, false>(params, latent, rope, 0, kInFlight);
}
