// wgmma: D[64 x N] (+)= A[64 x 16] * B[16 x N] by one warpgroup, float32 accumulators in registers, 16-bit operands.
// Operands in shared memory are named by 64-bit descriptors (core/smem_descriptor.h); A may also come from registers.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once
#include "core/types.h"

namespace mla {

// Orders register and shared-memory accesses of this warpgroup before its next wgmma.
MLA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MLA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int Pending>
MLA_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving accumulator accesses across a wait: it does not know that wgmma writes them later.
template <int Count>
MLA_DEVICE void wgmma_pin(float (&accumulator)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
}

// Operand numbers and constraints of eight accumulators, so that each shape below is one statement.
#define MLA_REGS_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MLA_REGS_8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define MLA_REGS_16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define MLA_REGS_24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define MLA_REGS_32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define MLA_REGS_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define MLA_REGS_48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define MLA_REGS_56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define MLA_REGS_64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define MLA_REGS_72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define MLA_REGS_80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define MLA_REGS_88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define MLA_REGS_96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define MLA_REGS_104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define MLA_REGS_112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define MLA_REGS_120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define MLA_ACC(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define MLA_REGS_N16 MLA_REGS_0
#define MLA_ACC_N16(d) MLA_ACC(d, 0)
#define MLA_REGS_N32 MLA_REGS_0 ", " MLA_REGS_8
#define MLA_ACC_N32(d) MLA_ACC(d, 0), MLA_ACC(d, 8)
#define MLA_REGS_N64 MLA_REGS_0 ", " MLA_REGS_8 ", " MLA_REGS_16 ", " MLA_REGS_24
#define MLA_ACC_N64(d) MLA_ACC(d, 0), MLA_ACC(d, 8), MLA_ACC(d, 16), MLA_ACC(d, 24)
#define MLA_REGS_N128 MLA_REGS_0 ", " MLA_REGS_8 ", " MLA_REGS_16 ", " MLA_REGS_24 ", " MLA_REGS_32 ", " MLA_REGS_40 ", " MLA_REGS_48 ", " MLA_REGS_56
#define MLA_ACC_N128(d) MLA_ACC(d, 0), MLA_ACC(d, 8), MLA_ACC(d, 16), MLA_ACC(d, 24), MLA_ACC(d, 32), MLA_ACC(d, 40), MLA_ACC(d, 48), MLA_ACC(d, 56)
#define MLA_REGS_N256 MLA_REGS_0 ", " MLA_REGS_8 ", " MLA_REGS_16 ", " MLA_REGS_24 ", " MLA_REGS_32 ", " MLA_REGS_40 ", " MLA_REGS_48 ", " MLA_REGS_56 ", " MLA_REGS_64 ", " MLA_REGS_72 ", " MLA_REGS_80 ", " MLA_REGS_88 ", " MLA_REGS_96 ", " MLA_REGS_104 ", " MLA_REGS_112 ", " MLA_REGS_120
#define MLA_ACC_N256(d) MLA_ACC(d, 0), MLA_ACC(d, 8), MLA_ACC(d, 16), MLA_ACC(d, 24), MLA_ACC(d, 32), MLA_ACC(d, 40), MLA_ACC(d, 48), MLA_ACC(d, 56), MLA_ACC(d, 64), MLA_ACC(d, 72), MLA_ACC(d, 80), MLA_ACC(d, 88), MLA_ACC(d, 96), MLA_ACC(d, 104), MLA_ACC(d, 112), MLA_ACC(d, 120)

// Operands after the accumulators are named by their numbers, as string literals.
#define MLA_WGMMA_SS(N, TYPES, A, B, P, TA, TB)                                                                       \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                                \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" MLA_REGS_N##N "}, " A ", " B ", p, 1, 1, " TA      \
        ", " TB ";\n}\n"                                                                                              \
        : MLA_ACC_N##N(d)                                                                                             \
        : "l"(a), "l"(b), "r"(accumulate), "n"(TransposeA), "n"(TransposeB)                                           \
        : "memory")

