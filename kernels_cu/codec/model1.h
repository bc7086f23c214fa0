// The layout fp8_model1 of cupy_mla/layouts/table.py: a token's e4m3 values and its bf16 values, one behind the other; at the end
// of its page, behind the rows of all tokens, eight bytes of each token, seven of which are scales in e8m0.
#pragma once
#include "codec/e4m3.h"
#include "codec/e8m0.h"
#include "ptx/warp.h"

namespace mla {

struct Model1 : E4m3Codes {
    static constexpr u32 kCoded = 448;
    static constexpr u32 kUncoded = 64;
    static constexpr bool kHasScales = true;
    static constexpr u32 kScales = 7;
    static constexpr u32 kUncodedOffset = kCoded;
    static constexpr u32 kRowBytes = kUncodedOffset + kUncoded * 2;
    static constexpr u32 kPageEndBytes = 8;
    static constexpr u32 kScalesOffset = kRowBytes;  // of no row: they are at the page's end
    static constexpr u32 kScaleBytes = kPageEndBytes;
    static constexpr u32 kNoScales = kE8m0Ones;

    // From a token's bytes of the page's end in shared memory.
    static MLA_DEVICE void load_scales(u32 page_end, u32, f32 (&scales)[kScales]) {
        u32 words[2];
        load_shared_words(page_end, words);
#pragma unroll
        for (u32 i = 0; i < kScales; ++i) scales[i] = scale(words, i);
    }

    static MLA_DEVICE f32 scale(const u32 (&stored)[2], u32 i) { return e8m0_to_float(stored[i / 4] >> i % 4 * 8 & 0xFF); }

    static MLA_DEVICE bool fp16_scales(const u32 (&stored)[2], u32 (&pairs)[4]) {
        const u32 words[2] = {stored[0], __byte_perm(stored[1], kE8m0Ones, 0x4210)};  // the eighth byte has no meaning
        return e8m0_fp16_scales(words, pairs);
    }
};

}  // namespace mla
