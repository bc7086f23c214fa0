// What the kernels that merge the pieces of jobs share. Params is CombineParams or GatherCombineParams.
#pragma once
#include "combine/merge_octets.h"
#include "combine/params.h"
#include "core/partial_format.h"
#include "core/plan_format.h"
#include "ptx/launch.h"

namespace mla {

using Output = MLA_DTYPE;     // Bf16 or Fp16
using Partial = MLA_PARTIAL;  // Fp32, Output, or Fp16 with powers of two

// As many as leave room for two warps in the quarter of an SM that holds two of the decode kernel's; cupy_mla/kernels/combine.py
constexpr i32 kRegisters = MLA_REGISTERS;

// Rows are cut into as many chunks as there are warps for so many of each. Every chunk reads the lses of all pieces anew, and what a
// warp does besides merging takes as long for a narrow one: with a warp for each, dense decoding of one request takes 1 to 1.5 us
// more. Of gathered tokens that is not known.
// CTAs of four warps, which a family asks for where rows are few, have no more than half of the usual warps anyhow.
constexpr u32 kFewThreads = 128;
MLA_DEVICE u32 warps_per_chunk(const CombineParams&) { return blockDim.x <= kFewThreads ? 1 : 2; }
MLA_DEVICE u32 warps_per_chunk(const GatherCombineParams&) { return 1; }

// Whose rows a job has: a batch entry, from a query token of it on.
struct JobPlace {
    i32 batch, token;
};

MLA_DEVICE JobPlace job_place(const CombineParams&, const MergeItem& item) { return {item.request, item.q_begin}; }

// Every query token is a request of the plan.
MLA_DEVICE JobPlace job_place(const GatherCombineParams& params, const MergeItem& item) {
    const i32 batch = item.request / params.seqlen_q;
    return {batch, item.request - batch * params.seqlen_q};
}

// States of the kernel ahead. What comes before their loads is done when it ends. Of gathered tokens, which may have sinks to be read,
// all is waited for at once.
struct AwaitedStates : RowStates {
    static MLA_DEVICE void wait() { pdl_wait(); }
};
template <class Params>
constexpr bool kAwaitsLoads = kSameType<Params, CombineParams>;
template <bool kAwaits>
struct StatesOf {
    using Type = RowStates;
};
template <>
struct StatesOf<true> {
    using Type = AwaitedStates;
};

template <class States>
MLA_DEVICE States add_sink(const CombineParams&, const States& states, const MergeItem&, i32) { return states; }

// A row of a job of one query token is a head.
template <class States>
MLA_DEVICE SinkStates<States> add_sink(const GatherCombineParams& params, const States& states, const MergeItem& item, i32 row) {
    const i32 head = kv_head_of(item.head_block) * params.group_heads + row;
    return {states, params.attn_sink == nullptr ? minus_infinity() : params.attn_sink[head]};
}

// States whose values may have the powers of two of core/partial_format.h.
template <class States>
struct ScaledStates : States {
    i32 slot_rows;
    u32 shifts[2] = {};  // of the exponents of the caller's octets

    // With an lse for each part, both octets of a lane are of one part, and it reads that part's.
    static constexpr i32 kPairOctets = kLseCopies > 1 ? kScaleColumns / kOctet / 2 : kWarpThreads;
    static constexpr f32 kFactor = kMergedFactor;

    MLA_DEVICE void select(i32 first, i32 second) {
        if constexpr (kLseCopies > 1) States::lses += first / (2 * kPairOctets) * slot_rows;
        shifts[0] = shift_of(first);
        shifts[1] = shift_of(second);
    }

    MLA_DEVICE u32 scales_of(i32 state, f32 lse) const {
        if constexpr (kPowerIsInLse) return __float_as_uint(power_in_lse(lse));
        if ((__float_as_uint(lse) & kScaledMark) == 0) return kExponentsOfOne;
        const f32* const word = &States::lses[state * States::lse_stride + slot_rows];
        if constexpr (kScaleParts <= kHalfOfWord) return *reinterpret_cast<const u16*>(word);  // nobody wrote the rest
        return __float_as_uint(*word);
    }

    MLA_DEVICE f32 scale_of(u32 exponents, i32 octet) const {
        if constexpr (kPowerIsInLse) return __uint_as_float(exponents);
        return power_of_exponent(exponents >> shifts[octet] & kExponentMask);
    }

private:
    static constexpr u32 kHalfOfWord = sizeof(u16);  // an exponent has a byte
    static MLA_DEVICE u32 shift_of(i32 octet) {
        constexpr u32 kParts = kPartialIsScaled ? kScaleParts : 1;  // this is compiled, not used, without
        return static_cast<u32>(octet * kOctet) / kScaleColumns % kParts * kExponentBits;
    }
};

template <class States>
MLA_DEVICE auto add_scales(const States& states, i32 slot_rows) {
    if constexpr (kPartialIsScaled)
        return ScaledStates<States>{states, slot_rows};
    else
        return states;
}

// A chunk of a row of a merge item: a warp's task.
template <class Params>
struct Task {
    MergeItem item;
    i32 row_in_slot, chunk;
    i32 row, token;  // of the request, found ahead of the wait
    const u8* outs;  // of the row's first state
    const f32* lses;

