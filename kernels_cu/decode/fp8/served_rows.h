// The rows that a scores warp serves at an item's end where all warps know all rows. They are chosen, not branched to: code that runs
// once waits for each line of it.
#pragma once
#include "decode/fp8/schedule.h"
#include "decode/narrow/swapped.h"

namespace mla {

constexpr u32 kServedRows = kThreadRows / kScoresWarps;  // of a thread's

MLA_DEVICE u32 served_row(u32 i, u32 warp, u32 lane) { return row_of_lane(lane, i * kScoresWarps + warp); }
MLA_DEVICE float served_value(u32 i, u32 warp, const float (&values)[kThreadRows]) {
    const float a = values[i * kScoresWarps], b = values[i * kScoresWarps + 1], c = values[i * kScoresWarps + 2],
                d = values[i * kScoresWarps + 3];
    const float even = warp % 2 ? b : a, odd = warp % 2 ? d : c;
    return warp / 2 % 2 ? odd : even;
}

}  // namespace mla
