// The first items of a CTA's part, in shared memory: where each role looks an item up again as it comes to it, and once more for its
// results, that would else be a latency of L2 in a row with those of queries and tokens.
#pragma once
#include "decode/work_item.h"

#ifndef MLA_PART_ITEMS
#define MLA_PART_ITEMS 0
#endif

namespace mla {

constexpr i32 kPartItems = MLA_PART_ITEMS;  // how many are kept; of a part with more, the others are read from the plan

struct alignas(16) PartItems {
    i32 begin, end;  // of the part, in the plan
    i32 unused[2];
    int4 words[kPartItems > 0 ? 2 * kPartItems : 1];
};
static_assert(sizeof(WorkItem) == 2 * sizeof(int4), "an item is two words of 16 bytes");
constexpr u32 kPartItemsBytes = kPartItems > 0 ? sizeof(PartItems) : 0;  // the last bytes of shared memory

MLA_DEVICE PartItems* kept_items() {
    extern __shared__ __align__(1024) u8 dynamic_shared[];
    return reinterpret_cast<PartItems*>(dynamic_shared + MLA_SHARED_BYTES - kPartItemsBytes);
}

// All threads; a barrier must follow. `begin`: where the plan has the part's first item and the one past its last.
template <class Params>
MLA_DEVICE void keep_items(const Params& params, const i32* begin) {
    const i32 first = begin[0], end = begin[1];
    if (threadIdx.x == 0) {
        kept_items()->begin = first;
        kept_items()->end = end;
    }
    const i32 word = threadIdx.x;
    if (word < 2 * min_i32(kPartItems, end - first)) kept_items()->words[word] = planned_words(params, first)[word];
}

template <class Params>
MLA_DEVICE const int4* item_words(const Params& params, i32 item) {
    if constexpr (kPartItems > 0) {
        const i32 place = item - kept_items()->begin;
        if (place < kPartItems) return kept_items()->words + 2 * place;
    }
    return planned_words(params, item);
}

}  // namespace mla
