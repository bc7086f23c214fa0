// Writes new KV rows of 16-bit values to their places in a paged cache of e4m3 values, one warp per token.
// A lane takes 8 values at a time. Scales are one for the whole cache, which is given, or one for each block of values,
// which neighbouring lanes find together: DeepSeek's powers of two. cupy_mla.layouts has the same in NumPy.
#include "cache/places.h"
#include "ptx/convert.h"
#include "ptx/convert_fp8.h"

namespace mla {

using Row = MLA_DTYPE;

constexpr i32 kLanes = 32;
constexpr u32 kFullWarp = 0xFFFFFFFFu;
constexpr i32 kChunkValues = 8;
constexpr i64 kChunkBytes = kChunkValues * Row::kBytes;
constexpr u32 kMagnitude = 0x7FFFFFFFu;  // of a float32: all but the sign
constexpr u32 kInfinity = 0x7F800000u;
constexpr i32 kMantissaBits = 23;
constexpr u32 kMantissa = (1u << kMantissaBits) - 1;
constexpr u32 kTwiceBias = 254;  // the exponents of x and 1 / x, powers of two, add up to it
constexpr f32 kLargestE4m3 = 448.0f;
constexpr f32 kSmallestScale = 1e-4f;  // before it is rounded up to a power of two

struct QuantiseParams {
    AppendSegment segments[2];
    AppendPlaces places;
    u8* scales;            // of the first token of the cache; null: one scale for all
    i64 scales_page_stride;   // in bytes
    i64 scales_token_stride;
    const f32* kv_scale;   // one scale for all; null: it is kv_scale_value
    f32 kv_scale_value;
    i32 block_lanes;       // lanes that share a scale
    i32 plain_segment;     // this one stays 16-bit, as bfloat16; -1: none
    i32 exponents;         // 1: a scale is stored as its exponent, in a byte; 0: as float32
};

// cupy_mla/kernels/structs.py mirrors it; a test compares the sizes.
static_assert(sizeof(QuantiseParams) == 248, "QuantiseParams is packed by the host");

// 8 values of a row, zeros past its end.
struct Chunk {
    f32 values[kChunkValues];

    MLA_DEVICE void read(const uint4* source) {
        const uint4 words = source == nullptr ? uint4{0, 0, 0, 0} : *source;
        const u32 pairs[kChunkValues / 2] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (i32 i = 0; i < kChunkValues / 2; ++i) unpack2<Row>(pairs[i], values[2 * i], values[2 * i + 1]);
    }

    // Bits of the largest finite magnitude: as integers they are in the order of their values.
    MLA_DEVICE u32 largest() const {
        u32 found = 0;
#pragma unroll
        for (i32 i = 0; i < kChunkValues; ++i) {
            const u32 magnitude = __float_as_uint(values[i]) & kMagnitude;
            if (magnitude < kInfinity && magnitude > found) found = magnitude;
        }
        return found;
    }

    MLA_DEVICE uint2 as_e4m3() const {
        u32 pairs[kChunkValues / 2];
#pragma unroll
        for (i32 i = 0; i < kChunkValues / 2; ++i) pairs[i] = pack_e4m3(values[2 * i], values[2 * i + 1]) & 0xFFFFu;
        return {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
    }

    MLA_DEVICE uint4 as_bf16() const {
        u32 pairs[kChunkValues / 2];
#pragma unroll
        for (i32 i = 0; i < kChunkValues / 2; ++i) pairs[i] = pack2<Bf16>(values[2 * i], values[2 * i + 1]);
        return {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
};

// The exponent, with its bias, of 2^ceil(log2(max(largest / 448, 1e-4))).
MLA_DEVICE u32 scale_exponent(u32 largest) {
    const u32 bits = __float_as_uint(fmaxf(__uint_as_float(largest) / kLargestE4m3, kSmallestScale));
    return (bits >> kMantissaBits) + ((bits & kMantissa) != 0);
}

MLA_DEVICE f32 power_of_two(u32 exponent) { return __uint_as_float(exponent << kMantissaBits); }

}  // namespace mla

// Grid: ceil(num_tokens / blockDim.y) blocks of (32 lanes, blockDim.y warps).
extern "C" __global__ void mla_quantise(const __grid_constant__ mla::QuantiseParams params) {
    using namespace mla;
    const i64 token_index = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token_index >= params.places.num_tokens) return;
    const i32 token = static_cast<i32>(token_index);
    const i64 slot = find_slot(params.places, token);
    if (slot == kNoSlot) return;
    const i64 page = slot / params.places.page_size;
    const i64 offset = slot % params.places.page_size;
    const i32 lane = static_cast<i32>(threadIdx.x);
    const f32 scale = params.kv_scale != nullptr ? *params.kv_scale : params.kv_scale_value;

    for (i32 head = 0; head < params.places.num_heads_kv; ++head) {
        for (i32 index = 0; index < 2; ++index) {
            const AppendSegment& segment = params.segments[index];
            const u8* row = segment.rows + token * segment.rows_token_stride + head * segment.rows_head_stride;
            u8* target = segment.cache + page * segment.cache_page_stride + offset * segment.cache_token_stride +
                         head * segment.cache_head_stride;
            // All lanes stay together: they exchange values.
            for (i32 first = 0; first < segment.chunks; first += kLanes) {
                const i32 place = first + lane;
                const bool there = place < segment.chunks;
                Chunk chunk;
                chunk.read(there ? reinterpret_cast<const uint4*>(row + place * kChunkBytes) : nullptr);
                if (index == params.plain_segment) {
                    if (there) reinterpret_cast<uint4*>(target)[place] = chunk.as_bf16();
                    continue;
                }
                if (params.scales == nullptr) {
#pragma unroll
                    for (i32 i = 0; i < kChunkValues; ++i) chunk.values[i] = chunk.values[i] / scale;
                } else {
                    u32 largest = chunk.largest();
                    for (i32 distance = 1; distance < params.block_lanes; distance *= 2) {
                        largest = max(largest, __shfl_xor_sync(kFullWarp, largest, distance));
                    }
                    const u32 exponent = scale_exponent(largest);
#pragma unroll
                    for (i32 i = 0; i < kChunkValues; ++i) chunk.values[i] *= power_of_two(kTwiceBias - exponent);
                    if (there && lane % params.block_lanes == 0) {
                        u8* scales = params.scales + page * params.scales_page_stride +
                                     offset * params.scales_token_stride;
                        const i32 block = place / params.block_lanes;
                        if (params.exponents != 0) scales[block] = static_cast<u8>(exponent);
                        else reinterpret_cast<f32*>(scales)[block] = power_of_two(exponent);
                    }
                }
                if (there) reinterpret_cast<uint2*>(target)[place] = chunk.as_e4m3();
            }
        }
    }
}
