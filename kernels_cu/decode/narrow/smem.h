// Shared memory of the narrow kernel. cupy_mla/kernels adds up the same sizes and passes the total.
#pragma once
#include "decode/claim.h"
#include "decode/narrow/schedule.h"
#include "decode/narrow/swapped.h"

namespace mla {

static_assert(kTileBoxes <= kWarpThreads, "one lane per box of a tile waits for and releases slots");

struct NarrowSmem {
    static constexpr u32 query_bytes = kTileBoxes * kRowBoxBytes;
    static constexpr u32 probability_bytes = kProbabilityBuffers * kRowBoxBytes;  // P^T [kRows][64 tokens]
    static constexpr u32 exchange_bytes = kConsumerWarps * kRows * sizeof(f32);
    static constexpr u32 slot_bytes = kBoxBytes + 2 * sizeof(u64);  // a KV box and its two barriers
    static constexpr u32 slots = (kSharedBytes - query_bytes - probability_bytes - exchange_bytes - kClaimBytes) / slot_bytes;

    static constexpr u32 ring = 0;
    static constexpr u32 query = ring + slots * kBoxBytes;  // between items: the output on its way to global memory
    static constexpr u32 probabilities = query + query_bytes;
    static constexpr u32 exchange = probabilities + probability_bytes;  // one value per (consumer warp, row)
    static constexpr u32 full = exchange + exchange_bytes;
    static constexpr u32 empty = full + slots * sizeof(u64);
    static constexpr u32 claim = empty + slots * sizeof(u64);  // the part that this CTA has claimed
    static constexpr u32 total = claim + kClaimBytes;
};
static_assert(NarrowSmem::total <= kSharedBytes, "the narrow kernel's shared memory does not fit");
static_assert(NarrowSmem::slots >= kTileBoxes, "a tile must fit in the ring");
static_assert(NarrowSmem::query % kSwizzleAtomBytes == 0 && NarrowSmem::probabilities % kSwizzleAtomBytes == 0,
              "the swizzle is a function of the address: boxes start at its period");
static_assert(NarrowSmem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

// Position in the ring of KV boxes. The producer and the consumers walk the same sequence of tiles; a tile's boxes take
// consecutive slots and may wrap round.
struct BoxRing {
    u32 first = 0;   // slot of the tile's first box
    u32 parity = 0;  // of the lap that slot is in

    struct Slot {
        u32 index, parity;
    };
    MLA_DEVICE Slot slot(u32 box) const {
        const u32 index = first + box;
        return index < NarrowSmem::slots ? Slot{index, parity} : Slot{index - NarrowSmem::slots, parity ^ 1};
    }
    MLA_DEVICE void advance() {
        const Slot next = slot(kTileBoxes);
        first = next.index;
        parity = next.parity;
    }
};

MLA_DEVICE u32 box_address(u32 smem, u32 slot) { return smem + NarrowSmem::ring + slot * kBoxBytes; }
// Of slot s. Arrives: the producer's lane that serves the slot, with the bytes to come, then TMA's bytes.
// Waits: every consumer thread, before its first wgmma on the box.
MLA_DEVICE u32 full_barrier(u32 smem, u32 slot) { return smem + NarrowSmem::full + slot * sizeof(u64); }
// Of slot s. Arrives: one lane of each consumer warp, once that warp's wgmmas have read the box for the last time.
// Waits: the producer's lane that serves the slot, before it announces the next lap's bytes.
MLA_DEVICE u32 empty_barrier(u32 smem, u32 slot) { return smem + NarrowSmem::empty + slot * sizeof(u64); }
constexpr u32 kFullArrivals = 1;
constexpr u32 kEmptyArrivals = kConsumerWarps;

}  // namespace mla
