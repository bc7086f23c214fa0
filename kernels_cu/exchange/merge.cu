// Hands each rank what this one computed for its heads, and merges what comes for its own. A CTA has the same rows on all
// ranks: it stores a round of them in the others' memories, tells the others' CTAs, and while that is on its way merges the
// round before. So what is merged has just come, and nobody waits for more than that. Where the kernel ahead has stored results
// with the ranks of their heads, all that is left is to tell that they are there, and to merge. Few rows go in packets instead.
#include "combine/merge_octets.h"
#include "exchange/results.h"
#include "ptx/copy_async.h"
#include "ptx/launch.h"

namespace mla {

using Element = MLA_DTYPE;  // Bf16 or Fp16
constexpr i32 kOctetQuads = kOctet * Element::kBytes / static_cast<i32>(sizeof(uint4));
constexpr i32 kRoundTasks = 2;  // of a warp: chunks of rows in a round
constexpr i32 kRowsAtOnce = 2;  // that a warp merges of two ranks, where they are there; 3 and 4 are slower
constexpr i32 kLineBytes = 128;  // of L2

// States of one row, one of each rank: this rank's own lies where it was computed.
struct RankStates : RowStates {
    i64 own_offset;  // bytes from outs
    f32 own_lse;
    i32 rank;
    MLA_DEVICE const u8* out_of(i32 state) const { return state == rank ? outs + own_offset : RowStates::out_of(state); }
    MLA_DEVICE f32 lse_of(i32 state) const { return state == rank ? own_lse : RowStates::lse_of(state); }
};

// A row of each rank in shared memory, [world] each.
struct SharedRows {
    uint4* outs;
    f32* lses;
    i32 quads;  // of a row

    MLA_DEVICE SharedRows(u8* shared, i32 world, i32 quads)
        : outs(reinterpret_cast<uint4*>(shared)), lses(reinterpret_cast<f32*>(outs + world * quads)), quads(quads) {}

    // The quads of a row, then what holds its lse.
    MLA_DEVICE void set(i32 rank, i32 part, const uint4& values) const {
        if (part < quads)
            outs[rank * quads + part] = values;
        else
            lses[rank] = __uint_as_float(values.x);
    }
};

// What comes to a rank's memory for one call.
struct Received {
    u8* outs;
    f32* lses;
    i64 rows, row_bytes;

    MLA_DEVICE u8* out_of(i32 rank, i64 row) const { return outs + (rank * rows + row) * row_bytes; }
    MLA_DEVICE f32* lse_of(i32 rank, i64 row) const { return lses + rank * rows + row; }
};

// A call of one CTA.
struct CtaExchange {
    const PushMergeParams& params;
    i64 rows, row_bytes;
    i32 warps;
    RowChunks chunks;
    i64 first_row;
    i32 tasks;  // chunks of its rows
    bool is_stored;

    MLA_DEVICE CtaExchange(const PushMergeParams& params)
        : params(params),
          rows(params.rows()),
          row_bytes(params.d_v * Element::kBytes),
          warps(static_cast<i32>(blockDim.x) / kWarpThreads),
          chunks(rows, params.d_v, static_cast<i64>(gridDim.x) * warps, kSectorOctets<Element>),
          first_row(rows * blockIdx.x / gridDim.x),
          tasks(static_cast<i32>(rows * (blockIdx.x + 1) / gridDim.x - first_row) * chunks.chunks_of_row),
          is_stored(params.outs == nullptr) {}

    MLA_DEVICE Received received_by(i32 rank, u32 place) const {
        u8* const memory = params.meetings.memory_of(rank);
        const i64 first = static_cast<i64>(place) * params.meetings.world * rows;
        return {memory + params.received_outs + first * row_bytes,
                reinterpret_cast<f32*>(memory + params.received_lses) + first, rows, row_bytes};
    }
};

// A warp's task: a chunk of a row.
struct RowChunk {
    i64 row;
    i32 index0, index1, head;
    i32 chunk;

