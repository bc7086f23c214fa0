// Which keys a query row may see.
#pragma once
#include "decode/rows.h"

namespace mla {

// Keys before this index are visible to a query token of the request.
MLA_DEVICE i32 visible_end(const BlockWork& work, i32 token) {
    return kCausal ? work.seqlen_k - work.seqlen_q + token + 1 : work.seqlen_k;
}

// The same of a row. Padding rows have tokens past the last one; they see no more than there is.
template <class Params>
MLA_DEVICE i32 row_visible_end(const Params& params, const BlockWork& work, i32 row_in_block) {
    const i32 token = kCausal ? locate_row(params, work, row_in_block).token : 0;
    return min_i32(visible_end(work, token), work.seqlen_k);
}

// Keys before this index are visible to all rows of the block: its first row sees the fewest.
template <class Params>
MLA_DEVICE i32 block_visible_end(const Params& params, const BlockWork& work) {
    return visible_end(work, kCausal ? work.first_row / params.group_heads : 0);
}

}  // namespace mla
