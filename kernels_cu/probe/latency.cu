// How long each SM takes to reach some lines of memory: cupy_mla/kernels/halves.py finds the halves of the chip in it.
// An atomic operation is done where the line's home is, in one half of the L2 cache; a plain load may be answered by a copy
// in the SM's own half.
#include "ptx/sm.h"

namespace mla {

constexpr u32 kLineStride = 1056;  // in words: neighbouring lines have different homes
constexpr u32 kChain = 8;          // operations that wait for each other
constexpr u32 kAttempts = 3;       // the shortest counts: the first one may miss L2

}  // namespace mla

// grid: one CTA per SM, which so much dynamic shared memory sees to that no two fit on one; block: one thread works.
// lines: u32 [num_lines * kLineStride], zero, and zero it stays. clocks: u32 [max_sms, num_lines], of the SMs by number.
extern "C" __global__ void mla_probe_latency(unsigned* lines, unsigned* clocks, int num_lines, int max_sms) {
    using namespace mla;
    const u32 sm = current_sm();
    if (threadIdx.x != 0 || sm >= static_cast<u32>(max_sms)) return;
    for (i32 line = 0; line < num_lines; ++line) {
        u32* const address = lines + line * kLineStride;
        u32 least = 0xffffffff;
        for (u32 attempt = 0; attempt < kAttempts; ++attempt) {
            const u32 begin = clock_now();
            u32 zero = 0;
#pragma unroll 1
            for (u32 i = 0; i < kChain; ++i) zero = load_atomically(address + zero);
            const u32 clocks_taken = clock_now() - begin;
            if (clocks_taken < least) least = clocks_taken;
        }
        clocks[sm * num_lines + line] = least;
    }
}
