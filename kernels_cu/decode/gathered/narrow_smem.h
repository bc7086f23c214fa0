// Shared memory of the narrow kernel for gathered tokens. cupy_mla/kernels adds up the same sizes.
#pragma once
#include "decode/claim.h"
#include "decode/gathered/cluster.h"
#include "decode/gathered/narrow_schedule.h"
#include "decode/gathered/narrow_softmax.h"
#include "decode/gathered/turn_softmax.h"
#include "ptx/mbarrier.h"

namespace mla {

struct GatheredNarrowSmem {
    static constexpr u32 query_bytes = kRowsAlongM ? 0 : kTileBoxes * kRowBoxBytes;
    static constexpr u32 probability_bytes = kBuffers * kRowBoxBytes;
    static constexpr u32 rows_bytes = kRows * sizeof(f32);  // one value of each row
    static constexpr u32 exchange_bytes = kRowsAlongM ? 0 : kWarpgroupWarps * rows_bytes;
    static constexpr u32 factor_bytes = kBuffers * kRows * sizeof(f32);
    static constexpr u32 buffer_barriers = 3 * kBuffers;
    static constexpr u32 handed_bytes = kHandedItems * kHandedValues * rows_bytes;
    static constexpr u32 turn_barriers = kScoresWarpgroups + 2;
    static constexpr u32 turn_bytes = kTakesTurns ? turn_barriers * sizeof(u64) + rows_bytes + handed_bytes : 0;
    static constexpr u32 rescales_bytes = (kRowsAlongM ? kWarpgroupWarps : 1) * sizeof(u32);  // of a buffer
    static constexpr u32 zeros_bytes = 16;
    static constexpr u32 row_bytes = kRowsAlongM ? zeros_bytes + kRowValues * rows_bytes : 0;
    static constexpr u32 fixed_bytes = query_bytes + probability_bytes + kScoresWarpgroups * exchange_bytes +
                                       2 * factor_bytes + buffer_barriers * sizeof(u64) + kBuffers * rescales_bytes +
                                       turn_bytes + row_bytes + kClaimBytes;
    static constexpr u32 valid_bytes = kLoaderWarps * sizeof(u32);
    static constexpr u32 group_barriers = (2 + kGroupFrees) / 2 * 2;  // of which one may be unused: what follows is read 16 bytes at once
    static constexpr u32 group_bytes = kGroupBytes + group_barriers * sizeof(u64) + valid_bytes;
    static constexpr u32 fitting_groups = (kSharedBytes - fixed_bytes) / group_bytes;
    static constexpr u32 groups = MLA_PLANNED && kRingGroups < fitting_groups ? kRingGroups : fitting_groups;

