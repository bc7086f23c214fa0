// Reads tokens of a paged cache of e4m3 or e2m1 values into rows of 16-bit values, one warp per token: the other direction
// of quantise.cu. A value is its code times its scale in float32, rounded once. cupy_mla.layouts has the same in NumPy.
#include "cache/blocks.h"
#include "codec/e8m0.h"
#include "ptx/convert.h"
#include "ptx/convert_fp4.h"
#include "ptx/convert_fp8.h"

namespace mla {

// 8 codes as pairs of fp16 values, which hold each of them.
MLA_DEVICE void read_codes(const u8* row, i32 place, i32 codes, u32 (&pairs)[kChunkValues / 2]) {
    u32 low[2], high[2];
    if (codes == kCodesE2m1) {
        const u32 word = reinterpret_cast<const u32*>(row)[place];
        e2m1_quad(word, low);
        e2m1_quad(word >> 16, high);
    } else {
        const uint2 words = reinterpret_cast<const uint2*>(row)[place];
        low[0] = e4m3_pair_low(words.x), low[1] = e4m3_pair_high(words.x);
        high[0] = e4m3_pair_low(words.y), high[1] = e4m3_pair_high(words.y);
    }
    pairs[0] = low[0], pairs[1] = low[1], pairs[2] = high[0], pairs[3] = high[1];
}

MLA_DEVICE f32 read_scale(const u8* scales, i32 block, i32 format) {
    if (format == kScalesFloat32) return reinterpret_cast<const f32*>(scales)[block];
    if (format == kScalesE8m0) return e8m0_to_float(scales[block]);
    f32 value, none;
    unpack2<Fp16>(e4m3_pair_low(scales[block]), value, none);
    return value;
}

template <typename Stored>
MLA_DEVICE u32 scaled_pair(u32 pair, f32 scale) {
    f32 first, second;
    unpack2<Stored>(pair, first, second);
    return pack2<Row>(first * scale, second * scale);
}

// A chunk of a token's row.
MLA_DEVICE uint4 read_chunk(const BlocksParams& params, const u8* stored, const u8* scales, f32 whole, i32 place, bool plain) {
    if (plain) {
        const uint4 words = reinterpret_cast<const uint4*>(stored)[place];
        return {scaled_pair<Bf16>(words.x, 1.0f), scaled_pair<Bf16>(words.y, 1.0f), scaled_pair<Bf16>(words.z, 1.0f),
                scaled_pair<Bf16>(words.w, 1.0f)};
    }
    u32 pairs[kChunkValues / 2];
    read_codes(stored, place, params.codes, pairs);
    const f32 scale = params.scales == nullptr ? whole : read_scale(scales, place >> params.block_shift, params.scale_format);
    return {scaled_pair<Fp16>(pairs[0], scale), scaled_pair<Fp16>(pairs[1], scale), scaled_pair<Fp16>(pairs[2], scale),
            scaled_pair<Fp16>(pairs[3], scale)};
}

}  // namespace mla

// Grid: ceil(num_tokens / blockDim.y) blocks of (32 lanes, blockDim.y warps).
extern "C" __global__ void mla_dequantise(const __grid_constant__ mla::BlocksParams params) {
    using namespace mla;
    const i64 token_index = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token_index >= params.places.num_tokens) return;
    const i32 token = static_cast<i32>(token_index);
    const CachePlace place = find_place(params.places, token);
    if (place.page == kNoPage) return;
    const f32 whole = whole_scale(params);
    const u8* const scales = token_scales(params, place);
    for (i32 head = 0; head < params.places.num_heads_kv; ++head) {
        const TokenChunks tokens(params, token, head);
        const u8* const stored[2] = {cache_row(params.segments[0], place, head), cache_row(params.segments[1], place, head)};
        for (i32 first = static_cast<i32>(threadIdx.x); first < tokens.chunks; first += kChunksInFlight * kLanes) {
            uint4 values[kChunksInFlight];
#pragma unroll
            for (i32 i = 0; i < kChunksInFlight; ++i) {
                const i32 chunk = first + i * kLanes;
                const bool second = tokens.in_second(chunk);
                const bool plain = second && params.second_is_plain != 0;
                if (chunk < tokens.chunks)
                    values[i] = read_chunk(params, second ? stored[1] : stored[0], scales, whole, tokens.in_segment(chunk), plain);
            }
#pragma unroll
            for (i32 i = 0; i < kChunksInFlight; ++i) {
                const i32 chunk = first + i * kLanes;
                if (chunk < tokens.chunks) *tokens.row(chunk) = values[i];
            }
        }
    }
}