    MLA_DEVICE RowChunk(const CtaExchange& cta, i32 task) {
        const i32 row_of_cta = task / cta.chunks.chunks_of_row;
        chunk = task - row_of_cta * cta.chunks.chunks_of_row;
        row = cta.first_row + row_of_cta;
        const i64 token = row / cta.params.heads;
        head = static_cast<i32>(row - token * cta.params.heads);
        index0 = static_cast<i32>(token / cta.params.size1);
        index1 = static_cast<i32>(token - static_cast<i64>(index0) * cta.params.size1);
    }

    // The same row of a rank's heads, among those of all heads.
    MLA_DEVICE const u8* out_for(const CtaExchange& cta, i32 rank) const {
        const i64 token = static_cast<i64>(index0) * cta.params.size1 + index1;
        return cta.params.outs + ((token * cta.params.meetings.world + rank) * cta.params.heads + head) * cta.row_bytes;
    }

    MLA_DEVICE f32 lse_for(const CtaExchange& cta, i32 rank) const {
        const i64 of_all = (static_cast<i64>(index0) * cta.params.meetings.world + rank) * cta.params.heads + head;
        return cta.params.lses[of_all * cta.params.size1 + index1];
    }

    // Quads of all ranks are dealt out to the lanes, so that short chunks go to many ranks at once. The first chunk of a row
    // brings its lse.
    MLA_DEVICE void push(const CtaExchange& cta, u32 place, i32 lane) const {
        const Meetings& meetings = cta.params.meetings;
        const i32 width = cta.chunks.octets_of_chunk * kOctetQuads;
        const i32 begin = chunk * width, end = min_i32(begin + width, cta.params.d_v / kOctet * kOctetQuads);
        for (i32 i = lane; i < (meetings.world - 1) * width; i += kWarpThreads) {
            const i32 turn = i / width, quad = begin + i - turn * width;
            if (quad >= end) continue;
            const i32 rank = meetings.rank_after(turn + 1);
            const Received received = cta.received_by(rank, place);
            const uint4* const from = reinterpret_cast<const uint4*>(out_for(cta, rank));
            reinterpret_cast<uint4*>(received.out_of(meetings.rank, row))[quad] = from[quad];
            if (quad == 0) *received.lse_of(meetings.rank, row) = lse_for(cta, rank);
        }
    }

    MLA_DEVICE uint4 part_for(const CtaExchange& cta, i32 rank, i32 part, i32 quads) const {
        if (part < quads) return reinterpret_cast<const uint4*>(out_for(cta, rank))[part];
        return {__float_as_uint(lse_for(cta, rank)), 0, 0, 0};
    }

    // As mla_push does with few rows: results come sooner as packets, whose words each say by themselves that they have come.
    // All threads call it for the only row of a CTA; afterwards they see it of all ranks. What came is not stored to be read again.
    MLA_DEVICE void exchange_packets(const CtaExchange& cta, const SharedRows& of_ranks, u32 place, u32 meeting) const {
        const Meetings& meetings = cta.params.meetings;
        const i32 parts = of_ranks.quads + 1, step = static_cast<i32>(blockDim.x);
        const auto packet = [&](i32 in, i32 of, i32 part) { return cta.params.packets_of(in, of, place, row, parts) + part; };
        const i32 first = static_cast<i32>(threadIdx.x), of_others = (meetings.world - 1) * parts;
        for (i32 i = first; i < of_others; i += step) {
            const i32 turn = i / parts, part = i - turn * parts, other = meetings.rank_after(turn + 1);
            store_packet(packet(other, meetings.rank, part), part_for(cta, other, part, of_ranks.quads), meeting);
        }
        for (i32 part = first; part < parts; part += step)
            of_ranks.set(meetings.rank, part, part_for(cta, meetings.rank, part, of_ranks.quads));
        for (i32 i = first; i < of_others; i += step) {
            const i32 turn = i / parts, part = i - turn * parts, other = meetings.rank_after(turn + 1);
            of_ranks.set(other, part, wait_for_packet(packet(meetings.rank, other, part), meeting));
        }
        __syncthreads();
    }

