// Reads tokens of a paged cache of e4m3 or e2m1 values into rows of 16-bit values: the other direction
// of quantise.cu. A value is its code times its scale in float32, rounded once. cupy_mla.layouts has the same in NumPy.
#include "cache/blocks.h"
#include "codec/e8m0.h"
#include "ptx/convert.h"
#include "ptx/convert_fp4.h"
#include "ptx/convert_fp8.h"
#include "ptx/mbarrier.h"
#include "ptx/tma.h"
#include "ptx/warp.h"

namespace mla {

constexpr i32 kMostInFlight = 9;  // rounds of 8 values a lane: a token of 576 values at once
constexpr i32 kBlockLanes = kBlock / kChunkValues;

// 8 codes as stored, and the number of their scale; or 8 bfloat16 values.
struct Stored {
    uint4 words;
    u32 scale;
};

MLA_DEVICE u32 stored_scale(const u8* scales, i32 chunk) {
    const i32 block = chunk / kBlockLanes;
    return kScales == kScalesFloat32 ? reinterpret_cast<const u32*>(scales)[block] : scales[block];
}

MLA_DEVICE uint4 read_codes(const u8* stored) {
    if constexpr (kCodes == kCodesE2m1) return {*reinterpret_cast<const u32*>(stored), 0, 0, 0};
    const uint2 words = *reinterpret_cast<const uint2*>(stored);
    return {words.x, words.y, 0, 0};
}

MLA_DEVICE f32 scale_of(u32 stored) {
    if constexpr (kScales == kScalesFloat32) return __uint_as_float(stored);
    if constexpr (kScales == kScalesE8m0) return e8m0_to_float(static_cast<u8>(stored));
    f32 value, none;
    unpack2<Fp16>(e4m3_pair_low(stored), value, none);
    return value;
}

template <typename Stored>
MLA_DEVICE u32 scaled_pair(u32 pair, f32 scale) {
    f32 first, second;
    unpack2<Stored>(pair, first, second);
    return pack2<Row>(first * scale, second * scale);
}

MLA_DEVICE uint4 plain(uint4 words) {
    if constexpr (kSameType<Row, Bf16>) return words;
    return {scaled_pair<Bf16>(words.x, 1.0f), scaled_pair<Bf16>(words.y, 1.0f), scaled_pair<Bf16>(words.z, 1.0f),
            scaled_pair<Bf16>(words.w, 1.0f)};
}

// Codes as pairs of fp16 values, which hold each of them, times their scale.
MLA_DEVICE uint4 scaled(const Stored& chunk, f32 scale) {
    u32 pairs[kChunkValues / 2];
    if constexpr (kCodes == kCodesE2m1) {
        u32 low[2], high[2];
        e2m1_quad(chunk.words.x, low);
        e2m1_quad(chunk.words.x >> 16, high);
        pairs[0] = low[0], pairs[1] = low[1], pairs[2] = high[0], pairs[3] = high[1];
    } else {
        pairs[0] = e4m3_pair_low(chunk.words.x), pairs[1] = e4m3_pair_high(chunk.words.x);
        pairs[2] = e4m3_pair_low(chunk.words.y), pairs[3] = e4m3_pair_high(chunk.words.y);
    }
    return {scaled_pair<Fp16>(pairs[0], scale), scaled_pair<Fp16>(pairs[1], scale), scaled_pair<Fp16>(pairs[2], scale),
            scaled_pair<Fp16>(pairs[3], scale)};
}

using Units = TokenUnits<1, 1>;

// Rows of a cache with given scales are made in shared memory, and TMA writes each as a whole.
constexpr i32 kSegmentBytes[2] = {kChunks[0] * kChunkBytes, kChunks[1] * kChunkBytes};
constexpr i32 kRowBytes = kSegmentBytes[0] + kSegmentBytes[1];
constexpr u32 kTokenMask = (1u << kTokenLanes) - 1;

// Of the four tokens of a warp, rounds from `begin` on, several at a time, `step` rounds from those to the next ones.
template <i32 kInFlight>
MLA_DEVICE void dequantise(const BlocksParams& params, i32 begin, i32 step) {
    constexpr i32 kSecondBytes = kSecondIsPlain ? kChunkBytes : kCodeBytes;
    constexpr bool kStaged = kScales == kScalesGiven && kInFlight > 1 && kInFlight == Units::kRounds;
    __shared__ alignas(kChunkBytes) u8 all_rows[kStaged ? kBlockWarps * kWarpTokens * kRowBytes : 1];
    u8* const staged = all_rows + (threadIdx.y * kWarpTokens + threadIdx.x / kTokenLanes) * kRowBytes;
    const TokenLane at(params.places);
    if (!at.exists) return;
    const CachePlace place = find_place(params.places, at.token);
    if (place.page == kNoPage) return;
    const f32 given[2] = {given_scale(params, 0), given_scale(params, 1)};
    const u8* const scales = kSecondIsPlain ? token_scales(params, place) : nullptr;
#pragma unroll 1
    for (i32 head = 0; head < params.places.num_heads_kv; ++head) {
        for (i32 first = begin; first < Units::kRounds; first += step) {
            const LaneUnits<Units> mine(first, at.lane);
            const u8* const sources[2] = {cache_row(params.segments[0], place, head) + mine.first[0] * kCodeBytes,
                                          cache_row(params.segments[1], place, head) + mine.first[1] * kSecondBytes};
            Stored stored[kInFlight];
#pragma unroll
            for (i32 i = 0; i < kInFlight; ++i) {
                if (mine.chunks(i) <= 0) continue;
                if (kSecondIsPlain && mine.second(i)) {
                    stored[i].words = *reinterpret_cast<const uint4*>(sources[1] + i * kTokenLanes * kSecondBytes);
                    continue;
                }
                stored[i].words = read_codes((mine.second(i) ? sources[1] : sources[0]) + i * kTokenLanes * kCodeBytes);
                if constexpr (kSecondIsPlain) stored[i].scale = stored_scale(scales, mine.first[0] + i * kTokenLanes);
            }
            const TokenRows rows(params, at.token, head);
            uint4* const targets[2] = {
                reinterpret_cast<uint4*>(kStaged ? staged : rows.rows[0]) + mine.first[0],
                reinterpret_cast<uint4*>(kStaged ? staged + kSegmentBytes[0] : rows.rows[1]) + mine.first[1]};
#pragma unroll
            for (i32 i = 0; i < kInFlight; ++i) {
                if (mine.chunks(i) <= 0) continue;
                uint4* const target = (mine.second(i) ? targets[1] : targets[0]) + i * kTokenLanes;
                if (kSecondIsPlain && mine.second(i))
                    *target = plain(stored[i].words);
                else
                    *target = scaled(stored[i], kSecondIsPlain   ? scale_of(stored[i].scale)
                                                : mine.second(i) ? given[1]
                                                                 : given[0]);
            }
            if constexpr (kStaged) {
                const u32 lanes = kTokenMask << threadIdx.x / kTokenLanes * kTokenLanes;
                fence_async_proxy();
                __syncwarp(lanes);
                if (at.lane == 0) {
                    const u32 source = shared_address(staged);
                    tma_store_bytes(rows.rows[0], source, kSegmentBytes[0]);
                    if (kSegmentBytes[1] > 0) tma_store_bytes(rows.rows[1], source + kSegmentBytes[0], kSegmentBytes[1]);
                    tma_store_wait_read();
                }
                __syncwarp(lanes);
            }
        }
    }
}

}  // namespace mla

// Grid: (blocks of four tokens a warp, 1; or so many that share their rounds); blocks of (32 lanes, kBlockWarps).
extern "C" __global__ void mla_dequantise(const __grid_constant__ mla::BlocksParams params) {
    using namespace mla;
    constexpr i32 kInFlight = Units::rounds_in_flight(kMostInFlight);
    if (gridDim.y == 1)
        dequantise<kInFlight>(params, 0, kInFlight);
    else if (blockIdx.y < Units::kRounds)
        dequantise<1>(params, blockIdx.y, gridDim.y);
}
