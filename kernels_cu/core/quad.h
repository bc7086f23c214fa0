// A quad is four neighbouring lanes: the ones that share a row of a wgmma fragment.
#pragma once
#include "core/hopper.h"

namespace mla {

constexpr u32 kQuadLanes = 4;

// Lane t of the quad holds words x[0..3]; afterwards its word j is what lane j's word t was. Turns "my two columns of
// four 8-column groups" into "all eight columns of one group", so that global accesses are 16 bytes wide. Its own inverse.
MLA_DEVICE void quad_transpose(u32 (&x)[4], u32 lane_in_quad) {
    const bool odd = lane_in_quad & 1;
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
        const u32 received = __shfl_xor_sync(kFullWarp, odd ? x[pair] : x[pair + 1], 1);
        x[pair] = odd ? received : x[pair];
        x[pair + 1] = odd ? x[pair + 1] : received;
    }
    const bool high = lane_in_quad & 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 received = __shfl_xor_sync(kFullWarp, high ? x[i] : x[i + 2], 2);
        x[i] = high ? received : x[i];
        x[i + 2] = high ? x[i + 2] : received;
    }
}

MLA_DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

MLA_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
}

}  // namespace mla
