// Which scales and values fp16 operands hold as they are. A token with others has a unit (decode/gathered_fp8/token_unit.h).
#pragma once
#include "core/types.h"
#include "ptx/convert_fp8.h"

namespace mla {

constexpr f32 kLargestCode = 448.0f;

// What fp16 operands hold of a block with such a scale: no value is too large, and none so small that bits are lost which
// bf16 would keep of the block's largest. Not NaN.
constexpr f32 kSmallestFp16Scale = 1.0f / 16384, kLargestFp16Scale = 146.0f;
MLA_DEVICE bool fits_fp16(f32 scale) {
    const f32 magnitude = fabsf(scale);
    return (magnitude >= kSmallestFp16Scale && magnitude <= kLargestFp16Scale) || magnitude == 0.0f;
}

// Whether both 16-bit numbers of a word are at most `limit`.
MLA_DEVICE bool both_at_most(u32 pair, u32 limit) {
    const u32 limits = limit * 0x00010001u;
    return max_u16_pairs(pair, limits) == limits;
}

}  // namespace mla
