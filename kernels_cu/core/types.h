// The words every kernel file uses: integer widths, element-type tags, and how a function is marked.
// No CUDA header is included anywhere (NVRTC then compiles in milliseconds); this file is also plain host C++.
#pragma once

// NVRTC runs with -default-device, nvcc does not: marked functions suit both, and a host compiler too.
#if defined(__CUDACC__)
#define MLA_DEVICE __device__ __forceinline__
#else
#define MLA_DEVICE inline
#endif

namespace mla {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
using f32 = float;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "fixed widths");

// Element types, as tags: values live in 32-bit registers, two 16-bit ones in each, and are converted in ptx/convert.h.
struct Bf16 {
    static constexpr i32 kBytes = 2;
};
struct Fp16 {
    static constexpr i32 kBytes = 2;
};
struct E4m3 {
    static constexpr i32 kBytes = 1;
};
struct Fp32 {
    static constexpr i32 kBytes = 4;
};

template <class A, class B>
constexpr bool kSameType = false;
template <class A>
constexpr bool kSameType<A, A> = true;

constexpr MLA_DEVICE i32 ceil_div(i32 a, i32 b) { return (a + b - 1) / b; }
constexpr MLA_DEVICE i32 min_i32(i32 a, i32 b) { return a < b ? a : b; }
constexpr MLA_DEVICE i32 max_i32(i32 a, i32 b) { return a > b ? a : b; }
constexpr MLA_DEVICE i32 clamp_i32(i32 x, i32 low, i32 high) { return max_i32(low, min_i32(x, high)); }

}  // namespace mla
