// Writes KV rows of 16-bit values to their places in a paged cache of e4m3 or e2m1 values.
// A lane takes 8 values at a time. Scales are those of the whole cache's segments, which are given, or one for each block of
// values, which neighbouring lanes find together. cupy_mla.layouts has the same in NumPy.
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

    // By fields: a choice between addresses would take a stack.
    static MLA_DEVICE Divisor one_of(bool second, const Divisor& a, const Divisor& b) {
        Divisor chosen = a;
        chosen.value = second ? b.value : a.value;
        chosen.inverse = second ? b.inverse : a.inverse;
        chosen.divides = second ? b.divides : a.divides;
        return chosen;
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
        if (!divisor.divides) return divide(divisor.value, divisor.inverse);
#pragma unroll
        for (i32 i = 0; i < kChunkValues; ++i) values[i] /= divisor.value;
    }

    MLA_DEVICE void divide(f32 divisor, f32 inverse) {
#pragma unroll
        for (i32 i = 0; i < kChunkValues; ++i) values[i] = Divisor::corrected(values[i], divisor, inverse);
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
MLA_DEVICE u32 largest_of_block(u32 number) {
#pragma unroll
    for (i32 distance = 1; distance < kBlockLanes; distance *= 2)
        number = max(number, __shfl_xor_sync(kFullWarp, number, distance));
    return number;
}

// Of the block that a chunk is in, its largest finite magnitude, and whether it has a NaN.
struct BlockRange {
    f32 largest;
    bool nan;

    explicit MLA_DEVICE BlockRange(uint4 words) : nan(false) {
        u32 bits = largest_of_block(largest_magnitude(words));
        if (__any_sync(kFullWarp, bits >= kInfinity)) {
            nan = bits > kInfinity;
            words = {without_infinite(words.x), without_infinite(words.y), without_infinite(words.z), without_infinite(words.w)};
            bits = largest_of_block(largest_magnitude(words));
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
MLA_DEVICE Chunk scaled(u8* scales, uint4 words, i32 place, bool there) {
    const BlockRange range(words);
    const i32 block = place / kBlockLanes;
    const bool stores = there && place % kBlockLanes == 0;
    Chunk chunk(words);
    if constexpr (kScales == kScalesE4m3) {
        const u32 code = scale_code(range);
        const f32 scale = value_of_e4m3(code);
        chunk.divide(scale, __frcp_rn(scale));
        if (stores) scales[block] = static_cast<u8>(code);
    } else {
        const u32 exponent = scale_exponent(range.largest);
        chunk.multiply(power_of_two(kTwiceBias - exponent));
        if (stores && kScales == kScalesE8m0) scales[block] = static_cast<u8>(exponent);
        if (stores && kScales == kScalesFloat32) reinterpret_cast<f32*>(scales)[block] = power_of_two(exponent);
    }
    return chunk;
}

MLA_DEVICE uint4 plain(uint4 words) {
    if constexpr (kSameType<Row, Bf16>) return words;
    return Chunk(words).as_bf16();
}

MLA_DEVICE void store(u8* target, i32 place, const Chunk& chunk) {
    if constexpr (kCodes == kCodesE2m1)
        reinterpret_cast<u32*>(target)[place] = chunk.as_e2m1();
    else
        reinterpret_cast<uint2*>(target)[place] = chunk.as_e4m3();
}

}  // namespace mla

// Grid: a warp for every `tokens_per_warp` tokens; blocks of (32 lanes, blockDim.y warps).
extern "C" __global__ void mla_quantise(const __grid_constant__ mla::BlocksParams params) {
    using namespace mla;
    WarpTokens tokens(params.places);
    if (tokens.count() <= 0) return;
    const i32 lane = static_cast<i32>(threadIdx.x), heads = params.places.num_heads_kv, chunks = chunks_of(params);

    // Rows are read a round ahead, the first ones while it is looked up where the tokens go.
    uint4 words[kChunksInFlight], next_words[kChunksInFlight];
    const auto load = [&](const Round& round, uint4 (&loaded)[kChunksInFlight]) {
        const TokenRows rows(params, tokens.token(round.index), round.head);
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) {
            const i32 chunk = round.first + lane + i * kLanes;
            loaded[i] = chunk < chunks ? *rows.chunk(ChunkPlace(params, chunk)) : uint4{0, 0, 0, 0};
        }
    };
    Round round;
    load(round, words);
    tokens.find(params.places);
    const Divisor latent(given_scale(params, 0)), rope(given_scale(params, 1));
    while (round.index < tokens.count()) {
        Round next = round;
        next.advance(chunks, heads);
        if (next.index < tokens.count()) load(next, next_words);
        const CachePlace place = tokens.place(round.index);
        if (place.page != kNoPage) {
            u8* const scales = token_scales(params, place);
            u8* const targets[2] = {cache_row(params.segments[0], place, round.head),
                                    cache_row(params.segments[1], place, round.head)};
#pragma unroll
            for (i32 i = 0; i < kChunksInFlight; ++i) {
                const i32 of_lane_0 = round.first + i * kLanes;
                if (of_lane_0 >= chunks) break;  // all lanes stay together: they exchange values
                const ChunkPlace at(params, of_lane_0 + lane);
                const bool there = of_lane_0 + lane < chunks;
                u8* const target = at.second ? targets[1] : targets[0];
                if constexpr (kScales == kScalesGiven) {
                    Chunk chunk(words[i]);
                    chunk.divide(Divisor::one_of(at.second, latent, rope));
                    if (there) store(target, at.in_segment, chunk);
                } else {
                    if (of_lane_0 < params.segments[0].chunks) {
                        const Chunk chunk = scaled(scales, words[i], at.in_segment, there && !at.second);
                        if (there && !at.second) store(target, at.in_segment, chunk);
                    }
                    if (there && at.second) reinterpret_cast<uint4*>(target)[at.in_segment] = plain(words[i]);
                }
            }
        }
#pragma unroll
        for (i32 i = 0; i < kChunksInFlight; ++i) words[i] = next_words[i];
        round = next;
    }
}
