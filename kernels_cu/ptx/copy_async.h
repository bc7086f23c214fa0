// cp.async: a thread asks for 16 bytes from global to shared memory, past its registers and past L1, or for 8 past its
// registers.
// PTX ISA, "cp.async", "cp.async.mbarrier.arrive".
#pragma once
#include "core/types.h"

namespace mla {

// Only the first `bytes` are read, the rest is filled with zeros. kWholeLines: L2 fetches 256 bytes around them.
template <bool kWholeLines>
MLA_DEVICE void copy_async_16b(u32 destination, const void* source, u32 bytes) {
    if (kWholeLines)
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
                     : "memory");
}

// 8 bytes, through L1.
MLA_DEVICE void copy_async_8b(u32 destination, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(destination), "l"(source) : "memory");
}

// Until everything that this thread has asked for is there.
MLA_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A hint: brings the line of an address to L2.
MLA_DEVICE void prefetch_to_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory"); }

// Arrives on the barrier once everything this thread has asked for is in shared memory. The barrier counts this arrival like
// any other.
MLA_DEVICE void copy_async_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace mla
