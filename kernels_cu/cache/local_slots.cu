// Of token numbers, those that lie on one rank of a cache sharded along the sequence, as slots of its pages: in their order, from
// the start of each row.
#include "cache/slots.h"
#include "core/shard.h"

namespace mla {

constexpr i32 kLocalSlotsThreads = 1024;  // so many that each looks at few tokens: one load waits for another

// cupy_mla/kernels/structs.py mirrors it; a test compares the two.
struct LocalSlotsParams {
    SlotsParams slots;   // a row is one list of tokens here, and blocks_per_row is not used
    i32* counts;         // [num_rows] how many of a row lie on the rank
    i32 rows_per_request;
    u32 shard;           // core/shard.h
};

static_assert(sizeof(LocalSlotsParams) == sizeof(SlotsParams) + 2 * sizeof(i64), "no padding");

// kNoToken for a token of another rank, too.
MLA_DEVICE i32 local_slot_of(const LocalSlotsParams& params, const Shard& shard, i32 request, i32 token) {
    return token >= 0 && shard.has(token) ? slot_of(params.slots, request, shard.count(token)) : kNoToken;
}

// Inclusive prefix sum over the CTA's threads; returns the buffer that holds it.
MLA_DEVICE const i32* sum_up_to(i32 (*buffers)[kLocalSlotsThreads], i32 mine, i32 thread) {
    buffers[0][thread] = mine;
    __syncthreads();
    i32 from = 0;
    for (i32 distance = 1; distance < kLocalSlotsThreads; distance *= 2) {
        const i32 before = thread >= distance ? buffers[from][thread - distance] : 0;
        buffers[1 - from][thread] = before + buffers[from][thread];
        from = 1 - from;
        __syncthreads();
    }
    return buffers[from];
}

}  // namespace mla

// grid: num_rows; 2 * kLocalSlotsThreads ints of dynamic shared memory.
extern "C" __global__ void mla_local_slots(const __grid_constant__ mla::LocalSlotsParams params) {
    using namespace mla;
    extern __shared__ __align__(16) u8 shared[];
    const i32 row = static_cast<i32>(blockIdx.x);
    const i32 thread = static_cast<i32>(threadIdx.x);
    const Shard shard = unpack_shard(params.shard);
    const i32 first_index = row / params.rows_per_request;
    const i32 request = params.slots.requests == nullptr ? first_index : params.slots.requests[first_index];
    const i32 length = static_cast<i32>(params.slots.row_tokens);
    const i32* const tokens = params.slots.tokens + static_cast<i64>(row) * length;
    i32* const slots = params.slots.slots + static_cast<i64>(row) * length;
    // Each thread has some tokens in a row, so that their order stays.
    const i32 share = ceil_div(length, kLocalSlotsThreads);
    const i32 begin = min_i32(thread * share, length);
    const i32 end = min_i32(begin + share, length);
    i32 mine = 0;
    for (i32 i = begin; i < end; ++i) mine += local_slot_of(params, shard, request, tokens[i]) != kNoToken;
    const i32* const up_to = sum_up_to(reinterpret_cast<i32(*)[kLocalSlotsThreads]>(shared), mine, thread);
    i32 place = up_to[thread] - mine;
    for (i32 i = begin; i < end; ++i) {
        const i32 slot = local_slot_of(params, shard, request, tokens[i]);
        if (slot != kNoToken) slots[place++] = slot;
    }
    const i32 count = up_to[kLocalSlotsThreads - 1];
    for (i32 i = count + thread; i < length; i += kLocalSlotsThreads) slots[i] = kNoToken;
    if (thread == 0) params.counts[row] = count;
}
