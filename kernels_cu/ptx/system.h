// Memory that several GPUs, or a GPU and the host, look at.
#pragma once
#include "core/types.h"

namespace mla {

MLA_DEVICE void store_release_system(u32* address, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

MLA_DEVICE u32 load_acquire_system(const u32* address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

}  // namespace mla
