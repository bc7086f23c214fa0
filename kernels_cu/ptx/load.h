// Loads from global memory that stay where they are in the program; of those through the read-only path (.nc) the compiler moves
// all together. PTX ISA, "ld".
#pragma once
#include "core/types.h"

namespace mla {

// 8 bytes; where `exists` is 0 no access, and each word is `otherwise`.
MLA_DEVICE void load_global_8b(const void* source, u32 exists, u32 (&words)[2], u32 otherwise) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %3, 0;\n"
        "mov.u32 %0, %4;\nmov.u32 %1, %4;\n"
        "@p ld.global.v2.u32 {%0, %1}, [%2];\n"
        "}\n"
        : "=&r"(words[0]), "=&r"(words[1])
        : "l"(source), "r"(exists), "r"(otherwise)
        : "memory");
}

// The same of 16 bytes.
MLA_DEVICE void load_global_16b(const void* source, u32 exists, u32 (&words)[4], u32 otherwise = 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %5, 0;\n"
        "mov.u32 %0, %6;\nmov.u32 %1, %6;\nmov.u32 %2, %6;\nmov.u32 %3, %6;\n"
        "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
        : "l"(source), "r"(exists), "r"(otherwise)
        : "memory");
}

MLA_DEVICE uint4 load_global_16b(const void* source, bool exists) {
    u32 words[4];
    load_global_16b(source, exists, words);
    return uint4{words[0], words[1], words[2], words[3]};
}

// A word that another kernel may be about to write: past L1, so that a later load finds what was written.
MLA_DEVICE i32 load_global_relaxed(const i32* source) {
    i32 word;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(word) : "l"(source) : "memory");
    return word;
}

}  // namespace mla
