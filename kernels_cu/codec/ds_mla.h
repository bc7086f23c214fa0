// The layouts fp8_ds_mla and fp8_ds_mla_no_rope of cupy_mla/layouts/table.py: a token's e4m3 values, its four float32 scales,
// its bf16 values, one behind the other.
#pragma once
#include "codec/e4m3.h"
#include "codec/fp16_range.h"
#include "ptx/convert.h"
#include "ptx/warp.h"

namespace mla {

struct DsMla : E4m3Codes {
    static constexpr u32 kCoded = 512;
    static constexpr u32 kUncoded = 64;
    static constexpr bool kHasScales = true;
    static constexpr u32 kScales = 4;
    static constexpr u32 kScalesOffset = kCoded;
    static constexpr u32 kScaleBytes = kScales * sizeof(f32);
    static constexpr u32 kNoScales = 0;
    static constexpr u32 kUncodedOffset = kScalesOffset + kScaleBytes;
    static constexpr u32 kRowBytes = kUncodedOffset + kUncoded * 2;
    static constexpr u32 kPageEndBytes = 0;

    // From a row in shared memory.
    static MLA_DEVICE void load_scales(u32 row, u32, f32 (&scales)[kScales]) {
        u32 words[kScales];
        load_shared_words(row + kScalesOffset, words);
#pragma unroll
        for (u32 i = 0; i < kScales; ++i) scales[i] = __uint_as_float(words[i]);
    }

    static MLA_DEVICE f32 scale(const u32 (&stored)[kScales], u32 i) { return __uint_as_float(stored[i]); }

    static MLA_DEVICE bool fp16_scales(const u32 (&stored)[kScales], u32 (&pairs)[kScales / 2]) {
        bool fits = true;
#pragma unroll
        for (u32 i = 0; i < kScales / 2; ++i) {
            const f32 first = scale(stored, i), second = scale(stored, i + kScales / 2);
            fits &= fits_fp16(first) && fits_fp16(second);
            pairs[i] = pack2<Fp16>(first, second);
        }
        return fits;
    }
};

struct DsMlaNoRope : DsMla {
    static constexpr u32 kUncoded = 0;
    static constexpr u32 kRowBytes = kUncodedOffset;
};

}  // namespace mla
