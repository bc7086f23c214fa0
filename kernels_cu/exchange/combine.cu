// Merges the pieces of this rank's jobs, as combine/combine.cu does, and hands each rank the rows of its heads while it does so:
// in packets, from the registers in which a row was merged. Then merges with its own rows what comes of the others'. It stands for
// combine.cu and merge.cu where rows are so few that they go in packets.
#include "combine/jobs.h"
#include "exchange/results.h"

namespace mla {

constexpr i32 kUnitOctets = 8;  // of a row, which a warp merges; of 4 or 16, one request takes 1.4 us more
constexpr i32 kOctetBytes = kOctet * Output::kBytes;
static_assert(kOctetBytes == sizeof(uint4), "a packet for each octet");

// A warp's shared memory: a unit's octets of each rank, and its lse.
struct UnitStates {
    uint4* octets;  // [world, kUnitOctets]
    f32* lses;      // [world]

    MLA_DEVICE UnitStates(u8* shared, i32 world, i32 warp, i32 warps)
        : octets(reinterpret_cast<uint4*>(shared) + warp * world * kUnitOctets),
          lses(reinterpret_cast<f32*>(reinterpret_cast<uint4*>(shared) + warps * world * kUnitOctets) + warp * world) {}
};

// As RowStates, whose caller counts octets from the start of a row.
struct ReceivedStates : RowStates {
    i32 first_bytes;
    MLA_DEVICE const u8* out_of(i32 state) const { return RowStates::out_of(state) - first_bytes; }
};

// Where merged pieces go: to another rank, if there is a packet to go in, else to shared memory.
struct UnitTarget {
    Packet* packets;  // of the row
    i32 row_octets;
    u32 mark;
    uint4* octets;
    f32* lse;
    i32 first;  // octet

    MLA_DEVICE void store(i32 octet, const Octet<Output>& values) const {
        const uint4 quad{values.words[0], values.words[1], values.words[2], values.words[3]};
        if (packets != nullptr)
            store_packet(packets + octet, quad, mark);
        else
            octets[octet - first] = quad;
    }

    MLA_DEVICE void store_lse(i32 octet, f32 value) const {
        if (octet != first) return;
        if (packets == nullptr)
            *lse = value;
        else if (octet == 0)
            store_packet(packets + row_octets, {__float_as_uint(value), 0, 0, 0}, mark);
    }
};

// Some octets of a row of this rank's heads, and of the same row of the other ranks'.
struct Unit {
    const CombineParams& combine;
    const PushMergeParams& params;
    const RowChunks chunks;
    const i32 row_octets;
    i32 row, chunk;
    i32 index0, index1, head;

    MLA_DEVICE Unit(const CombineParams& combine, const PushMergeParams& params)
        : combine(combine), params(params), chunks(kUnitOctets, params.d_v), row_octets(params.d_v / kOctet) {}

    MLA_DEVICE i32 count() const { return static_cast<i32>(params.rows()) * chunks.chunks_of_row; }

    MLA_DEVICE void select(i32 unit) {
        row = unit / chunks.chunks_of_row;
        chunk = unit - row * chunks.chunks_of_row;
        const i32 token = row / params.heads;
        head = row - token * params.heads;
        index0 = token / params.size1;
        index1 = token - index0 * params.size1;
    }

    MLA_DEVICE i32 first() const { return chunk * kUnitOctets; }
    MLA_DEVICE i32 octets() const { return min_i32(kUnitOctets, row_octets - first()); }

    // The pieces of a rank's row; none if its job is whole. Of ragged queries the token says which request's it is.
    MLA_DEVICE bool find_pieces(i32 rank, Task<CombineParams>& task, i32& row_of_request) const {
        const i32 num_merges = plan_header(combine.plan)->num_merges;
        const MergeItem* const merges = plan_merges(combine.plan, combine.merges_offset);
        const i32 head_of_all = rank * params.heads + head;
        const i32 kv_head = head_of_all / combine.group_heads;
        for (i32 i = 0; i < num_merges; ++i) {
            task.item = merges[i];
            const i32 token = index1 - task.item.q_begin;
            row_of_request = token * combine.group_heads + head_of_all - kv_head * combine.group_heads;
            task.row_in_slot = row_of_request - first_row_block_of(task.item.head_block) * combine.rows;
            const bool is_request = params.size0 == 1 ? token >= 0 && token < task.item.seqlen_q : task.item.request == index0;
            const bool is_in_slot = task.row_in_slot >= 0 && task.row_in_slot < combine.slot_rows;
            if (is_request && is_in_slot && kv_head_of(task.item.head_block) == kv_head) {
                task.chunk = chunk;
                task.find_pieces(combine);
                return true;
            }
        }
        return false;
    }

