// Hands rows of this rank's arrays to all ranks of a host: stores them where each has room for them, tells each that they are
// there, and ends when all others have told the same. What follows in the stream may read what came.
#include "ptx/system.h"

namespace mla {

constexpr i32 kPushThreads = 256;  // no fewer than there may be ranks

// Rows of chunks: rank r is given those that begin r * rank_step further. Distances in bytes.
struct PushRows {
    const u8* from;
    i64 rank_step;
    i64 from_stride0, from_stride1, from_stride2;
    i64 to;  // from the start of the receiver's memory
    i64 to_stride0, to_stride1, to_stride2;
    i32 size0, size1, size2;
    i32 chunks;  // of a row
};

// cupy_mla/kernels/structs.py mirrors it; a test compares the two.
struct PushParams {
    PushRows values;       // in chunks of 16 bytes
    PushRows words;        // of 4
    const u64* memories;   // [world] where each rank's memory lies; it begins with a word of each rank: its last meeting
    u32* meetings;         // [2] of this rank alone: how many there were; CTAs that are done with the next
    i32 world, rank;
};

static_assert(sizeof(PushRows) == 9 * sizeof(i64) + 4 * sizeof(i32), "no padding");
static_assert(sizeof(PushParams) == 2 * sizeof(PushRows) + 2 * sizeof(i64) + 2 * sizeof(i32), "no padding");

struct Chunk16 {
    u32 words[4];
};

template <class Chunk>
MLA_DEVICE void push_rows(const PushRows& rows, const PushParams& params) {
    const i32 count = rows.size0 * rows.size1 * rows.size2 * rows.chunks;
    const i32 step = static_cast<i32>(gridDim.x * blockDim.x);
    for (i32 turn = 0; turn < params.world; ++turn) {
        // Each rank begins with another.
        const i32 after = params.rank + turn, rank = after < params.world ? after : after - params.world;
        const u8* const from = rows.from + rank * rows.rank_step;
        u8* const to = reinterpret_cast<u8*>(params.memories[rank]) + rows.to;
        for (i32 i = static_cast<i32>(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += step) {
            const i32 row = i / rows.chunks, chunk = i - row * rows.chunks;
            const i32 row01 = row / rows.size2, index2 = row - row01 * rows.size2;
            const i32 index0 = row01 / rows.size1, index1 = row01 - index0 * rows.size1;
            const i64 source = index0 * rows.from_stride0 + index1 * rows.from_stride1 + index2 * rows.from_stride2;
            const i64 target = index0 * rows.to_stride0 + index1 * rows.to_stride1 + index2 * rows.to_stride2;
            reinterpret_cast<Chunk*>(to + target)[chunk] = reinterpret_cast<const Chunk*>(from + source)[chunk];
        }
    }
}

// Tells all ranks that this one has come to a meeting, and waits until all have.
MLA_DEVICE void meet(const PushParams& params, u32 meeting) {
    const i32 other = static_cast<i32>(threadIdx.x);
    if (other >= params.world) return;
    u32* const theirs = reinterpret_cast<u32*>(params.memories[other]);
    const u32* const mine = reinterpret_cast<const u32*>(params.memories[params.rank]);
    store_release_system(theirs + params.rank, meeting);
    // A rank may be at the next meeting already. The number may have wrapped round.
    while (static_cast<i32>(load_acquire_system(mine + other) - meeting) < 0) {
    }
}

}  // namespace mla

// One word of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(mla::kPushThreads) mla_push(const __grid_constant__ mla::PushParams params) {
    using namespace mla;
    extern __shared__ __align__(16) u8 shared[];
    u32& is_last = *reinterpret_cast<u32*>(shared);
    push_rows<Chunk16>(params.values, params);
    push_rows<u32>(params.words, params);
    const u32 meeting = params.meetings[0] + 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_system();  // of all that the CTA stored
        is_last = atomicAdd(&params.meetings[1], 1u) == gridDim.x - 1;
        fence_system();
    }
    __syncthreads();
    if (!is_last) return;
    meet(params, meeting);
    if (threadIdx.x == 0) {
        params.meetings[0] = meeting;
        params.meetings[1] = 0;
    }
}
