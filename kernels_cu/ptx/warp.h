// Warp and warpgroup housekeeping: named barriers, proxies, register budgets, matrix stores.
#pragma once
#include "core/hopper.h"

namespace mla {

// Barrier 0 is __syncthreads(); roles use 1 and up.
MLA_DEVICE void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// OR of a predicate over the threads of a named barrier, whole warps. The vote shows the compiler that a warp has one answer: else it
// keeps what lives past a branch on it, as the ring's place and with it all descriptors, out of the uniform registers.
MLA_DEVICE bool named_barrier_or(u32 id, u32 threads, bool predicate) {
    u32 any;
    asm volatile(
        "{\n"
        ".reg .pred p, q;\n"
        "setp.ne.u32 p, %3, 0;\n"
        "barrier.cta.red.or.pred q, %1, %2, p;\n"
        "selp.u32 %0, 1, 0, q;\n"
        "}\n"
        : "=r"(any)
        : "r"(id), "r"(threads), "r"(static_cast<u32>(predicate))
        : "memory");
    return __any_sync(kFullWarp, any != 0);
}

// Orders this thread's ordinary shared-memory writes before later reads by wgmma and TMA.
MLA_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Fixes a value's place in program order: it is computed before, and used only after, this point.
template <class Word>
MLA_DEVICE void pin_register(Word& value) { asm volatile("" : "+r"(value)::"memory"); }
template <>
MLA_DEVICE void pin_register(f32& value) { asm volatile("" : "+f"(value)::"memory"); }

template <class Target>
MLA_DEVICE void pin_register(Target*& address) { asm volatile("" : "+l"(address)::"memory"); }

template <int Registers>
MLA_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers) : "memory");
}

template <int Registers>
MLA_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the row address of row l % 8 of matrix l / 8.
MLA_DEVICE void load_matrix_x4(u32 row_address, u32 (&m)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row_address)
                 : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the row address of row l % 8 of matrix l / 8.
MLA_DEVICE void store_matrix_x4(u32 row_address, u32 m0, u32 m1, u32 m2, u32 m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(m0), "r"(m1),
                 "r"(m2), "r"(m3)
                 : "memory");
}

MLA_DEVICE void store_matrix_x4_transposed(u32 row_address, u32 m0, u32 m1, u32 m2, u32 m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(m0),
                 "r"(m1), "r"(m2), "r"(m3)
                 : "memory");
}

MLA_DEVICE void store_shared_16b(u32 address, uint4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

MLA_DEVICE void store_shared_16b_if(bool condition, u32 address, uint4 value) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %5, 0;\n"
        "@p st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n"
        "}\n" ::"r"(address),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(static_cast<u32>(condition))
        : "memory");
}

MLA_DEVICE void store_shared_u8(u32 address, u32 value) {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

MLA_DEVICE void store_shared_u16(u32 address, u32 value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<u16>(value)) : "memory");
}

MLA_DEVICE uint2 load_shared_8b(u32 address) {
    uint2 value;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
    return value;
}

// To global memory, to be evicted from L2 first.
MLA_DEVICE void store_streaming_16b(void* address, uint4 value) {
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

MLA_DEVICE void store_shared_u32(u32 address, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

MLA_DEVICE void or_shared_u32(u32 address, u32 bits) {
    asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
}
MLA_DEVICE u32 load_shared_u32(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

MLA_DEVICE void store_shared_f32(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

MLA_DEVICE float load_shared_f32(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

MLA_DEVICE void store_shared_8b(u32 address, uint2 value) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}

// As many words as the array has, in one access.
MLA_DEVICE void load_shared_words(u32 address, u32 (&words)[1]) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
}

MLA_DEVICE void load_shared_words(u32 address, u32 (&words)[2]) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
}

MLA_DEVICE void load_shared_words(u32 address, u32 (&words)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// A word that tells others what this thread has written before, and how these read it.
MLA_DEVICE void store_shared_release(u32 address, i32 value) {
    asm volatile("st.release.cta.shared::cta.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
MLA_DEVICE i32 load_shared_acquire(u32 address) {
    i32 value;
    asm volatile("ld.acquire.cta.shared::cta.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// 2^x, log2(x) and 1 / x of the special-function unit (relative error about 2^-22; subnormals flushed).
MLA_DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

MLA_DEVICE float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

MLA_DEVICE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace mla
