// Memory that several GPUs, or a GPU and the host, look at.
#pragma once
#include "core/types.h"

namespace mla {

// What this thread wrote before, and what it knows that others have written, is there for whoever sees what it writes after.
MLA_DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

MLA_DEVICE void store_release_system(u32* address, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

MLA_DEVICE u32 load_acquire_system(const u32* address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

}  // namespace mla
