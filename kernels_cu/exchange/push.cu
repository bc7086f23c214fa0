// Stores rows of this rank in every rank's memory, and ends when those of the others have come to its own.
#include "exchange/meetings.h"
#include "ptx/launch.h"

namespace mla {

// Distances in bytes. cupy_mla/kernels/structs.py mirrors it; a test compares the two.
struct PushParams {
    const u8* from;
    i64 from_stride0, from_stride1, from_stride2;
    i64 to;  // from the start of a rank's memory
    i64 to_stride0, to_stride1, to_stride2;
    i32 size0, size1, size2;
    i32 chunks;  // of 16 bytes, of a row
    Meetings meetings;
};

static_assert(sizeof(PushParams) == 8 * sizeof(i64) + 4 * sizeof(i32) + sizeof(Meetings), "no padding");

// Each chunk is read once, and stored in the memory of one rank after the other.
MLA_DEVICE void push_rows(const PushParams& params) {
    const Meetings& meetings = params.meetings;
    const i32 count = params.size0 * params.size1 * params.size2 * params.chunks;
    const i32 step = static_cast<i32>(gridDim.x * blockDim.x);
    for (i32 i = static_cast<i32>(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += step) {
        const i32 row = i / params.chunks, chunk = i - row * params.chunks;
        const i32 row01 = row / params.size2, index2 = row - row01 * params.size2;
        const i32 index0 = row01 / params.size1, index1 = row01 - index0 * params.size1;
        const i64 from = index0 * params.from_stride0 + index1 * params.from_stride1 + index2 * params.from_stride2;
        const i64 to = index0 * params.to_stride0 + index1 * params.to_stride1 + index2 * params.to_stride2;
        const uint4 values = reinterpret_cast<const uint4*>(params.from + from)[chunk];
        for (i32 turn = 1; turn <= meetings.world; ++turn) {
            u8* const memory = meetings.memory_of(meetings.rank_after(turn));
            reinterpret_cast<uint4*>(memory + params.to + to)[chunk] = values;
        }
    }
}

}  // namespace mla

// grid: no more CTAs than there is room for at once; block: kExchangeThreads; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(mla::kExchangeThreads)
mla_push(const __grid_constant__ mla::PushParams params) {
    using namespace mla;
    const Meetings& meetings = params.meetings;
    const u32 meeting = meetings.calls[blockIdx.x] + 1;
    pdl_wait();
    push_rows(params);
    meetings.tell(meeting);
    meetings.wait(meeting);
    meetings.count_call();
}
