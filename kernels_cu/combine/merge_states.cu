// Merges n partial states that the caller holds in ordinary arrays, e.g. one per shard of the KV cache.
#include "combine/merge_octets.h"
#include "combine/params.h"

namespace mla {

using Element = MLA_DTYPE;  // Bf16, Fp16 or Fp32

constexpr i32 kMergeStatesThreads = 256;

// +inf is FlashMLA's lse of a row that has seen nothing; no row that has seen something can have it.
struct ShardStates : RowStates {
    MLA_DEVICE f32 lse_of(i32 state) const {
        const f32 lse = RowStates::lse_of(state);
        return lse == -minus_infinity() ? minus_infinity() : lse;
    }
};

}  // namespace mla

// grid: one CTA per SM (fewer for few rows), block kMergeStatesThreads, no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(mla::kMergeStatesThreads, 2)
mla_merge_states(const __grid_constant__ mla::MergeStatesParams params) {
    using namespace mla;
    const i32 lane = threadIdx.x % kWarpThreads;
    const i64 num_rows = static_cast<i64>(params.size0) * params.size1 * params.size2;
    const i64 num_warps = static_cast<i64>(gridDim.x) * (blockDim.x / kWarpThreads);
    const RowChunks chunks(num_rows, params.d_v, num_warps, kSectorOctets<Element>);
    const i64 num_tasks = num_rows * chunks.chunks_of_row;
    for (i64 task = (threadIdx.x / kWarpThreads) * gridDim.x + blockIdx.x; task < num_tasks; task += num_warps) {
        const i64 row = task / chunks.chunks_of_row;
        const i64 row01 = row / params.size2;
        const i64 index2 = row - row01 * params.size2;
        const i64 index0 = row01 / params.size1;
        const i64 index1 = row01 - index0 * params.size1;
        const i64 outs_offset =
            index0 * params.outs_stride0 + index1 * params.outs_stride1 + index2 * params.outs_stride2;
        const i64 lses_offset =
            index0 * params.lses_stride0 + index1 * params.lses_stride1 + index2 * params.lses_stride2;
        const bool aligned = params.aligned != 0;
        const ShardStates states{{params.outs + outs_offset * Element::kBytes,
                                  params.outs_stride_state * Element::kBytes,
                                  params.lses + lses_offset,
                                  params.lses_stride_state,
                                  params.num_states,
                                  aligned}};
        const i32 chunk = static_cast<i32>(task - row * chunks.chunks_of_row);
        merge_chunk<Element, Element>(states, chunks, chunk, params.d_v, lane, [&] {
            const i64 out = index0 * params.out_stride0 + index1 * params.out_stride1 + index2 * params.out_stride2;
            const i64 lse = index0 * params.lse_stride0 + index1 * params.lse_stride1 + index2 * params.lse_stride2;
            return RowTarget{params.out + out * Element::kBytes, params.lse + lse, aligned, minus_infinity()};
        });
    }
}
