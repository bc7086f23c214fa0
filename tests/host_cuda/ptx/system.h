// Stands in for kernels_cu/ptx/system.h on the CPU, where a thread that waits lets the others of its CTA go on, and other
// processors as well.
#pragma once
#include <sched.h>
#include <unistd.h>

#include "core/types.h"

namespace mla {

inline void store_release_system(u32* address, u32 value) { __atomic_store_n(address, value, __ATOMIC_RELEASE); }

static unsigned load_microseconds;  // that a load takes at least, after it has got the value

inline u32 load_acquire_system(const u32* address) {
    sched_yield();
    host_cuda::yield();
    threadIdx.x = host_cuda::current;
    const u32 value = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    if (load_microseconds > 0) usleep(load_microseconds);
    return value;
}

}  // namespace mla
