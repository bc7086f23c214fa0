// The layout fp8_e4m3 of cupy_mla/layouts/table.py: e4m3 values of any widths, with one scale for the whole cache, a parameter.
#pragma once
#include "ptx/convert_fp8.h"

namespace mla {

// Of codecs of e4m3 values.
struct E4m3Codes {
    static constexpr bool kNeedsUnits = true;
    static constexpr u32 kLaneWords = 4;

    static MLA_DEVICE void pairs(const u32 (&words)[kLaneWords], u32 step, u32 (&pairs)[2]) {
        pairs[0] = e4m3_pair_low(words[step]);
        pairs[1] = e4m3_pair_high(words[step]);
    }
};

template <u32 kWidth>
struct E4m3Rows : E4m3Codes {
    static constexpr u32 kCoded = kWidth;
    static constexpr u32 kUncoded = 0;
    static constexpr bool kHasScales = false;
    static constexpr u32 kScales = 1;
    static constexpr u32 kScalesOffset = 0;  // there are none
    static constexpr u32 kScaleBytes = 0;
    static constexpr u32 kUncodedOffset = kCoded;
    static constexpr u32 kRowBytes = kCoded;
    static constexpr u32 kPageEndBytes = 0;

    static MLA_DEVICE void load_scales(u32, u32, f32 (&scales)[kScales]) { scales[0] = 1.0f; }
};

}  // namespace mla
