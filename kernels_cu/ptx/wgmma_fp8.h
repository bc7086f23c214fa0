// wgmma with e4m3 operands: D[64 x N] (+)= A[64 x 32] * B[32 x N], float32 accumulators. B lies K-major in shared memory, A too
// or in registers.
// The tensor cores add the 32 products of a step and the accumulator with 13 fraction bits below the largest of them
// (kernels_cu/DESIGN.md): sums over many steps belong into float32 registers outside.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once
#include "core/types.h"

namespace mla {

#define MLA_E4M3_SS(N, REGISTERS, A, B, P, ...)                                                                        \
    asm volatile(                                                                                                      \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                                 \
        "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS "}, " A ", " B ", p, 1, 1;\n}\n"        \
        : __VA_ARGS__                                                                                                  \
        : "l"(a), "l"(b), "r"(accumulate)                                                                              \
        : "memory")

#define MLA_E4M3_ACC(d, i)                                                                                             \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),       \
        "+f"(d[i + 7])
#define MLA_E4M3_REGS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MLA_E4M3_REGS_16 MLA_E4M3_REGS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MLA_E4M3_REGS_32                                                                                               \
    MLA_E4M3_REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// accumulate = 0 overwrites D.
MLA_DEVICE void wgmma_e4m3_ss(float (&d)[8], u64 a, u64 b, u32 accumulate) {
    MLA_E4M3_SS(16, MLA_E4M3_REGS_8, "%8", "%9", "%10", MLA_E4M3_ACC(d, 0));
}

MLA_DEVICE void wgmma_e4m3_ss(float (&d)[16], u64 a, u64 b, u32 accumulate) {
    MLA_E4M3_SS(32, MLA_E4M3_REGS_16, "%16", "%17", "%18", MLA_E4M3_ACC(d, 0), MLA_E4M3_ACC(d, 8));
}

MLA_DEVICE void wgmma_e4m3_ss(float (&d)[32], u64 a, u64 b, u32 accumulate) {
    MLA_E4M3_SS(64, MLA_E4M3_REGS_32, "%32", "%33", "%34", MLA_E4M3_ACC(d, 0), MLA_E4M3_ACC(d, 8), MLA_E4M3_ACC(d, 16),
                MLA_E4M3_ACC(d, 24));
}

// A in registers: the fragment of m64k32 (rows lane / 4 and lane / 4 + 8, columns 4 * (lane % 4) .. + 3 and 16 further).
MLA_DEVICE void wgmma_e4m3_rs(float (&d)[32], const u32 (&a)[4], u64 b, u32 accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" MLA_E4M3_REGS_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1;\n}\n"
        : MLA_E4M3_ACC(d, 0), MLA_E4M3_ACC(d, 8), MLA_E4M3_ACC(d, 16), MLA_E4M3_ACC(d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)
        : "memory");
}

#undef MLA_E4M3_SS
#undef MLA_E4M3_ACC
#undef MLA_E4M3_REGS_8
#undef MLA_E4M3_REGS_16
#undef MLA_E4M3_REGS_32
}  // namespace mla