    MLA_DEVICE void find(const Params& params, const MergeItem* merges, const RowChunks& chunks, u32 task) {
        const u32 tasks_of_item = params.slot_rows * chunks.chunks_of_row;
        const u32 index = task / tasks_of_item;
        item = merges[index];
        row_in_slot = (task - index * tasks_of_item) / chunks.chunks_of_row;
        chunk = task - index * tasks_of_item - row_in_slot * chunks.chunks_of_row;
        if constexpr (kAwaitsLoads<Params>) {
            row = row_of_request(params);
            token = static_cast<u32>(row) / static_cast<u32>(params.group_heads);
        }
        find_pieces(params);
    }

    MLA_DEVICE void find_pieces(const Params& params) {
        const i64 first = static_cast<i64>(item.slot_begin) * params.slot_rows;
        outs = static_cast<const u8*>(params.partial_out) + (first + row_in_slot) * params.d_v * Partial::kBytes;
        lses = params.partial_lse + first * kRowWords + row_in_slot;
    }

    MLA_DEVICE i32 row_of_request(const Params& params) const {
        return first_row_block_of(item.head_block) * params.rows + row_in_slot;
    }

    // Rows past the request's end do not exist: the decode kernel never wrote their partials.
    MLA_DEVICE void merge(const Params& params, const RowChunks& chunks, i32 lane) const {
        const i32 row = kAwaitsLoads<Params> ? this->row : row_of_request(params);
        if (row >= item.seqlen_q * params.group_heads) return;
        merge_row<typename StatesOf<kAwaitsLoads<Params>>::Type>(params, chunks, row, lane, [&] {
            const i32 token = kAwaitsLoads<Params> ? this->token : row / params.group_heads;
            const i32 head = kv_head_of(item.head_block) * params.group_heads + row - token * params.group_heads;
            const JobPlace place = job_place(params, item);
            const i64 position = place.token + token;
            u16* const out = params.out + place.batch * params.out_stride_batch + position * params.out_stride_seq +
                             head * params.out_stride_head;
            f32* const lse = params.lse + place.batch * params.lse_stride_batch + position * params.lse_stride_seq +
                             head * params.lse_stride_head;
            return RowTarget{reinterpret_cast<u8*>(out), lse, params.aligned != 0, params.empty_lse};
        });
    }

    // Of a row that exists, to what `target` gives.
    template <class States, class Target>
    MLA_DEVICE void merge_row(const Params& params, const RowChunks& chunks, i32 row, i32 lane, Target target) const {
        const i64 slot_bytes = static_cast<i64>(params.slot_rows) * params.d_v * Partial::kBytes;
        const i64 slot_words = static_cast<i64>(params.slot_rows) * kRowWords;
        States of_row;
        of_row.outs = outs, of_row.out_stride = slot_bytes, of_row.lses = lses, of_row.lse_stride = slot_words;
        of_row.count = item.slot_count, of_row.aligned = true;
        const auto states = add_scales(add_sink(params, of_row, item, row), params.slot_rows);
        merge_chunk<Partial, Output>(states, chunks, chunk, params.d_v, lane, target);
    }
};

// The kernel. grid: one CTA per SM; block: as many threads as the decode kernel leaves registers for
// (DecodeFamily.combine_threads), so that this kernel is in place when that one ends; no dynamic shared memory.
template <class Params>
MLA_DEVICE void merge_jobs(const Params& params) {
    const i32 lane = threadIdx.x % kWarpThreads;
    const i32 warp = threadIdx.x / kWarpThreads;
    // The plan is read before the wait: it was complete when the decode kernel let this one start. So the first task is
    // known when the partial results are there.
    const i32 num_merges = plan_header(params.plan)->num_merges;
    const MergeItem* const merges = plan_merges(params.plan, params.merges_offset);
    if (num_merges == 0) {  // where CTAs of the decode kernel leave no room, all this comes after it
        pdl_launch_dependents();
        pdl_wait();
        return;
    }
    const u32 block_warps = blockDim.x / kWarpThreads, num_warps = gridDim.x * block_warps;
    const RowChunks chunks(static_cast<i64>(num_merges) * params.slot_rows, params.d_v, num_warps / warps_per_chunk(params),
                           kSectorOctets<Partial>);
    const u32 num_tasks = num_merges * params.slot_rows * chunks.chunks_of_row;
    // Few tasks are spread over all SMs, and neighbours are one CTA's: chunks of a row need the same lses, which one line of L2 has
    // for all rows of a slot. Where each warp of the GPU asked L2 for them they waited for one another.
    const u32 tasks_of_block = (num_tasks + gridDim.x - 1) / gridDim.x;
    const u32 begin = blockIdx.x * tasks_of_block, first = begin + warp;
    const u32 end = begin + tasks_of_block < num_tasks ? begin + tasks_of_block : num_tasks;
    Task<Params> task = {};
    if (first < end) task.find(params, merges, chunks, first);
    pdl_launch_dependents();
    if constexpr (!kAwaitsLoads<Params>) pdl_wait();
    for (u32 next = first; next < end; next += block_warps) {
        if (next > first) task.find(params, merges, chunks, next);
        task.merge(params, chunks, lane);
    }
    if constexpr (kAwaitsLoads<Params>) pdl_wait();  // whoever waits for this kernel waits for those before it, too
}

}  // namespace mla
