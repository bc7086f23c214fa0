// Which SM a CTA runs on, and how long that one takes for something.
// PTX ISA, "Special Registers: %smid, %clock"; "atom".
#pragma once
#include "core/types.h"

namespace mla {

MLA_DEVICE u32 current_sm() {
    u32 sm;
    asm volatile("mov.u32 %0, %smid;" : "=r"(sm));
    return sm;
}

MLA_DEVICE u32 clock_now() {
    u32 clock;
    asm volatile("mov.u32 %0, %clock;" : "=r"(clock)::"memory");
    return clock;
}

// The word at `address`, read where its home is. Written out, as a compiler may make a plain load of atomicOr(address, 0).
MLA_DEVICE u32 load_atomically(u32* address) {
    u32 value;
    asm volatile("atom.global.or.b32 %0, [%1], 0;" : "=r"(value) : "l"(address) : "memory");
    return value;
}

}  // namespace mla
