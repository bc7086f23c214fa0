// The plan buffer: what the planner writes and the decode and combine kernels read. One int32 array:
//
//   PlanHeader                              8 ints
//   part_begin [num_parts + 1]              items of part p are items[part_begin[p] .. part_begin[p + 1])
//   WorkItem   [max_items]                  at plan_items_offset(num_parts)
//   MergeItem  [max_merges]                 at the offset in the kernel's parameters
//   planner workspace
//
// Every section starts at a multiple of 8 ints (32 bytes). cupy_mla/kernels/structs.py and planner.py mirror this; tests compare the two.
#pragma once

#include "core/shard.h"
#include "core/types.h"

namespace mla {

constexpr i32 kTileTokens = 64;        // KV tokens per tile in both decode kernels; the unit of a split
constexpr i32 kPlanSectionInts = 8;    // sections are aligned to this many ints
constexpr i32 kHeadBlockShift = 16;    // head_block = kv_head << 16 | first_row_block
constexpr i32 kWholeJob = -1;          // WorkItem::slot of a piece that is a whole job: the result goes straight to out

struct alignas(16) PlanHeader {
    i32 num_items;
    i32 num_merges;
    i32 num_slots;
    i32 budget;  // cost of the fullest part allowed, in 1/16 tile
    i32 num_jobs;
    i32 claimed_parts;  // parts [0, n) are claimed by CTAs (decode/claim.h); 0: CTA i has part i
    u32 claims;         // CTAs that have claimed in the launch under way; 0 between launches
    u32 shard;          // core/shard.h
};

// One piece of a job (request, kv head, blocks_per_job row blocks): KV tiles [tile_begin, tile_end).
// An empty range means no visible key: out = 0, lse = -inf. Of two lists of keys the second begins with a tile of its own, and
// seqlen_k counts what fills the last tile of the first.
struct alignas(16) WorkItem {
    i32 request;
    i32 head_block;
    i32 tile_begin;
    i32 tile_end;
    i32 seqlen_k;  // of the request, clamped to the plan's maximum; of its tokens on all ranks, where keys are sharded
    i32 seqlen_q;
    i32 q_begin;   // first query token of the request in a ragged batch; of two lists of keys, how many the first has; else 0
    i32 slot;      // partial slot, or kWholeJob
};

// One job that was split: its partials are slots [slot_begin, slot_begin + slot_count), in tile order.
struct alignas(16) MergeItem {
    i32 request;
    i32 head_block;
    i32 seqlen_q;
    i32 q_begin;
    i32 slot_begin;
    i32 slot_count;
    i32 reserved[2];
};

static_assert(sizeof(PlanHeader) == 4 * kPlanSectionInts && alignof(PlanHeader) == 16, "PlanHeader is 8 ints");
static_assert(sizeof(WorkItem) == 32 && alignof(WorkItem) == 16, "WorkItem is read as two 16-byte words");
constexpr i32 kWorkItemInts = sizeof(WorkItem) / sizeof(i32);
static_assert(sizeof(MergeItem) == 32 && alignof(MergeItem) == 16, "MergeItem is read as two 16-byte words");

constexpr MLA_DEVICE i32 pack_head_block(i32 kv_head, i32 first_row_block) {
    return (kv_head << kHeadBlockShift) | first_row_block;
}
constexpr MLA_DEVICE i32 kv_head_of(i32 head_block) { return head_block >> kHeadBlockShift; }
constexpr MLA_DEVICE i32 first_row_block_of(i32 head_block) { return head_block & ((1 << kHeadBlockShift) - 1); }

constexpr MLA_DEVICE i32 align_section(i32 ints) { return ceil_div(ints, kPlanSectionInts) * kPlanSectionInts; }
constexpr i32 kPlanPartBeginOffset = kPlanSectionInts;
constexpr MLA_DEVICE i32 plan_items_offset(i32 num_parts) {
    return align_section(kPlanPartBeginOffset + num_parts + 1);
}

MLA_DEVICE const PlanHeader* plan_header(const i32* plan) { return reinterpret_cast<const PlanHeader*>(plan); }
MLA_DEVICE const i32* plan_part_begin(const i32* plan) { return plan + kPlanPartBeginOffset; }
MLA_DEVICE const WorkItem* plan_items(const i32* plan, i32 num_parts) {
    return reinterpret_cast<const WorkItem*>(plan + plan_items_offset(num_parts));
}
MLA_DEVICE const MergeItem* plan_merges(const i32* plan, i32 merges_offset) {
    return reinterpret_cast<const MergeItem*>(plan + merges_offset);
}

}  // namespace mla
