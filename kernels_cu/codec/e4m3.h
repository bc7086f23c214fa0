// The layout fp8_e4m3 of cupy_mla/layouts/table.py: e4m3 values of any widths, with one scale for the whole cache, a parameter.
#pragma once
#include "core/types.h"

namespace mla {

template <u32 kWidth>
struct E4m3Rows {
    static constexpr u32 kCoded = kWidth;
    static constexpr u32 kUncoded = 0;
    static constexpr bool kHasScales = false;
    static constexpr u32 kScales = 1;
    static constexpr u32 kScalesOffset = 0;  // there are none
    static constexpr u32 kUncodedOffset = kCoded;
    static constexpr u32 kRowBytes = kCoded;

    static MLA_DEVICE void load_scales(u32, f32 (&scales)[kScales]) { scales[0] = 1.0f; }
};

}  // namespace mla
