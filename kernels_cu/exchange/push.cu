// Stores rows of this rank in every rank's memory, and ends when those of the others have come to its own.
#include "exchange/meetings.h"
#include "ptx/launch.h"

namespace mla {

// Distances in bytes. cupy_mla/kernels/structs.py mirrors it; a test compares the two.
struct PushParams {
    const u8* from;
    i64 from_stride0, from_stride1, from_stride2;
    i64 to;  // from the start of a rank's memory; rows of the other ranks lie size2 rows before and behind
    i64 to_stride0, to_stride1, to_stride2;
    i64 packets;  // from the start of a rank's memory: of each rank as many packets as it has chunks; 0: rows go as they are
    i32 size0, size1, size2;
    i32 chunks;  // of 16 bytes, of a row
    i32 starts_next;  // 1: the next kernel may start while packets are on their way
    i32 unused;
    Meetings meetings;
};

static_assert(sizeof(PushParams) == 9 * sizeof(i64) + 6 * sizeof(i32) + sizeof(Meetings), "no padding");

// A chunk of a row, in bytes from the first row.
struct ChunkPlace {
    i64 from, to;

    MLA_DEVICE ChunkPlace(const PushParams& params, i32 index) {
        const i32 row = index / params.chunks, chunk = index - row * params.chunks;
        const i32 row01 = row / params.size2, index2 = row - row01 * params.size2;
        const i32 index0 = row01 / params.size1, index1 = row01 - index0 * params.size1;
        const i64 in_row = chunk * static_cast<i64>(sizeof(uint4));
        from = index0 * params.from_stride0 + index1 * params.from_stride1 + index2 * params.from_stride2 + in_row;
        to = index0 * params.to_stride0 + index1 * params.to_stride1 + index2 * params.to_stride2 + in_row;
    }
};

// What a thread has of all chunks. Made ahead of the wait for the kernel before, as divisions take their time.
struct ChunkPush {
    const PushParams& params;
    const i32 count, first, step;
    const ChunkPlace first_place;

    MLA_DEVICE ChunkPush(const PushParams& params)
        : params(params),
          count(params.size0 * params.size1 * params.size2 * params.chunks),
          first(static_cast<i32>(blockIdx.x * blockDim.x + threadIdx.x)),
          step(static_cast<i32>(gridDim.x * blockDim.x)),
          first_place(params, first) {}

    MLA_DEVICE ChunkPlace place_of(i32 index) const { return index == first ? first_place : ChunkPlace(params, index); }

    MLA_DEVICE uint4 load(const ChunkPlace& place) const { return *reinterpret_cast<const uint4*>(params.from + place.from); }

    // In the memory of a rank, what is from another.
    MLA_DEVICE void store(i32 in, i32 of, const ChunkPlace& place, const uint4& values) const {
        const i64 to = params.to + (of - params.meetings.rank) * params.size2 * params.to_stride2 + place.to;
        *reinterpret_cast<uint4*>(params.meetings.memory_of(in) + to) = values;
    }

    // Each chunk is read once, and stored in the memory of one rank after the other. Of two chunks a thread waits once.
    MLA_DEVICE void send_rows() const {
        const Meetings& meetings = params.meetings;
#pragma unroll 2
        for (i32 i = first; i < count; i += step) {
            const ChunkPlace place(params, i);
            const uint4 values = load(place);
            for (i32 turn = 1; turn <= meetings.world; ++turn) store(meetings.rank_after(turn), meetings.rank, place, values);
        }
    }

    MLA_DEVICE Packet* packet(i32 in, i32 of, i32 index) const {
        return reinterpret_cast<Packet*>(params.meetings.memory_of(in) + params.packets) + static_cast<i64>(of) * count + index;
    }

    // Few rows come sooner as packets, whose words each say by themselves that they have come: a flag behind them would set
    // out when all of them are known to be there. Who sends is who looks for the same chunk of the others.
    MLA_DEVICE void exchange_packets(u32 meeting) const {
        const Meetings& meetings = params.meetings;
        for (i32 i = first; i < count; i += step) {
            const ChunkPlace place = place_of(i);
            const uint4 values = load(place);
            for (i32 turn = 1; turn < meetings.world; ++turn)
                store_packet(packet(meetings.rank_after(turn), meetings.rank, i), values, meeting);
            store(meetings.rank, meetings.rank, place, values);
        }
        for (i32 i = first; i < count; i += step) {
            const ChunkPlace place = place_of(i);
            for (i32 turn = 1; turn < meetings.world; ++turn) {
                const i32 other = meetings.rank_after(turn);
                store(meetings.rank, other, place, wait_for_packet(packet(meetings.rank, other, i), meeting));
            }
        }
        __syncthreads();
    }
};

}  // namespace mla

// grid: no more CTAs than there is room for at once; block: kExchangeThreads; no dynamic shared memory.
extern "C" __global__ void __launch_bounds__(mla::kExchangeThreads, 1)
mla_push(const __grid_constant__ mla::PushParams params) {
    using namespace mla;
    const Meetings& meetings = params.meetings;
    const u32 meeting = meetings.calls[blockIdx.x] + 1;
    const ChunkPush push(params);
    pdl_wait();
    if (params.packets != 0) {
        // It does not look at the counts of this kernel's meetings, as the one behind it does not.
        if (params.starts_next != 0) pdl_launch_dependents();
        push.exchange_packets(meeting);
    } else {
        push.send_rows();
        meetings.tell(meeting);
        meetings.wait(meeting);
    }
    meetings.count_call();
}