    // Of states in this rank's memory.
    MLA_DEVICE RankStates received_states(const CtaExchange& cta, const Received& received) const {
        const i32 world = cta.params.meetings.world, rank = cta.params.meetings.rank;
        const u8* const outs = received.out_of(0, row);
        const RowStates all{outs, cta.rows * cta.row_bytes, received.lse_of(0, row), cta.rows, world, true};
        const u8* const own_out = cta.is_stored ? received.out_of(rank, row) : out_for(cta, rank);
        const f32 own_lse = cta.is_stored ? *received.lse_of(rank, row) : lse_for(cta, rank);
        return {all, own_out - outs, own_lse, rank};
    }

    MLA_DEVICE RankStates shared_states(const CtaExchange& cta, const SharedRows& of_ranks) const {
        const i32 world = cta.params.meetings.world, rank = cta.params.meetings.rank;
        const RowStates all{reinterpret_cast<const u8*>(of_ranks.outs), cta.row_bytes, of_ranks.lses, 1, world, true};
        return {all, rank * cta.row_bytes, of_ranks.lses[rank], rank};
    }

    MLA_DEVICE void merge(const CtaExchange& cta, const RankStates& states, i32 chunk, i32 lane) const {
        merge_chunk<Element, Element>(states, cta.chunks, chunk, cta.params.d_v, lane, [&] { return target(cta); });
    }

    MLA_DEVICE RowTarget target(const CtaExchange& cta) const {
        const PushMergeParams& params = cta.params;
        const i64 out = index0 * params.out_stride0 + index1 * params.out_stride1 + head * params.out_stride2;
        const i64 lse = index0 * params.lse_stride0 + index1 * params.lse_stride1 + head * params.lse_stride2;
        return {params.out + out * Element::kBytes, params.lse + lse, params.aligned != 0, minus_infinity()};
    }
};

// Of two ranks whose rows are stored, as many that a warp has a whole row: it waits for memory once for several of them. Until the
// other rank tells that they are there, all are asked for into L2, from which much of them has gone since.
MLA_DEVICE bool merges_at_once(const CtaExchange& cta) {
    return cta.is_stored && cta.params.meetings.world == 2 && cta.chunks.octets_of_chunk == 2 * kWarpThreads;
}

MLA_DEVICE void prefetch_rows(const CtaExchange& cta, const Received& received) {
    const i32 lines = ceil_div(static_cast<i32>(cta.row_bytes), kLineBytes);
    const i32 rows = cta.tasks / cta.chunks.chunks_of_row;
    for (i32 i = threadIdx.x; i < cta.params.meetings.world * rows * lines; i += blockDim.x) {
        const i32 row_of_all = i / lines, rank = row_of_all / rows;
        prefetch_to_l2(received.out_of(rank, cta.first_row + row_of_all - rank * rows) + (i - row_of_all * lines) * kLineBytes);
    }
}

MLA_DEVICE void merge_at_once(const CtaExchange& cta, const Received& received, i32 warp, i32 lane) {
    constexpr i32 kRanks = 2, kOctets = 2;
    const PushMergeParams& params = cta.params;
    const i32 row_octets = params.d_v / kOctet;
    for (i32 begin = warp; begin < cta.tasks; begin += kRowsAtOnce * cta.warps) {
        LoadedStates<Element, kRanks, kOctets> loaded[kRowsAtOnce];
#pragma unroll
        for (i32 i = 0; i < kRowsAtOnce; ++i) {
            const RowChunk row(cta, min_i32(begin + i * cta.warps, cta.tasks - 1));
            const i32 octet = min_i32(row.chunk * kOctets * kWarpThreads + lane, row_octets - 1);
            RowStates states{received.out_of(0, row.row) + octet * kOctet * Element::kBytes, cta.rows * cta.row_bytes,
                             received.lse_of(0, row.row), cta.rows, kRanks, true};
            states.second = (min_i32(octet + kWarpThreads, row_octets - 1) - octet) * kOctet * Element::kBytes;
            loaded[i].load(states, 0, 1);
        }
#pragma unroll
        for (i32 i = 0; i < kRowsAtOnce; ++i) {
            const i32 task = begin + i * cta.warps;
            if (task >= cta.tasks) break;
            const RowChunk row(cta, task);
            const RowStates states{nullptr, 0, nullptr, 0, kRanks, true};
            PartialMerge<kOctets> merge{minus_infinity(), 0.0f, {}};
            merge.add(states, loaded[i], 0, 1);
            merge.join_lanes(kWarpThreads);
            Octet<Element> merged[kOctets];
            const f32 lse = finish_merge(states, merge, merged);
            const RowTarget target = row.target(cta);
            const i32 octet = row.chunk * kOctets * kWarpThreads + lane;
            if (octet < row_octets) target.store(octet, merged[0]);
            if (octet + kWarpThreads < row_octets) target.store(octet + kWarpThreads, merged[1]);
            target.store_lse(octet, lse);
        }
    }
}

}  // namespace mla

