// Writes KV rows of 16-bit values to their places in a paged cache of e4m3 or e2m1 values, one warp per token.
// A lane takes 8 values at a time. Scales are one for the whole cache, which is given, or one for each block of values,
// which neighbouring lanes find together. cupy_mla.layouts has the same in NumPy.
#include "cache/blocks.h"
#include "ptx/convert.h"
#include "ptx/convert_fp4.h"
#include "ptx/convert_fp8.h"

namespace mla {

constexpr u32 kMagnitudes = 0x7FFF7FFFu;  // of a pair: all but the signs
constexpr u32 kInfinity = kSameType<Row, Bf16> ? 0x7F80 : 0x7C00;
constexpr u32 kMantissa = (1u << kMantissaBits) - 1;
constexpr u32 kTwiceBias = 254;  // the exponents of x and 1 / x, powers of two, add up to it
constexpr f32 kLargestE4m3 = 448.0f, kLargestE2m1 = 6.0f;
constexpr f32 kSmallestScale = 1e-4f;  // before it is rounded up to a power of two
constexpr u32 kSmallestE4m3Code = 0x01, kLargestE4m3Code = 0x7E, kNanE4m3Code = 0x7F;

// What values are divided by: the IEEE quotient, for a third of a division's instructions (Markstein's correction of a product
// with the inverse, which has to be rounded correctly).
struct Divisor {
    static constexpr f32 kLeast = 0x1p-60f, kMost = 0x1p60f;  // beyond them the inverse, or what remains, may lose bits
    f32 value;
    f32 inverse;
    bool divides;

    explicit MLA_DEVICE Divisor(f32 value)
        : value(value), inverse(__frcp_rn(value)), divides(!(value >= kLeast && value <= kMost)) {}

    MLA_DEVICE f32 quotient(f32 dividend) const {
        if (divides) return dividend / value;
        return corrected(dividend, value, inverse);
    }

    // Infinities, and what is too large for the correction, stay as they are.
    static MLA_DEVICE f32 corrected(f32 dividend, f32 divisor, f32 inverse) {
        const f32 product = dividend * inverse;
        const f32 remainder = __fmaf_rn(-product, divisor, dividend);
        return fabsf(product) < kMost ? __fmaf_rn(remainder, inverse, product) : product;
    }
};

// 8 values of a row.
struct Chunk {
    f32 values[kChunkValues];

    explicit MLA_DEVICE Chunk(uint4 words) {
        const u32 pairs[kChunkValues / 2] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (i32 i = 0; i < kChunkValues / 2; ++i) unpack2<Row>(pairs[i], values[2 * i], values[2 * i + 1]);
    }

    MLA_DEVICE void divide(const Divisor& divisor) {
#pragma unroll
        for (i32 i = 0; i < kChunkValues; ++i) values[i] = divisor.quotient(values[i]);
    }

    MLA_DEVICE void multiply(f32 factor) {
#pragma unroll
        for (i32 i = 0; i < kChunkValues; ++i) values[i] *= factor;
    }

    MLA_DEVICE uint2 as_e4m3() const {
        return {pack_e4m3(values[0], values[1], values[2], values[3]), pack_e4m3(values[4], values[5], values[6], values[7])};
    }

    // The first in the lowest bits.
    MLA_DEVICE u32 as_e2m1() const {
        u32 word = 0;
#pragma unroll
        for (i32 i = 0; i < kChunkValues; ++i) word |= to_e2m1(values[i]) << 4 * i;
        return word;
    }