    // Merges a rank's pieces, or reads what the decode stored.
    MLA_DEVICE void merge_pieces(i32 rank, bool is_split, const Task<CombineParams>& task, i32 row_of_request,
                                 const UnitTarget& target, i32 lane) const {
        if (is_split) {
            task.merge_row<RowStates>(combine, chunks, row_of_request, lane, [&] { return target; });
            return;
        }
        if (lane >= octets()) return;
        const i64 token = static_cast<i64>(index0) * params.size1 + index1;
        const i64 row_of_all = (token * params.meetings.world + rank) * params.heads + head;
        Octet<Output> values;
        values.load(params.outs + (row_of_all * row_octets + first() + lane) * kOctetBytes, true);
        target.store(first() + lane, values);
        const i64 heads_before = (static_cast<i64>(index0) * params.meetings.world + rank) * params.heads + head;
        target.store_lse(first() + lane, params.lses[heads_before * params.size1 + index1]);
    }

    MLA_DEVICE UnitTarget target(Packet* packets, u32 mark, const UnitStates& states, i32 rank) const {
        return {packets, row_octets, mark, states.octets + rank * kUnitOctets, states.lses + rank, first()};
    }

    // What comes of the others, beside what is of this rank, to the caller's room. The lse has a packet for all of a row.
    MLA_DEVICE void receive(const UnitStates& states, u32 place, u32 mark, i32 lane) const {
        const Meetings& meetings = params.meetings;
        const i32 parts = octets() + 1;
        for (i32 i = lane; i < (meetings.world - 1) * parts; i += kWarpThreads) {
            const i32 turn = i / parts, part = i - turn * parts, other = meetings.rank_after(turn + 1);
            const Packet* const packets = params.packets_of(meetings.rank, other, place, row, row_octets + 1);
            const bool is_lse = part == octets();
            const uint4 values = wait_for_packet(packets + (is_lse ? row_octets : first() + part), mark);
            if (is_lse)
                states.lses[other] = __uint_as_float(values.x);
            else
                states.octets[other * kUnitOctets + part] = values;
        }
    }

    MLA_DEVICE void merge_ranks(const UnitStates& states, i32 lane) const {
        const RowStates all{reinterpret_cast<const u8*>(states.octets), kUnitOctets * kOctetBytes, states.lses, 1,
                            params.meetings.world, true};
        merge_chunk<Output, Output>(ReceivedStates{all, first() * kOctetBytes}, chunks, chunk, params.d_v, lane, [&] {
            const i64 out = index0 * params.out_stride0 + index1 * params.out_stride1 + head * params.out_stride2;
            const i64 lse = index0 * params.lse_stride0 + index1 * params.lse_stride1 + head * params.lse_stride2;
            return RowTarget{params.out + out * Output::kBytes, params.lse + lse, params.aligned != 0, minus_infinity()};
        });
    }
};

}  // namespace mla

// grid: no more CTAs than there is room for at once; block: kExchangeThreads; dynamic shared memory: UnitStates of each warp. A CTA
// has the same units on all ranks, and its warps first send what others wait for.
extern "C" __global__ void __launch_bounds__(mla::kExchangeThreads, 1)
mla_combine_push(const __grid_constant__ mla::CombineParams combine, const __grid_constant__ mla::PushMergeParams params) {
    using namespace mla;
    extern __shared__ __align__(16) u8 shared[];
    const Meetings& meetings = params.meetings;
    const i32 lane = threadIdx.x % kWarpThreads;
    const i32 warp = threadIdx.x / kWarpThreads;
    const i32 warps = blockDim.x / kWarpThreads;
    const UnitStates states(shared, meetings.world, warp, warps);
    const u32 call = meetings.calls[blockIdx.x];
    const u32 place = call % params.places, mark = call + 1;
    Unit unit(combine, params);
    const i32 units = ceil_div(unit.count() - static_cast<i32>(blockIdx.x), static_cast<i32>(gridDim.x));
    __syncthreads();  // all have read the number of the call
    bool has_waited = false;
    // The plan is read before the wait, as in combine/jobs.h.
    for (i32 i = warp; i < units * meetings.world; i += warps) {
        const i32 turn = i / units;
        unit.select((i - turn * units) * gridDim.x + blockIdx.x);
        const bool sends = turn < meetings.world - 1;
        const i32 rank = meetings.rank_after(sends ? turn + 1 : 0);
        Task<CombineParams> task = {};
        i32 row_of_request = 0;
        const bool is_split = unit.find_pieces(rank, task, row_of_request);
        if (!has_waited) pdl_wait();
        has_waited = true;
        Packet* const packets =
            sends ? params.packets_of(rank, meetings.rank, place, unit.row, unit.row_octets + 1) : nullptr;
        unit.merge_pieces(rank, is_split, task, row_of_request, unit.target(packets, mark, states, rank), lane);
        if (sends) continue;
        unit.receive(states, place, mark, lane);
        __syncwarp();
        unit.merge_ranks(states, lane);
        __syncwarp();  // before the next unit's states are stored
    }
    if (!has_waited) pdl_wait();
    meetings.count_call();
}
