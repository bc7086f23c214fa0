// Which keys a query row may see.
#pragma once
#include "decode/rows.h"

namespace mla {

// Keys before this index are visible to a query token of the request. Of a shard they may be fewer than there are: each later
// query token sees one key more or, where that key lies on another rank, no more.
MLA_DEVICE i32 surely_visible_end(const BlockWork& work, i32 token) {
    return kCausal ? work.seqlen_k - work.seqlen_q + token + 1 : work.seqlen_k;
}

// Keys from this index on are not visible to a query token.
MLA_DEVICE i32 visible_end(const BlockWork& work, i32 token) {
    if constexpr (kSharded)
        return unpack_shard(work.shard).count(max_i32(work.total_k - work.seqlen_q + token + 1, 0));
    else
        return surely_visible_end(work, token);
}

// The same of a row. Padding rows have tokens past the last one; they see no more than there is.
template <class Params>
MLA_DEVICE i32 row_visible_end(const Params& params, const BlockWork& work, i32 row_in_block) {
    const i32 token = kCausal ? locate_row(params, work, row_in_block).token : 0;
    return min_i32(visible_end(work, token), work.seqlen_k);
}

// Keys before this index are visible to all rows of the block: its first row sees the fewest. Not an end, but for a shard.
template <class Params>
MLA_DEVICE i32 block_visible_end(const Params& params, const BlockWork& work) {
    return surely_visible_end(work, kCausal ? work.first_row / params.group_heads : 0);
}

}  // namespace mla
