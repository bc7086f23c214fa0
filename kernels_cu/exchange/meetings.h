// How kernels of all ranks of a host meet: CTA by CTA. Each tells those of its number on the other ranks that what it stored
// for them is there, and waits until they have told the same. All CTAs of a kernel have to find room at once.
#pragma once
#include "ptx/system.h"

namespace mla {

constexpr i32 kExchangeThreads = 512;  // at most, and no fewer than there are ranks

// cupy_mla/kernels/structs.py mirrors it; a test compares the two.
struct Meetings {
    const u64* memories;  // [world] where each rank's memory lies
    i64 flags;            // from there, in bytes: u32 [CTAs, world], the last meeting that each rank's CTA came to
    // [CTAs] of this rank alone: kernels that have met here. May be read ahead of pdl_wait: between two kernels that count in the
    // same places is one that does not let the next start before it has ended.
    u32* calls;
    i32 world, rank;

    MLA_DEVICE u8* memory_of(i32 other) const { return reinterpret_cast<u8*>(memories[other]); }

    // The flags of this CTA's number in a rank's memory.
    MLA_DEVICE u32* flags_of(i32 other) const {
        return reinterpret_cast<u32*>(memory_of(other) + flags) + blockIdx.x * world;
    }

    // The rank that is `turn` further: each begins with another.
    MLA_DEVICE i32 rank_after(i32 turn) const { return rank + turn < world ? rank + turn : rank + turn - world; }

    // Each other rank has a thread.
    MLA_DEVICE bool is_for_another() const {
        const i32 other = static_cast<i32>(threadIdx.x);
        return other < world && other != rank;
    }

    // All threads call it. The release is of all that the CTA stored before: the barrier puts it ahead of the flag.
    MLA_DEVICE void tell(u32 meeting) const {
        __syncthreads();
        if (is_for_another()) store_release_system(flags_of(threadIdx.x) + rank, meeting);
    }

    // All threads call it; afterwards they see what the others stored before they told. A rank may be further already, and
    // the number may have wrapped round.
    MLA_DEVICE void wait(u32 meeting) const {
        if (is_for_another()) {
            const u32* const flag = flags_of(rank) + threadIdx.x;
            while (static_cast<i32>(load_acquire_system(flag) - meeting) < 0) {
            }
        }
        __syncthreads();
    }

    // Behind a wait.
    MLA_DEVICE void count_call() const {
        if (threadIdx.x == 0) ++calls[blockIdx.x];
    }
};

MLA_DEVICE uint4 wait_for_packet(const Packet* packet, u32 meeting) {
    uint4 values;
    while (!load_packet(packet, values, meeting)) {
    }
    return values;
}

static_assert(sizeof(Meetings) == 3 * sizeof(i64) + 2 * sizeof(i32), "no padding");

}  // namespace mla
