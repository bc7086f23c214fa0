// Where the rows of a block lie among the 64 of its matrices.
#pragma once
#include "decode/work_item.h"

namespace mla {

// The row at a place: one after the other; of a refined block (decode/work_item.h) eight, then eight places of what is left out
// of them, as a thread holds places eight apart. Those are rows that do not exist.
MLA_DEVICE i32 row_at(const BlockWork& work, i32 place) {
    constexpr i32 kGroup = 8;
    if (!kRefines || !work.is_refined()) return place;
    const i32 row = place / (2 * kGroup) * kGroup + place % kGroup;
    return place % (2 * kGroup) < kGroup ? row : row + static_cast<i32>(kRows);
}

}  // namespace mla
