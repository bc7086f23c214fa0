// Stands in for kernels_cu/ptx/system.h on the CPU, where a thread that waits lets the others of its CTA go on, and other
// processors as well.
#pragma once
#include <sched.h>
#include <unistd.h>

#include "core/types.h"

namespace mla {

inline void store_release_system(u32* address, u32 value) { __atomic_store_n(address, value, __ATOMIC_RELEASE); }

static unsigned load_microseconds;  // that a load takes at least, after it has got the value

inline void let_others_go_on() {
    sched_yield();
    host_cuda::yield();
    threadIdx.x = host_cuda::current;
}

inline u32 load_acquire_system(const u32* address) {
    let_others_go_on();
    const u32 value = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    if (load_microseconds > 0) usleep(load_microseconds);
    return value;
}

struct alignas(16) Packet {
    u64 words[4];
};

inline void store_packet(Packet* packet, const uint4& values, u32 mark) {
    const u32 of_packet[] = {values.x, values.y, values.z, values.w};
    for (i32 i = 0; i < 4; ++i)
        __atomic_store_n(packet->words + i, static_cast<u64>(mark) << 32 | of_packet[i], __ATOMIC_RELAXED);
}

inline bool load_packet(const Packet* packet, uint4& values, u32 mark) {
    u32 of_packet[4];
    bool has_come = true;
    for (i32 i = 0; i < 4; ++i) {
        const u64 word = __atomic_load_n(packet->words + i, __ATOMIC_RELAXED);
        of_packet[i] = static_cast<u32>(word);
        has_come = has_come && static_cast<i32>(static_cast<u32>(word >> 32) - mark) >= 0;
    }
    values = {of_packet[0], of_packet[1], of_packet[2], of_packet[3]};
    if (!has_come) let_others_go_on();
    if (load_microseconds > 0 && threadIdx.x == 0) usleep(load_microseconds);
    return has_come;
}

}  // namespace mla
