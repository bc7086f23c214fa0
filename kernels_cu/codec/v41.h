// The layouts fp8_v41 and fp4_v41 of cupy_mla/layouts/table.py: a token's codes, then its scales.
#pragma once
#include "codec/e4m3.h"
#include "codec/e8m0.h"
#include "ptx/convert.h"
#include "ptx/convert_fp4.h"
#include "ptx/warp.h"

namespace mla {

// Of codecs of e2m1 values: two steps to a word.
struct E2m1Codes {
    static constexpr bool kNeedsUnits = false;
    static constexpr u32 kLaneWords = 2;

    static MLA_DEVICE void pairs(const u32 (&words)[kLaneWords], u32 step, u32 (&pairs)[2]) {
        e2m1_quad(words[step / 2] >> step % 2 * 16, pairs);
    }
};

// e4m3 values, each 32 with a scale in e8m0.
struct V41 : E4m3Codes {
    static constexpr u32 kCoded = 512;
    static constexpr u32 kUncoded = 0;
    static constexpr bool kHasScales = true;
    static constexpr u32 kScales = 16;
    static constexpr u32 kScalesOffset = kCoded;
    static constexpr u32 kScaleBytes = kScales;
    static constexpr u32 kNoScales = kE8m0Ones;
    static constexpr u32 kUncodedOffset = kScalesOffset + kScales;
    static constexpr u32 kRowBytes = kUncodedOffset;
    static constexpr u32 kPageEndBytes = 0;

    // Two of each box: of columns 0 to 31, which lanes 0 and 1 of a quad have, and of the others.
    static MLA_DEVICE void load_scales(u32 row, u32 lane_in_quad, f32 (&scales)[kScales / 2]) {
        u32 words[4];
        load_shared_words(row + kScalesOffset, words);
#pragma unroll
        for (u32 box = 0; box < kScales / 2; ++box)
            scales[box] = e8m0_to_float(words[box / 2] >> (box % 2 * 16 + lane_in_quad / 2 * 8) & 0xFF);
    }

    static MLA_DEVICE f32 scale(const u32 (&stored)[4], u32 i) { return e8m0_to_float(stored[i / 4] >> i % 4 * 8 & 0xFF); }

    static MLA_DEVICE bool fp16_scales(const u32 (&stored)[4], u32 (&pairs)[8]) { return e8m0_fp16_scales(stored, pairs); }
};

// e2m1 values, the one with an even index in the low half of a byte, each 16 with a scale in e4m3: those that a lane has of a box.
struct Fp4V41 : E2m1Codes {
    static constexpr u32 kCoded = 512;
    static constexpr u32 kUncoded = 0;
    static constexpr bool kHasScales = true;
    static constexpr u32 kScales = 32;
    static constexpr u32 kScalesOffset = kCoded / 2;
    static constexpr u32 kScaleBytes = kScales;
    static constexpr u32 kNoScales = 0;
    static constexpr u32 kUncodedOffset = kScalesOffset + kScales;
    static constexpr u32 kRowBytes = kUncodedOffset;
    static constexpr u32 kPageEndBytes = 0;

    static MLA_DEVICE void load_scales(u32 row, u32 lane_in_quad, f32 (&scales)[kScales / 4]) {
        u32 words[2][4];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) load_shared_words(row + kScalesOffset + half * 16, words[half]);
#pragma unroll
        for (u32 box = 0; box < kScales / 4; ++box) {
            f32 none;
            unpack2<Fp16>(e4m3_pair_low(words[box / 4][box % 4] >> lane_in_quad * 8), scales[box], none);
        }
    }

    // An e2m1 times an e4m3 is an fp16: from 2^-10 to 2,688.
    static MLA_DEVICE bool fp16_scales(const u32 (&stored)[8], u32 (&pairs)[16]) {
#pragma unroll
        for (u32 i = 0; i < 16; ++i)
            pairs[i] = e4m3_pair_low(__byte_perm(stored[i / 4], stored[i / 4 + 4], i % 4 | (i % 4 + 4) << 4));
        return true;
    }
};

}  // namespace mla