    MLA_DEVICE uint4 as_bf16() const {
        u32 pairs[kChunkValues / 2];
#pragma unroll
        for (i32 i = 0; i < kChunkValues / 2; ++i) pairs[i] = pack2<Bf16>(values[2 * i], values[2 * i + 1]);
        return {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
};

// Bits of the largest magnitude of 8 values: as integers they are in the order of their values, infinity and NaN at the end.
MLA_DEVICE u32 largest_magnitude(uint4 words) {
    const u32 low = max_u16_pairs(words.x & kMagnitudes, words.y & kMagnitudes);
    const u32 high = max_u16_pairs(words.z & kMagnitudes, words.w & kMagnitudes);
    const u32 pair = max_u16_pairs(low, high);
    return max(pair & 0xFFFF, pair >> 16);
}

MLA_DEVICE u32 without_infinite(u32 pair) {
    const u32 low = pair & 0xFFFF, high = pair >> 16;
    return ((low & 0x7FFF) < kInfinity ? low : 0) | ((high & 0x7FFF) < kInfinity ? high : 0) << 16;
}

// The largest of a number of each of the lanes that share a scale. All lanes of the warp are there.
MLA_DEVICE u32 largest_of_block(u32 number, i32 block_lanes) {
#pragma unroll
    for (i32 distance = 1; distance < kLanes; distance *= 2) {
        if (distance < block_lanes) number = max(number, __shfl_xor_sync(kFullWarp, number, distance));
    }
    return number;
}

// Of the block that a chunk is in, its largest finite magnitude, and whether it has a NaN.
struct BlockRange {
    f32 largest;
    bool nan;

    MLA_DEVICE BlockRange(uint4 words, i32 block_lanes) : nan(false) {
        u32 bits = largest_of_block(largest_magnitude(words), block_lanes);
        if (__any_sync(kFullWarp, bits >= kInfinity)) {
            nan = bits > kInfinity;
            words = {without_infinite(words.x), without_infinite(words.y), without_infinite(words.z), without_infinite(words.w)};
            bits = largest_of_block(largest_magnitude(words), block_lanes);
        }
        f32 none;
        unpack2<Row>(bits, largest, none);
    }
};

// The exponent, with its bias, of DeepSeek's scale: 2^ceil(log2(max(largest / 448, 1e-4))).
MLA_DEVICE u32 scale_exponent(f32 largest) {
    const u32 least = __float_as_uint(fmaxf(Divisor::corrected(largest, kLargestE4m3, 1.0f / kLargestE4m3), kSmallestScale));
    return (least >> kMantissaBits) + ((least & kMantissa) != 0);
}

MLA_DEVICE f32 power_of_two(u32 exponent) { return __uint_as_float(exponent << kMantissaBits); }

MLA_DEVICE f32 value_of_e4m3(u32 code) {
    f32 value, none;
    unpack2<Fp16>(e4m3_pair_low(code), value, none);
    return value;
}

// The smallest e4m3 by which no value passes 6; NaN of a block that has one, as an e2m1 cannot be NaN.
MLA_DEVICE u32 scale_code(const BlockRange& range) {
    if (range.nan) return kNanE4m3Code;
    const f32 least = Divisor::corrected(range.largest, kLargestE2m1, 1.0f / kLargestE2m1);
    u32 code = pack_e4m3(least, 0.0f) & 0xFF;
    code += value_of_e4m3(code) < least;
    return max(kSmallestE4m3Code, min(code, kLargestE4m3Code));
}

// A chunk divided by its block's scale, which the first lane of the block stores.
MLA_DEVICE Chunk scaled(const BlocksParams& params, u8* scales, uint4 words, i32 place, bool there) {
    const i32 block_lanes = 1 << params.block_shift;
    const BlockRange range(words, block_lanes);
    const i32 block = place >> params.block_shift;
    const bool stores = there && (place & (block_lanes - 1)) == 0;
    Chunk chunk(words);
    if (params.scale_format == kScalesE4m3) {
        const u32 code = scale_code(range);
        chunk.divide(Divisor(value_of_e4m3(code)));
        if (stores) scales[block] = static_cast<u8>(code);
        return chunk;
    }
    const u32 exponent = scale_exponent(range.largest);
    chunk.multiply(power_of_two(kTwiceBias - exponent));
    if (stores && params.scale_format == kScalesE8m0) scales[block] = static_cast<u8>(exponent);
    if (stores && params.scale_format == kScalesFloat32) reinterpret_cast<f32*>(scales)[block] = power_of_two(exponent);
    return chunk;
}

}  // namespace mla

// Grid: ceil(num_tokens / blockDim.y) blocks of (32 lanes, blockDim.y warps).
extern "C" __global__ void mla_quantise(const __grid_constant__ mla::BlocksParams params) {
    using namespace mla;
    const i64 token_index = static_cast<i64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token_index >= params.places.num_tokens) return;
    const i32 token = static_cast<i32>(token_index);
    const i32 lane = static_cast<i32>(threadIdx.x);

    // The first rows do not wait for where the token goes.
    uint4 words[kChunksInFlight];
    const auto load = [&](i32 head, i32 first) {
        const TokenChunks tokens(params, token, head);
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) {
            const i32 chunk = first + i * kLanes;
            words[i] = chunk < tokens.chunks ? *tokens.row(chunk) : uint4{0, 0, 0, 0};
        }
    };
    load(0, lane);
    const CachePlace place = find_place(params.places, token);
    if (place.page == kNoPage) return;
    const Divisor divisor(whole_scale(params));
    u8* const scales = token_scales(params, place);
    for (i32 head = 0; head < params.places.num_heads_kv; ++head) {
        const TokenChunks tokens(params, token, head);
        u8* const targets[2] = {cache_row(params.segments[0], place, head), cache_row(params.segments[1], place, head)};
        for (i32 first = lane; first - lane < tokens.chunks; first += kChunksInFlight * kLanes) {
            if (head > 0 || first > lane) load(head, first);
#pragma unroll
            for (i32 i = 0; i < kChunksInFlight; ++i) {
                if (first - lane + i * kLanes >= tokens.chunks) break;  // all lanes stay together: they exchange values
                const i32 chunk_index = first + i * kLanes;
                const i32 in_segment = tokens.in_segment(chunk_index);
                const bool second = tokens.in_second(chunk_index);
                const bool there = chunk_index < tokens.chunks;
                u8* const target = second ? targets[1] : targets[0];
                const bool plain = second && params.second_is_plain != 0;
                if (params.scales == nullptr) {
                    Chunk chunk(words[i]);
                    chunk.divide(divisor);
                    if (there) reinterpret_cast<uint2*>(target)[in_segment] = chunk.as_e4m3();
                    continue;
                }
                const Chunk chunk = scaled(params, scales, words[i], in_segment, there && !plain);
                if (!there) continue;
                if (plain) reinterpret_cast<uint4*>(target)[in_segment] = Chunk(words[i]).as_bf16();
                else if (params.codes == kCodesE2m1) reinterpret_cast<u32*>(target)[in_segment] = chunk.as_e2m1();
                else reinterpret_cast<uint2*>(target)[in_segment] = chunk.as_e4m3();
            }
        }
    }
}
