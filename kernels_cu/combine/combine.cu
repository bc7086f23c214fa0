// Merges the partial results of jobs that the plan cut into pieces. Leaves at once when it cut none.
#include "combine/merge_octets.h"
#include "combine/params.h"
#include "core/work.h"
#include "ptx/launch.h"

namespace mla {

using Element = MLA_DTYPE;  // Bf16 or Fp16
using Partial = MLA_PARTIAL;  // Fp32, or Element

// As many as leave room for two warps in the quarter of an SM that holds two of the decode kernel's; cupy_mla/configs.py
constexpr i32 kRegisters = MLA_REGISTERS;

// One row of one merge item. Rows past the request's end do not exist: the decode kernel never wrote their partials.
MLA_DEVICE void merge_row(const CombineParams& params, const MergeItem& item, const RowChunks& chunks, i32 row_in_slot,
                          i32 chunk, i32 lane) {
    const i32 row = first_row_block_of(item.head_block) * params.rows + row_in_slot;
    if (row >= item.seqlen_q * params.group_heads) return;
    const i64 first = static_cast<i64>(item.slot_begin) * params.slot_rows + row_in_slot;
    const i64 row_bytes = static_cast<i64>(params.d_v) * Partial::kBytes;
    const RowStates states{static_cast<const u8*>(params.partial_out) + first * row_bytes,
                           params.slot_rows * row_bytes,
                           params.partial_lse + first,
                           params.slot_rows,
                           item.slot_count,
                           true};
    merge_chunk<Partial, Element>(states, chunks, chunk, params.d_v, lane, [&] {
        const i32 token = row / params.group_heads;
        const i32 head = kv_head_of(item.head_block) * params.group_heads + row - token * params.group_heads;
        const i64 position = item.q_begin + token;
        u16* const out = params.out + item.request * params.out_stride_batch + position * params.out_stride_seq +
                         head * params.out_stride_head;
        f32* const lse = params.lse + item.request * params.lse_stride_batch + position * params.lse_stride_seq +
                         head * params.lse_stride_head;
        return RowTarget{reinterpret_cast<u8*>(out), lse, params.aligned != 0, params.empty_lse};
    });
}

}  // namespace mla

// grid: one CTA per SM; block: as many threads as the decode kernel leaves registers for (cupy_mla/configs.py), so that
// this kernel is in place when that one ends; no dynamic shared memory.
// A task is a chunk of a row of a merge item.
extern "C" __global__ void __maxnreg__(mla::kRegisters)
mla_combine(const __grid_constant__ mla::CombineParams params) {
    using namespace mla;
    const i32 lane = threadIdx.x % kWarpLanes;
    const i32 warp = threadIdx.x / kWarpLanes;
    // The plan is read before the wait: it was complete when the decode kernel let this one start.
    const i32 num_merges = plan_header(params.plan)->num_merges;
    const MergeItem* const merges = plan_merges(params.plan, params.merges_offset);
    const u32 num_warps = gridDim.x * (blockDim.x / kWarpLanes);
    const RowChunks chunks(static_cast<i64>(num_merges) * params.slot_rows, params.d_v, num_warps, kSectorOctets<Partial>);
    const u32 tasks_of_item = params.slot_rows * chunks.chunks_of_row;
    const u32 num_tasks = num_merges * tasks_of_item;
    u32 task = warp * gridDim.x + blockIdx.x;  // few tasks spread over all SMs
    MergeItem next = {};
    if (task < num_tasks) next = merges[task / tasks_of_item];
    pdl_launch_dependents();
    pdl_wait();
    while (task < num_tasks) {
        const MergeItem item = next;
        const u32 task_in_item = task % tasks_of_item;
        const u32 row_in_slot = task_in_item / chunks.chunks_of_row;
        task += num_warps;
        if (task < num_tasks) next = merges[task / tasks_of_item];  // arrives while this task's rows do
        merge_row(params, item, chunks, row_in_slot, task_in_item - row_in_slot * chunks.chunks_of_row, lane);
    }
}
