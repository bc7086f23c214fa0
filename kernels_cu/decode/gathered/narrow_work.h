// How the roles of the narrow kernel for gathered tokens walk the items, and what prefill is asked for besides out and lse.
#pragma once
#include "decode/gathered/work.h"

namespace mla {

// The first item from `item` on that has tiles for this CTA; without tiles if there is none. `item` is then the one after it.
MLA_DEVICE BlockWork next_work(const GatherParams& params, const Items& items, i32& item) {
    while (item < items.end()) {
        const BlockWork work = load_block_work(params, item);
        item += items.step();
        if (work.has_tiles()) return work;
    }
    return BlockWork{};
}

// Of a row that exists or not. Natural logarithm; -inf: no token.
MLA_DEVICE void store_max_logit(const GatherParams& params, const BlockWork& work, i32 row_in_block, f32 logit) {
    if (kIsPlanned || params.max_logits == nullptr || !row_exists(work, row_in_block)) return;
    *max_logit(params, work, row_in_block) = logit;
}

}  // namespace mla
