// Loads from global memory that stay where they are in the program; of those through the read-only path (.nc) the compiler moves
// all together.
#pragma once
#include "core/types.h"

namespace mla {

// 16 bytes; zeros, and no access, where `exists` is 0.
MLA_DEVICE void load_global_16b(const void* source, u32 exists, u32 (&words)[4]) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %5, 0;\n"
        "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
        "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "l"(source), "r"(exists)
        : "memory");
}

}  // namespace mla