    static constexpr u32 ring = 0;
    static constexpr u32 query = ring + groups * kGroupBytes;
    static constexpr u32 probabilities = query + query_bytes;          // P^T [kRows][64 tokens] of each buffer
    static constexpr u32 exchange = probabilities + probability_bytes;  // one value per (scores warp, row)
    // By which O is rescaled before a tile's PV, for each buffer.
    static constexpr u32 factors = exchange + kScoresWarpgroups * exchange_bytes;
    static constexpr u32 inverse_sums = factors + factor_bytes;  // after an item's last tile, for the buffer of that tile
    static constexpr u32 full = inverse_sums + factor_bytes;
    static constexpr u32 empty = full + groups * sizeof(u64);
    static constexpr u32 probabilities_full = empty + groups * (group_barriers - 1) * sizeof(u64);
    static constexpr u32 probabilities_empty = probabilities_full + kBuffers * sizeof(u64);
    static constexpr u32 sums_full = probabilities_empty + kBuffers * sizeof(u64);
    static constexpr u32 valid = sums_full + kBuffers * sizeof(u64);  // bits of each loader warp's tokens, at a tile's first group
    static constexpr u32 rescales = valid + groups * valid_bytes;     // whether any factor of a buffer is not 1
    static constexpr u32 zeros = rescales + kBuffers * rescales_bytes;  // a row of a matrix, of rows along M
    static constexpr u32 row_values = kRowsAlongM ? zeros + zeros_bytes : query;  // in a cluster; all QK is done when they are known
    static constexpr u32 turns = zeros + row_bytes;  // barrier of each scores warpgroup's turn
    static constexpr u32 query_full = turns + kScoresWarpgroups * sizeof(u64);
    static constexpr u32 query_empty = query_full + sizeof(u64);
    static constexpr u32 maxima = query_empty + sizeof(u64);  // of each row, as of the last tile
    static constexpr u32 handed = maxima + rows_bytes;        // of every other item
    static constexpr u32 claim = turns + turn_bytes;
    static constexpr u32 total = claim + kClaimBytes;
};
using Smem = GatheredNarrowSmem;
static_assert(Smem::turns % sizeof(u64) == 0, "barriers are aligned");
static_assert(Smem::total <= kSharedBytes && Smem::groups >= kTileGroups, "a tile must fit in the ring");
static_assert(Smem::query % kSwizzleAtomBytes == 0 && Smem::probabilities % kSwizzleAtomBytes == 0,
              "the swizzle is a function of the address: boxes start at its period");
static_assert(!kRowsAlongM || Smem::groups >= 2 * kTileGroups, "P of a tile may wait for groups of the next");
static_assert(!kIsClustered || kSharedRowsBytes <= Smem::query, "the output lies where the ring was");
static_assert(!kRowsAlongM || (Smem::valid % 16 == 0 && Smem::rescales % 16 == 0 && Smem::zeros % 16 == 0), "read 16 bytes at once");
static_assert(Smem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

MLA_DEVICE f32* row_value(u32 which, i32 row_in_block) {
    return reinterpret_cast<f32*>(shared_begin() + Smem::row_values) + which * kRows + row_in_block;
}

// Position in the ring of groups. All roles walk the same sequence of tiles; a tile's groups follow one another and may wrap
// round.
struct GroupRing {
    u32 first = 0;   // place of the tile's first group
    u32 parity = 0;  // of the lap that place is in

    struct Place {
        u32 index, parity;
    };
    MLA_DEVICE Place place(u32 group) const {
        const u32 index = first + group;
        return index < Smem::groups ? Place{index, parity} : Place{index - Smem::groups, parity ^ 1};
    }
    MLA_DEVICE void advance() { skip(kTileGroups); }
    MLA_DEVICE void skip_query() {
        if constexpr (kQueryGroups > 0) skip(kQueryGroups);
    }

private:
    MLA_DEVICE void skip(u32 groups) {
        const Place next = place(groups);
        first = next.index;
        parity = next.parity;
    }
};

MLA_DEVICE u32 box_address(u32 smem, const GroupRing& ring, u32 box) {
    return smem + Smem::ring + ring.place(box / kGroupBoxes).index * kGroupBytes + box % kGroupBoxes * kBoxBytes;
}

// Barriers of a group's place, of a buffer. Who arrives, who waits:
// full: every loader thread's copies (cp.async.mbarrier.arrive) and one lane of each loader warp, for the bits; scores. Also of
// groups of Q.
MLA_DEVICE u32 full_barrier(u32 smem, u32 place) { return smem + Smem::full + place * sizeof(u64); }
constexpr u32 kFullArrivals = kLoaderWarps * (kWarpThreads + 1);
// empty, of each part of a group that is freed by itself: one lane of each values warp for all, once its PV has read it (QK has
// before, or there would be no P), or every values thread, once it has read the output that was staged there; of Q every scores thread;
// loaders.
MLA_DEVICE u32 empty_barrier(u32 smem, u32 place, u32 freed = 0) {
    return smem + Smem::empty + (place * kGroupFrees + freed) * static_cast<u32>(sizeof(u64));
}
// Those of NarrowSoftmax:
MLA_DEVICE u32 probabilities_full_barrier(u32 smem, u32 buffer) { return smem + Smem::probabilities_full + buffer * sizeof(u64); }
MLA_DEVICE u32 probabilities_empty_barrier(u32 smem, u32 buffer) {
    return smem + Smem::probabilities_empty + buffer * sizeof(u64);
}
MLA_DEVICE u32 sums_full_barrier(u32 smem, u32 buffer) { return smem + Smem::sums_full + buffer * sizeof(u64); }
// Of a buffer: whether any factor is not 1. A word, or one of each scores warp.
MLA_DEVICE u32 rescales(u32 smem, u32 buffer) { return smem + Smem::rescales + buffer * Smem::rescales_bytes; }
// Those of TurnSoftmax. Of prefill, query_full: every loader thread's copies of an item's Q; scores. query_empty: one lane of each warp
// of both scores warpgroups, once its last QK of the item is done; loaders.
MLA_DEVICE u32 query_full_barrier(u32 smem) { return smem + Smem::query_full; }
MLA_DEVICE u32 query_empty_barrier(u32 smem) { return smem + Smem::query_empty; }

MLA_DEVICE void initialise_barriers(u32 smem) {
    for (u32 group = 0; group < Smem::groups; ++group) {
        mbarrier_init(full_barrier(smem, group), kFullArrivals);
        for (u32 i = 0; i < kGroupFrees; ++i) mbarrier_init(empty_barrier(smem, group, i), kWarpgroupThreads);
    }
    for (u32 buffer = 0; buffer < kBuffers; ++buffer) {
        mbarrier_init(probabilities_full_barrier(smem, buffer), kRowsAlongM ? kWarpgroupThreads : kProbabilityArrivals);
        mbarrier_init(probabilities_empty_barrier(smem, buffer), kWarpgroupWarps);
        mbarrier_init(sums_full_barrier(smem, buffer), kRowsAlongM ? kRows : kRowLanes);
    }
    if constexpr (kTakesTurns) {
        for (u32 which = 0; which < kScoresWarpgroups; ++which) mbarrier_init(smem + Smem::turns + which * sizeof(u64), kRowLanes);
        mbarrier_init(query_full_barrier(smem), kLoaderWarps * kWarpThreads);
        mbarrier_init(query_empty_barrier(smem), kScoresWarpgroups * kWarpgroupWarps);
    }
    if (kRowsAlongM) store_shared_16b(smem + Smem::zeros, uint4{0, 0, 0, 0});
    mbarrier_init_fence();
}

}  // namespace mla
