// Rows of 16-bit values to codes and scales: the arithmetic of quantise.cu. A lane takes 16 values at a time.
// cupy_mla.layouts has the same in NumPy.
#pragma once
#include "cache/blocks.h"
#include "ptx/convert.h"
#include "ptx/convert_fp4.h"
#include "ptx/convert_fp8.h"

namespace mla {

constexpr i32 kCodedChunks = 2;  // a lane's in a round: 16 values
constexpr i32 kBlockLanes = kBlock / (kCodedChunks * kChunkValues);
static_assert(kBlockLanes > 0 && (kBlockLanes & (kBlockLanes - 1)) == 0 && kBlockLanes <= kTokenLanes,
              "blocks lie within the lanes of a token");

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

    template <bool kDivides>
    MLA_DEVICE void divide(const Divisor& by) {
#pragma unroll
        for (i32 i = 0; i < kChunkValues; ++i)
            values[i] = kDivides ? values[i] / by.value : Divisor::corrected(values[i], by.value, by.inverse);
    }

    MLA_DEVICE void multiply(f32 factor) {
#pragma unroll
        for (i32 i = 0; i < kChunkValues; ++i) values[i] *= factor;
    }

    MLA_DEVICE void codes(u32 (&words)[kCodeBytes / 4]) const {
        if constexpr (kCodes == kCodesE2m1) {
            words[0] = pack_e2m1(values);
        } else {
            words[0] = pack_e4m3(values[0], values[1], values[2], values[3]);
            words[1] = pack_e4m3(values[4], values[5], values[6], values[7]);
        }
    }

    MLA_DEVICE uint4 as_bf16() const {
        u32 pairs[kChunkValues / 2];
#pragma unroll
        for (i32 i = 0; i < kChunkValues / 2; ++i) pairs[i] = pack2<Bf16>(values[2 * i], values[2 * i + 1]);
        return {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
};

// What a lane takes in a round.
struct Words {
    uint4 chunks[kCodedChunks];
};

// Bits of the larger magnitudes of 8 values in each half: as integers they are in the order of their values, infinity and NaN at
// the end.
MLA_DEVICE u32 larger_magnitudes(uint4 words) {
    const u32 low = max_u16_pairs(words.x & kMagnitudes, words.y & kMagnitudes);
    const u32 high = max_u16_pairs(words.z & kMagnitudes, words.w & kMagnitudes);
    return max_u16_pairs(low, high);
}

MLA_DEVICE u32 largest_magnitude(const Words& words) {
    const u32 pair = max_u16_pairs(larger_magnitudes(words.chunks[0]), larger_magnitudes(words.chunks[1]));
    return max(pair & 0xFFFF, pair >> 16);
}

MLA_DEVICE u32 without_infinite(u32 pair) {
    const u32 low = pair & 0xFFFF, high = pair >> 16;
    return ((low & 0x7FFF) < kInfinity ? low : 0) | ((high & 0x7FFF) < kInfinity ? high : 0) << 16;
}

MLA_DEVICE uint4 without_infinite(uint4 words) {
    return {without_infinite(words.x), without_infinite(words.y), without_infinite(words.z), without_infinite(words.w)};
}

// The largest of a number of each of the lanes that share a scale. All lanes of the warp are there.
MLA_DEVICE u32 largest_of_block(u32 number) {
#pragma unroll
    for (i32 distance = 1; distance < kBlockLanes; distance *= 2)
        number = max(number, __shfl_xor_sync(kFullWarp, number, distance));
    return number;
}

// Of the block that a lane's values are in, its largest finite magnitude, and whether it has a NaN.
struct BlockRange {
    f32 largest;
    bool nan;

    explicit MLA_DEVICE BlockRange(const Words& words) : nan(false) {
        u32 bits = largest_of_block(largest_magnitude(words));
        if (__any_sync(kFullWarp, bits >= kInfinity)) {
            nan = bits > kInfinity;
            bits = largest_of_block(largest_magnitude({without_infinite(words.chunks[0]), without_infinite(words.chunks[1])}));
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

// The scale of a lane's block, which the block's first lane stores; what to multiply the block's values by. Of a block that
// does not exist 0 is stored.
MLA_DEVICE f32 settle_scale(u8* scales, i32 block, const Words& words, bool stores, bool exists) {
    const BlockRange range(words);
    if constexpr (kScales == kScalesE4m3) {
        const u32 code = scale_code(range);
        if (stores) scales[block] = static_cast<u8>(code);
        return __frcp_rn(value_of_e4m3(code));  // not of the exact quotient; pack_e2m1 says why that is enough
    } else {
        const u32 exponent = scale_exponent(range.largest);
        if (stores && kScales == kScalesE8m0) scales[block] = exists ? static_cast<u8>(exponent) : 0;
        if (stores && kScales == kScalesFloat32) reinterpret_cast<f32*>(scales)[block] = power_of_two(exponent);
        return power_of_two(kTwiceBias - exponent);
    }
}

MLA_DEVICE uint4 plain(uint4 words) {
    if constexpr (kSameType<Row, Bf16>) return words;
    return Chunk(words).as_bf16();
}

// A lane's codes of a round, as one word of twice the size where the cache allows it.
struct Coded {
    static constexpr i32 kWords = kCodeBytes / 4;
    u32 words[kCodedChunks][kWords];

    MLA_DEVICE void store(u8* target, bool wide, i32 chunks) const {
        if (wide && chunks >= kCodedChunks) {
            if constexpr (kWords == 1)
                *reinterpret_cast<uint2*>(target) = {words[0][0], words[1][0]};
            else
                *reinterpret_cast<uint4*>(target) = {words[0][0], words[0][1], words[1][0], words[1][1]};
            return;
        }
#pragma unroll
        for (i32 chunk = 0; chunk < kCodedChunks; ++chunk) {
            if (chunk >= chunks) return;
            if constexpr (kWords == 1)
                reinterpret_cast<u32*>(target)[chunk] = words[chunk][0];
            else
                reinterpret_cast<uint2*>(target)[chunk] = {words[chunk][0], words[chunk][1]};
        }
    }
};

// Whether a lane's codes of a round begin at multiples of their size.
MLA_DEVICE bool has_aligned_units(const AppendSegment& segment) {
    const u64 places = reinterpret_cast<u64>(segment.cache) | segment.cache_page_stride | segment.cache_token_stride |
                       segment.cache_head_stride;
    return (places & (kCodedChunks * kCodeBytes - 1)) == 0;
}

}  // namespace mla