// grid: no more CTAs than there are rows, and than there is room for at once; as many as rows where these go in packets. block:
// kExchangeThreads, or half of them. Dynamic shared memory: of packets SharedRows, else none.
extern "C" __global__ void __launch_bounds__(mla::kExchangeThreads)
mla_push_merge(const __grid_constant__ mla::PushMergeParams params) {
    using namespace mla;
    const Meetings& meetings = params.meetings;
    const i32 lane = threadIdx.x % kWarpThreads;
    const i32 warp = threadIdx.x / kWarpThreads;
    const CtaExchange cta(params);
    const i32 tasks_of_round = kRoundTasks * cta.warps;
    const i32 rounds = ceil_div(cta.tasks, tasks_of_round);
    const u32 call = meetings.calls[blockIdx.x];
    const u32 before = call * rounds;  // meetings
    const u32 place = call % params.places;
    const Received received = cta.received_by(meetings.rank, place);
    const RowChunk first(cta, 0);  // of a row that goes in packets
    pdl_wait();
    if (params.packets != 0) {
        extern __shared__ __align__(16) u8 shared[];
        const SharedRows of_ranks(shared, meetings.world, params.d_v / kOctet * kOctetQuads);
        first.exchange_packets(cta, of_ranks, place, call + 1);
        const RankStates states = first.shared_states(cta, of_ranks);
        for (i32 chunk = warp; chunk < cta.chunks.chunks_of_row; chunk += cta.warps) first.merge(cta, states, chunk, lane);
        meetings.count_call();
        return;
    }
    if (cta.is_stored) meetings.tell(before + rounds);
    if (merges_at_once(cta)) {
        prefetch_rows(cta, received);
        meetings.wait(before + rounds);
        merge_at_once(cta, received, warp, lane);
        meetings.count_call();
        return;
    }
    for (i32 round = 0; round <= rounds; ++round) {
        const i32 end = min_i32((round + 1) * tasks_of_round, cta.tasks), begin = round * tasks_of_round + warp;
        if (!cta.is_stored && round < rounds) {
            for (i32 task = begin; task < end; task += cta.warps) RowChunk(cta, task).push(cta, place, lane);
            meetings.tell(before + round + 1);
        }
        if (round > 0) {
            meetings.wait(before + round);
            const i32 end_before = min_i32(round * tasks_of_round, cta.tasks);
            for (i32 task = begin - tasks_of_round; task < end_before; task += cta.warps) {
                const RowChunk part(cta, task);
                part.merge(cta, part.received_states(cta, received), part.chunk, lane);
            }
        }
    }
    meetings.count_call();
}