#define MLA_WGMMA_RS(N, TYPES, A0, A1, A2, A3, B, P, TB)                                                              \
    asm volatile(                                                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                                                                \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES " {" MLA_REGS_N##N "}, {" A0 ", " A1 ", " A2 ", " A3    \
        "}, " B ", p, 1, 1, " TB ";\n}\n"                                                                             \
        : MLA_ACC_N##N(d)                                                                                             \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(TransposeB)                                \
        : "memory")

// Both operands in shared memory. accumulate = 0 overwrites D. TransposeA/B = 1: that operand lies M- or N-major.
template <class T, int TransposeA, int TransposeB>
MLA_DEVICE void wgmma_ss(float (&d)[8], u64 a, u64 b, u32 accumulate) {
    if constexpr (kSameType<T, Bf16>)
        MLA_WGMMA_SS(16, "bf16.bf16", "%8", "%9", "%10", "%11", "%12");
    else
        MLA_WGMMA_SS(16, "f16.f16", "%8", "%9", "%10", "%11", "%12");
}

template <class T, int TransposeA, int TransposeB>
MLA_DEVICE void wgmma_ss(float (&d)[16], u64 a, u64 b, u32 accumulate) {
    if constexpr (kSameType<T, Bf16>)
        MLA_WGMMA_SS(32, "bf16.bf16", "%16", "%17", "%18", "%19", "%20");
    else
        MLA_WGMMA_SS(32, "f16.f16", "%16", "%17", "%18", "%19", "%20");
}

template <class T, int TransposeA, int TransposeB>
MLA_DEVICE void wgmma_ss(float (&d)[32], u64 a, u64 b, u32 accumulate) {
    if constexpr (kSameType<T, Bf16>)
        MLA_WGMMA_SS(64, "bf16.bf16", "%32", "%33", "%34", "%35", "%36");
    else
        MLA_WGMMA_SS(64, "f16.f16", "%32", "%33", "%34", "%35", "%36");
}

template <class T, int TransposeA, int TransposeB>
MLA_DEVICE void wgmma_ss(float (&d)[64], u64 a, u64 b, u32 accumulate) {
    if constexpr (kSameType<T, Bf16>)
        MLA_WGMMA_SS(128, "bf16.bf16", "%64", "%65", "%66", "%67", "%68");
    else
        MLA_WGMMA_SS(128, "f16.f16", "%64", "%65", "%66", "%67", "%68");
}

template <class T, int TransposeA, int TransposeB>
MLA_DEVICE void wgmma_ss(float (&d)[128], u64 a, u64 b, u32 accumulate) {
    if constexpr (kSameType<T, Bf16>)
        MLA_WGMMA_SS(256, "bf16.bf16", "%128", "%129", "%130", "%131", "%132");
    else
        MLA_WGMMA_SS(256, "f16.f16", "%128", "%129", "%130", "%131", "%132");
}

// A in registers: the fragment of m64k16 (rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and + 8).
template <class T, int TransposeB>
MLA_DEVICE void wgmma_rs(float (&d)[8], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, u32 accumulate) {
    if constexpr (kSameType<T, Bf16>)
        MLA_WGMMA_RS(16, "bf16.bf16", "%8", "%9", "%10", "%11", "%12", "%13", "%14");
    else
        MLA_WGMMA_RS(16, "f16.f16", "%8", "%9", "%10", "%11", "%12", "%13", "%14");
}

template <class T, int TransposeB>
MLA_DEVICE void wgmma_rs(float (&d)[16], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, u32 accumulate) {
    if constexpr (kSameType<T, Bf16>)
        MLA_WGMMA_RS(32, "bf16.bf16", "%16", "%17", "%18", "%19", "%20", "%21", "%22");
    else
        MLA_WGMMA_RS(32, "f16.f16", "%16", "%17", "%18", "%19", "%20", "%21", "%22");
}

template <class T, int TransposeB>
MLA_DEVICE void wgmma_rs(float (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, u32 accumulate) {
    if constexpr (kSameType<T, Bf16>)
        MLA_WGMMA_RS(64, "bf16.bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    else
        MLA_WGMMA_RS(64, "f16.f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
}

#undef MLA_WGMMA_SS
#undef MLA_WGMMA_RS
}  // namespace mla
