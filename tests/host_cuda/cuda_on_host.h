// Enough of CUDA to run a kernel of this project on the CPU, unchanged: every thread of a CTA is a fiber. Threads run
// in order (or in reverse) until they reach a barrier or a shuffle: a kernel that forgets one computes something else.
// Given to g++ with -include; ptx/ beside this file stands in for kernels_cu/ptx.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
    unsigned x, y;
};

struct uint4 {
    unsigned x, y, z, w;
};
struct int4 {
    int x, y, z, w;
};
struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }

namespace host_cuda {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 128 * 1024;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    bool waiting = false;  // at a barrier
    unsigned shuffles = 0;
    std::uint32_t sent[2];  // of the last two shuffles
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned current;
static const std::function<void()>* body;

inline void enter() {
    (*body)();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline std::uint32_t shuffle_xor(std::uint32_t value, unsigned mask) {
    const unsigned me = current;
    const unsigned turn = fibers[me].shuffles & 1;
    fibers[me].sent[turn] = value;
    const unsigned count = ++fibers[me].shuffles;
    const unsigned first = me / kWarp * kWarp;
    const auto all_sent = [&] {
        return std::all_of(fibers.begin() + first, fibers.begin() + first + kWarp,
                           [&](const Fiber& fiber) { return fiber.shuffles >= count; });
    };
    while (!all_sent()) yield();
    return fibers[me ^ mask].sent[turn];
}

// Runs the body once for each thread of each CTA.
inline void launch(unsigned grid, unsigned block, bool reverse, const std::function<void()>& kernel) {
    gridDim.x = grid;
    blockDim.x = block;
    body = &kernel;
    fibers.resize(block);
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        for (Fiber& fiber : fibers) {
            fiber.stack.resize(kStackBytes);
            fiber.done = fiber.waiting = false;
            fiber.shuffles = 0;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = kStackBytes;
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, enter, 0);
        }
        for (;;) {
            bool alive = false;
            for (unsigned i = 0; i < block; ++i) {
                current = reverse ? block - 1 - i : i;
                Fiber& fiber = fibers[current];
                if (fiber.done || fiber.waiting) continue;
                threadIdx.x = current;
                swapcontext(&scheduler, &fiber.context);
            }
            // When all wait, the barrier opens. In CUDA a barrier that some threads have left without is undefined.
            bool all_wait = true;
            for (const Fiber& fiber : fibers) {
                alive = alive || !fiber.done;
                all_wait = all_wait && (fiber.waiting || fiber.done);
            }
            if (!alive) break;
            if (!all_wait) continue;
            for (Fiber& fiber : fibers) {
                if (fiber.done) {
                    std::fprintf(stderr, "a thread left before a barrier that others wait at\n");
                    std::abort();
                }
                fiber.waiting = false;
            }
        }
    }
}

}  // namespace host_cuda

inline void __syncthreads() {
    host_cuda::fibers[host_cuda::current].waiting = true;
    host_cuda::yield();
    threadIdx.x = host_cuda::current;
}

template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == 4, "32-bit shuffles only");
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = host_cuda::shuffle_xor(bits, mask);
    threadIdx.x = host_cuda::current;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void __syncwarp() { __shfl_xor_sync(0xFFFFFFFFu, 0u, 0); }

inline unsigned atomicAdd(unsigned* address, unsigned value) {
    const unsigned old = *address;
    *address += value;
    return old;
}

inline int atomicMin(int* address, int value) {
    const int old = *address;
    *address = std::min(old, value);
    return old;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
using std::fmaxf;
