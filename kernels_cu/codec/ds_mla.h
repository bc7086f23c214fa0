// The layouts fp8_ds_mla and fp8_ds_mla_no_rope of cupy_mla/layouts/table.py: a token's e4m3 values, its four float32 scales,
// its bf16 values, one behind the other.
#pragma once
#include "codec/e4m3.h"
#include "ptx/warp.h"

namespace mla {

struct DsMla : E4m3Codes {
    static constexpr u32 kCoded = 512;
    static constexpr u32 kUncoded = 64;
    static constexpr bool kHasScales = true;
    static constexpr u32 kScales = 4;
    static constexpr u32 kScalesOffset = kCoded;
    static constexpr u32 kUncodedOffset = kScalesOffset + kScales * sizeof(f32);
    static constexpr u32 kRowBytes = kUncodedOffset + kUncoded * 2;
    static constexpr u32 kPageEndBytes = 0;

    // From a row in shared memory.
    static MLA_DEVICE void load_scales(u32 row, u32, f32 (&scales)[kScales]) {
        u32 words[kScales];
        load_shared_words(row + kScalesOffset, words);
#pragma unroll
        for (u32 i = 0; i < kScales; ++i) scales[i] = __uint_as_float(words[i]);
    }
};

struct DsMlaNoRope : DsMla {
    static constexpr u32 kUncoded = 0;
    static constexpr u32 kRowBytes = kUncodedOffset;
};

}  // namespace mla
