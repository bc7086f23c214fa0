// Reads tokens of a paged cache of e4m3 or e2m1 values into rows of 16-bit values: the other direction
// of quantise.cu. A value is its code times its scale in float32, rounded once. cupy_mla.layouts has the same in NumPy.
#include "cache/blocks.h"
#include "codec/e8m0.h"
#include "ptx/convert.h"
#include "ptx/convert_fp4.h"
#include "ptx/convert_fp8.h"

namespace mla {

// 8 codes as stored, and the number of their scale; or 8 bfloat16 values.
struct Stored {
    uint4 words;
    u32 scale;
};

MLA_DEVICE Stored read_chunk(const BlocksParams& params, const u8* stored, const u8* scales, ChunkPlace at) {
    Stored chunk{};
    if (kScales != kScalesGiven && at.second) {
        chunk.words = reinterpret_cast<const uint4*>(stored)[at.in_segment];
        return chunk;
    }
    if constexpr (kCodes == kCodesE2m1) {
        chunk.words.x = reinterpret_cast<const u32*>(stored)[at.in_segment];
    } else {
        const uint2 words = reinterpret_cast<const uint2*>(stored)[at.in_segment];
        chunk.words.x = words.x, chunk.words.y = words.y;
    }
    const i32 block = at.in_segment / kBlockLanes;
    if constexpr (kScales == kScalesFloat32) chunk.scale = reinterpret_cast<const u32*>(scales)[block];
    if constexpr (kScales == kScalesE8m0 || kScales == kScalesE4m3) chunk.scale = scales[block];
    return chunk;
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

}  // namespace mla

// Grid: a warp for every `tokens_per_warp` tokens; blocks of (32 lanes, blockDim.y warps).
extern "C" __global__ void mla_dequantise(const __grid_constant__ mla::BlocksParams params) {
    using namespace mla;
    WarpTokens tokens(params.places);
    if (tokens.count() <= 0) return;
    tokens.find(params.places);
    const i32 lane = static_cast<i32>(threadIdx.x), heads = params.places.num_heads_kv, chunks = chunks_of(params);
    const f32 given[2] = {given_scale(params, 0), given_scale(params, 1)};

    // The cache is read a round ahead.
    Stored stored[kChunksInFlight], next_stored[kChunksInFlight];
    const auto load = [&](const Round& round, Stored (&loaded)[kChunksInFlight]) {
        const CachePlace place = tokens.place(round.index);
        if (place.page == kNoPage) return;
        const u8* const scales = token_scales(params, place);
        const u8* const sources[2] = {cache_row(params.segments[0], place, round.head),
                                      cache_row(params.segments[1], place, round.head)};
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) {
            const i32 chunk = round.first + lane + i * kLanes;
            const ChunkPlace at(params, chunk);
            if (chunk < chunks) loaded[i] = read_chunk(params, at.second ? sources[1] : sources[0], scales, at);
        }
    };
    Round round;
    load(round, stored);
    while (round.index < tokens.count()) {
        Round next = round;
        next.advance(chunks, heads);
        if (next.index < tokens.count()) load(next, next_stored);
        if (tokens.place(round.index).page != kNoPage) {
            const TokenRows rows(params, tokens.token(round.index), round.head);
#pragma unroll
            for (i32 i = 0; i < kChunksInFlight; ++i) {
                const i32 chunk = round.first + lane + i * kLanes;
                if (chunk >= chunks) continue;
                const ChunkPlace at(params, chunk);
                if constexpr (kScales == kScalesGiven)
                    *rows.chunk(at) = scaled(stored[i], at.second ? given[1] : given[0]);
                else
                    *rows.chunk(at) = at.second ? plain(stored[i].words) : scaled(stored[i], scale_of(stored[i].scale));
            }
        }
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) stored[i] = next_stored[i];
        round = next;
    }
}
