// A CTA's share of a work item: which query rows and which KV tiles.
#pragma once
#include "decode/config.h"
#include "decode/params.h"

namespace mla {

// bf16 rounds P by up to 2^-8, which shows where a few keys have all the weight of a few rows. For few rows the kernel is
// compiled to refine P: in a block of so few, rows that do not exist take what the rounding leaves out of the rows eight before
// them, with the same factors, and their O is added in the end.
constexpr i32 kRefinedRows = MLA_REFINED_ROWS;
constexpr bool kRefines = kRefinedRows > 0;
static_assert(!kRefines || kSameType<Operand, Bf16>, "fp16 rounds little enough");
static_assert(2 * kRefinedRows <= static_cast<i32>(kRows), "what is left out takes as many rows");

struct BlockWork {
    i32 request, kv_head;
    i32 first_row;   // of this CTA, among the request's seqlen_q * group_heads rows of the kv head
    i32 num_rows;    // of the request; rows past it are padding
    i32 tile_begin, tile_end;
    i32 seqlen_k, seqlen_q, q_begin, slot;
    i32 first_list;  // of gathered tokens in two lists: how many the first has
    i32 total_k;     // of a shard, whose tokens seqlen_k counts: tokens on all ranks
    u32 shard;       // core/shard.h

    MLA_DEVICE bool exists() const { return first_row < num_rows; }
    MLA_DEVICE bool has_tiles() const { return exists() && tile_begin < tile_end; }
    MLA_DEVICE bool is_refined() const { return kRefines && num_rows - first_row <= kRefinedRows; }
    MLA_DEVICE bool is_partial() const { return slot != kWholeJob; }
};

// The grid is (blocks_per_job, num_parts): CTAs of one job are neighbours, read the same tiles at about the same time and
// so share them in L2. The number comes from a special register, not from one that the accumulators need.
MLA_DEVICE i32 block_in_job() { return blockIdx.x; }

// core/shard.h; a kernel whose registers the plan's address would cost says it otherwise.
template <class Params>
MLA_DEVICE u32 shard_of(const Params& params) { return plan_header(params.plan)->shard; }

// The planner leaves out tiles that the whole job may not see; a row block of a causal job may still be given a tile that
// is hidden from all its rows, and masks it.
template <class Params>
MLA_DEVICE BlockWork planned_block_work(const Params& params, const int4* words) {
    const int4 a = words[0];
    const int4 b = words[1];
    BlockWork work;
    work.request = a.x;
    work.kv_head = kv_head_of(a.y);
    work.first_row = (first_row_block_of(a.y) + block_in_job()) * static_cast<i32>(kRows);
    work.tile_begin = a.z;
    work.tile_end = a.w;
    work.seqlen_k = b.x;
    if constexpr (kSharded) {
        work.total_k = b.x;
        work.shard = shard_of(params);
        work.seqlen_k = unpack_shard(work.shard).count(b.x);
    }
    work.seqlen_q = b.y;
    work.q_begin = b.z;
    work.slot = b.w;
    work.num_rows = work.seqlen_q * params.group_heads;
    return work;
}

// The words of an item of the plan.
template <class Params>
MLA_DEVICE const int4* planned_words(const Params& params, i32 item_index) {
    return reinterpret_cast<const int4*>(plan_items(params.plan, params.num_parts) + item_index);
}

template <class Params>
MLA_DEVICE BlockWork load_block_work(const Params& params, i32 item_index) {
    return planned_block_work(params, planned_words(params, item_index));
}

}  // namespace mla
