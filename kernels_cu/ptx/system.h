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

// 16 bytes, and beside each four of them a mark: no word is ever seen without the mark that was stored with it.
struct alignas(16) Packet {
    u64 words[4];
};

MLA_DEVICE u64 marked(u32 value, u32 mark) { return static_cast<u64>(mark) << 32 | value; }

MLA_DEVICE void store_packet(Packet* packet, const uint4& values, u32 mark) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};\n\tst.relaxed.sys.global.v2.u64 [%0 + 16], {%3, %4};" ::"l"(packet),
                 "l"(marked(values.x, mark)), "l"(marked(values.y, mark)), "l"(marked(values.z, mark)),
                 "l"(marked(values.w, mark))
                 : "memory");
}

// Whether all of a packet has come with this mark, or a later one.
MLA_DEVICE bool load_packet(const Packet* packet, uint4& values, u32 mark) {
    u64 words[4];
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%4];\n\tld.relaxed.sys.global.v2.u64 {%2, %3}, [%4 + 16];"
                 : "=l"(words[0]), "=l"(words[1]), "=l"(words[2]), "=l"(words[3])
                 : "l"(packet)
                 : "memory");
    values = {static_cast<u32>(words[0]), static_cast<u32>(words[1]), static_cast<u32>(words[2]), static_cast<u32>(words[3])};
    bool has_come = true;
    for (i32 i = 0; i < 4; ++i) has_come = has_come && static_cast<i32>(static_cast<u32>(words[i] >> 32) - mark) >= 0;
    return has_come;
}

}  // namespace mla
