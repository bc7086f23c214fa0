// The planner and the merging kernels as a shared library for the CPU, and the layout of their structs.
// Compiled once per MERGE_STATES_DTYPE.
#define MLA_DTYPE Bf16
#define MLA_PARTIAL MERGE_STATES_DTYPE
#define MLA_REGISTERS 96
#ifndef MLA_SCALE_PARTS
#define MLA_SCALE_PARTS 0
#define MLA_SCALE_COLUMNS 1
#define MLA_POWER_IN_LSE 0
#endif
#include "cache/local_slots.cu"
#include "cache/slots.cu"
#include "combine/combine.cu"
#include "combine/gathered.cu"
#undef MLA_DTYPE
#define MLA_DTYPE MERGE_STATES_DTYPE
#include "combine/merge_states.cu"
#include "core/claimed_part.h"
#include "decode/gathered/params.h"
#include "decode/fp8/params.h"
#include "decode/params.h"
#include "exchange/combine.cu"
#include "exchange/merge.cu"
#include "exchange/push.cu"
#include "plan/plan.cu"

#include <cstddef>

// A struct that extends another has no standard layout; its offsets are what they seem all the same.
#pragma GCC diagnostic ignored "-Winvalid-offsetof"

alignas(1024) unsigned char shared[64 * 1024];

extern "C" {

void host_plan(const int* cache_seqlens, const int* cu_seqlens_q, const int* extra_lengths, int* plan,
               const mla::PlanParams* params, bool reverse) {
    std::memset(shared, 0xA5, sizeof(shared));  // shared memory holds anything at first
    host_cuda::launch(1, mla::kPlanThreads, reverse, [=] {
        mla_plan(cache_seqlens, cu_seqlens_q, extra_lengths, plan, *params);
    });
}

void host_combine(const mla::CombineParams* params, unsigned grid, unsigned block) {
    host_cuda::launch(grid, block, false, [=] { mla_combine(*params); });
}

void host_combine_gathered(const mla::GatherCombineParams* params, unsigned grid, unsigned block) {
    host_cuda::launch(grid, block, false, [=] { mla_combine_gathered(*params); });
}

void host_merge_states(const mla::MergeStatesParams* params, unsigned grid, unsigned block) {
    host_cuda::launch(grid, block, false, [=] { mla_merge_states(*params); });
}

void host_slots(const mla::SlotsParams* params, unsigned grid, unsigned block) {
    host_cuda::launch(grid, block, false, [=] { mla_slots(*params); });
}

void host_local_slots(const mla::LocalSlotsParams* params, unsigned grid, unsigned block, bool reverse) {
    host_cuda::launch(grid, block, reverse, [=] { mla_local_slots(*params); });
}

void host_push(const mla::PushParams* params, unsigned grid, unsigned block, bool reverse) {
    host_cuda::launch(grid, block, reverse, [=] { mla_push(*params); });
}

void host_push_merge(const mla::PushMergeParams* params, unsigned grid, unsigned block, bool reverse) {
    host_cuda::launch(grid, block, reverse, [=] { mla_push_merge(*params); });
}

void host_combine_push(const mla::CombineParams* combine, const mla::PushMergeParams* params, unsigned grid, unsigned block,
                       bool reverse) {
    host_cuda::launch(grid, block, reverse, [=] { mla_combine_push(*combine, *params); });
}

void host_wait_slowly(unsigned microseconds) { mla::load_microseconds = microseconds; }

int host_claimed_part(bool second, int half_parts, int other_parts, int spare, int half_before, int other_before) {
    return mla::claimed_part(second, half_parts, other_parts, spare, half_before, other_before);
}

unsigned host_mark_for(unsigned exponent) { return mla::mark_for(exponent); }
float host_factor_of(unsigned mark) { return mla::kUsualFactor * mla::factor_of(mark); }
float host_power_in_lse(float lse) { return mla::power_in_lse(lse); }

// sizeof, then the offset of each field that Python knows by name.
int struct_layout(const char* name, int index) {
    using namespace mla;
    const std::vector<std::pair<const char*, std::vector<std::size_t>>> layouts = {
        {"PLAN_HEADER",
         {sizeof(PlanHeader), offsetof(PlanHeader, num_items), offsetof(PlanHeader, num_merges),
          offsetof(PlanHeader, num_slots), offsetof(PlanHeader, budget), offsetof(PlanHeader, num_jobs),
          offsetof(PlanHeader, claimed_parts), offsetof(PlanHeader, claims), offsetof(PlanHeader, shard)}},
        {"WORK_ITEM",
         {sizeof(WorkItem), offsetof(WorkItem, request), offsetof(WorkItem, head_block), offsetof(WorkItem, tile_begin),
          offsetof(WorkItem, tile_end), offsetof(WorkItem, seqlen_k), offsetof(WorkItem, seqlen_q),
          offsetof(WorkItem, q_begin), offsetof(WorkItem, slot)}},
        {"MERGE_ITEM",
         {sizeof(MergeItem), offsetof(MergeItem, request), offsetof(MergeItem, head_block),
          offsetof(MergeItem, seqlen_q), offsetof(MergeItem, q_begin), offsetof(MergeItem, slot_begin),
          offsetof(MergeItem, slot_count),
          offsetof(MergeItem, reserved)}},
        {"SLOTS_PARAMS",
         {sizeof(SlotsParams), offsetof(SlotsParams, tokens), offsetof(SlotsParams, block_table),
          offsetof(SlotsParams, requests), offsetof(SlotsParams, slots), offsetof(SlotsParams, block_table_stride),
          offsetof(SlotsParams, row_tokens), offsetof(SlotsParams, blocks_per_row), offsetof(SlotsParams, page_size),
          offsetof(SlotsParams, num_requests), offsetof(SlotsParams, max_pages_per_seq)}},
        {"LOCAL_SLOTS_PARAMS",
         {sizeof(LocalSlotsParams), offsetof(LocalSlotsParams, slots.tokens),
          offsetof(LocalSlotsParams, slots.block_table), offsetof(LocalSlotsParams, slots.requests),
          offsetof(LocalSlotsParams, slots.slots), offsetof(LocalSlotsParams, slots.block_table_stride),
          offsetof(LocalSlotsParams, slots.row_tokens), offsetof(LocalSlotsParams, slots.blocks_per_row),
          offsetof(LocalSlotsParams, slots.page_size), offsetof(LocalSlotsParams, slots.num_requests),
          offsetof(LocalSlotsParams, slots.max_pages_per_seq), offsetof(LocalSlotsParams, counts),
          offsetof(LocalSlotsParams, rows_per_request), offsetof(LocalSlotsParams, shard)}},
        {"PLAN_PARAMS",
         {sizeof(PlanParams), offsetof(PlanParams, batch), offsetof(PlanParams, num_parts),
          offsetof(PlanParams, blocks_per_job), offsetof(PlanParams, rows), offsetof(PlanParams, group_heads),
          offsetof(PlanParams, num_heads_kv), offsetof(PlanParams, seqlen_q), offsetof(PlanParams, total_q),
          offsetof(PlanParams, max_seqlen_k), offsetof(PlanParams, max_extra_k),
          offsetof(PlanParams, requests_per_length), offsetof(PlanParams, requests_per_extra_length),
          offsetof(PlanParams, causal), offsetof(PlanParams, shard), offsetof(PlanParams, fixed_split_tiles),
          offsetof(PlanParams, piece_overhead), offsetof(PlanParams, split_overhead),
          offsetof(PlanParams, merge_overhead), offsetof(PlanParams, packs), offsetof(PlanParams, max_jobs), offsetof(PlanParams, merges_offset),
          offsetof(PlanParams, workspace_offset), offsetof(PlanParams, table_in_shared)}},
        {"DECODE_PARAMS",
         {sizeof(DecodeParams), offsetof(DecodeParams, q_latent), offsetof(DecodeParams, q_latent_stride_batch),
          offsetof(DecodeParams, q_rope), offsetof(DecodeParams, q_rope_stride_batch),
          offsetof(DecodeParams, block_table), offsetof(DecodeParams, block_table_stride),
          offsetof(DecodeParams, out), offsetof(DecodeParams, out_stride_batch), offsetof(DecodeParams, lse),
          offsetof(DecodeParams, lse_stride_batch), offsetof(DecodeParams, partial_out),
          offsetof(DecodeParams, partial_lse), offsetof(DecodeParams, plan), offsetof(DecodeParams, num_parts),
          offsetof(DecodeParams, blocks_per_job), offsetof(DecodeParams, group_heads),
          offsetof(DecodeParams, latent_page_step), offsetof(DecodeParams, latent_head_step),
          offsetof(DecodeParams, rope_page_step), offsetof(DecodeParams, rope_head_step),
          offsetof(DecodeParams, scale_log2), offsetof(DecodeParams, empty_lse),
          offsetof(DecodeParams, plan_is_settled), offsetof(DecodeParams, second_half_share),
          offsetof(DecodeParams, second_half)}},
        {"FP8_PARAMS",
         {sizeof(Fp8Params), offsetof(Fp8Params, q_latent), offsetof(Fp8Params, q_latent_stride_batch),
          offsetof(Fp8Params, q_rope), offsetof(Fp8Params, q_rope_stride_batch),
          offsetof(Fp8Params, block_table), offsetof(Fp8Params, block_table_stride),
          offsetof(Fp8Params, out), offsetof(Fp8Params, out_stride_batch), offsetof(Fp8Params, lse),
          offsetof(Fp8Params, lse_stride_batch), offsetof(Fp8Params, partial_out),
          offsetof(Fp8Params, partial_lse), offsetof(Fp8Params, plan), offsetof(Fp8Params, num_parts),
          offsetof(Fp8Params, blocks_per_job), offsetof(Fp8Params, group_heads),
          offsetof(Fp8Params, latent_page_step), offsetof(Fp8Params, latent_head_step),
          offsetof(Fp8Params, rope_page_step), offsetof(Fp8Params, rope_head_step),
          offsetof(Fp8Params, scale_log2), offsetof(Fp8Params, empty_lse),
          offsetof(Fp8Params, plan_is_settled), offsetof(Fp8Params, second_half_share),
          offsetof(Fp8Params, second_half), offsetof(Fp8Params, latent_scale_at),
          offsetof(Fp8Params, rope_scale_at), offsetof(Fp8Params, latent_scale_value),
          offsetof(Fp8Params, rope_scale_value)}},
        {"COMBINE_PARAMS",
         {sizeof(CombineParams), offsetof(CombineParams, partial_out), offsetof(CombineParams, partial_lse),
          offsetof(CombineParams, plan), offsetof(CombineParams, out), offsetof(CombineParams, out_stride_batch),
          offsetof(CombineParams, lse), offsetof(CombineParams, lse_stride_batch),
          offsetof(CombineParams, merges_offset),
          offsetof(CombineParams, slot_rows), offsetof(CombineParams, rows), offsetof(CombineParams, group_heads),
          offsetof(CombineParams, d_v), offsetof(CombineParams, aligned), offsetof(CombineParams, empty_lse),
          offsetof(CombineParams, seqlen_q)}},
        {"GATHER_COMBINE_PARAMS",
         {sizeof(GatherCombineParams), offsetof(GatherCombineParams, partial_out), offsetof(GatherCombineParams, partial_lse),
          offsetof(GatherCombineParams, plan), offsetof(GatherCombineParams, out),
          offsetof(GatherCombineParams, out_stride_batch), offsetof(GatherCombineParams, lse),
          offsetof(GatherCombineParams, lse_stride_batch), offsetof(GatherCombineParams, merges_offset),
          offsetof(GatherCombineParams, slot_rows), offsetof(GatherCombineParams, rows),
          offsetof(GatherCombineParams, group_heads), offsetof(GatherCombineParams, d_v),
          offsetof(GatherCombineParams, aligned), offsetof(GatherCombineParams, empty_lse),
          offsetof(GatherCombineParams, seqlen_q), offsetof(GatherCombineParams, attn_sink)}},
        {"GATHER_PARAMS",
         {sizeof(GatherParams), offsetof(GatherParams, q), offsetof(GatherParams, q_stride_batch), offsetof(GatherParams, kv),
          offsetof(GatherParams, kv_stride_head), offsetof(GatherParams, indices),
          offsetof(GatherParams, indices_stride_batch), offsetof(GatherParams, topk_length),
          offsetof(GatherParams, topk_length_stride), offsetof(GatherParams, out), offsetof(GatherParams, out_stride_batch),
          offsetof(GatherParams, lse), offsetof(GatherParams, lse_stride_batch), offsetof(GatherParams, max_logits),
          offsetof(GatherParams, max_logits_stride_token), offsetof(GatherParams, attn_sink),
          offsetof(GatherParams, partial_out), offsetof(GatherParams, partial_lse), offsetof(GatherParams, plan),
          offsetof(GatherParams, kv_stride_page), offsetof(GatherParams, kv_stride_token), offsetof(GatherParams, num_slots),
          offsetof(GatherParams, topk), offsetof(GatherParams, num_tokens), offsetof(GatherParams, num_parts),
          offsetof(GatherParams, blocks_per_job), offsetof(GatherParams, group_heads), offsetof(GatherParams, seqlen_q),
          offsetof(GatherParams, scale_log2), offsetof(GatherParams, empty_lse), offsetof(GatherParams, plan_is_settled),
          offsetof(GatherParams, second_half_share), offsetof(GatherParams, second_half), offsetof(GatherParams, kv_scale_value),
          offsetof(GatherParams, kv_scale_at), offsetof(GatherParams, q_rope), offsetof(GatherParams, q_rope_stride_batch),
          offsetof(GatherParams, kv_rope), offsetof(GatherParams, kv_rope_stride_head),
          offsetof(GatherParams, kv_rope_stride_page), offsetof(GatherParams, extra_num_slots),
          offsetof(GatherParams, extra_kv), offsetof(GatherParams, extra_kv_stride_head),
          offsetof(GatherParams, extra_indices), offsetof(GatherParams, extra_indices_stride_batch),
          offsetof(GatherParams, extra_kv_stride_page), offsetof(GatherParams, extra_kv_stride_token)}},
        {"MEETINGS",
         {sizeof(Meetings), offsetof(Meetings, memories), offsetof(Meetings, flags), offsetof(Meetings, calls),
          offsetof(Meetings, world), offsetof(Meetings, rank)}},
        {"PUSH_PARAMS",
         {sizeof(PushParams), offsetof(PushParams, from), offsetof(PushParams, from_stride0), offsetof(PushParams, to),
          offsetof(PushParams, to_stride0), offsetof(PushParams, packets), offsetof(PushParams, size0),
          offsetof(PushParams, chunks), offsetof(PushParams, starts_next), offsetof(PushParams, unused),
          offsetof(PushParams, meetings)}},
        {"PUSH_MERGE_PARAMS",
         {sizeof(PushMergeParams), offsetof(PushMergeParams, outs), offsetof(PushMergeParams, lses),
          offsetof(PushMergeParams, received_outs), offsetof(PushMergeParams, received_lses),
          offsetof(PushMergeParams, out), offsetof(PushMergeParams, out_stride0), offsetof(PushMergeParams, lse),
          offsetof(PushMergeParams, lse_stride0), offsetof(PushMergeParams, packets), offsetof(PushMergeParams, size0),
          offsetof(PushMergeParams, d_v), offsetof(PushMergeParams, places), offsetof(PushMergeParams, aligned),
          offsetof(PushMergeParams, meetings)}},
        {"MERGE_STATES_PARAMS",
         {sizeof(MergeStatesParams), offsetof(MergeStatesParams, outs), offsetof(MergeStatesParams, outs_stride_state),
          offsetof(MergeStatesParams, lses), offsetof(MergeStatesParams, lses_stride_state),
          offsetof(MergeStatesParams, out), offsetof(MergeStatesParams, out_stride0), offsetof(MergeStatesParams, lse),
          offsetof(MergeStatesParams, lse_stride0), offsetof(MergeStatesParams, num_states),
          offsetof(MergeStatesParams, size0), offsetof(MergeStatesParams, d_v), offsetof(MergeStatesParams, aligned)}},
    };
    for (const auto& layout : layouts) {
        if (std::strcmp(layout.first, name) == 0) {
            return index < static_cast<int>(layout.second.size()) ? static_cast<int>(layout.second[index]) : -1;
        }
    }
    return -1;
}

int kernel_constant(const char* name) {
    using namespace mla;
    const std::vector<std::pair<const char*, int>> constants = {
        {"PLAN_THREADS", kPlanThreads},
        {"MERGE_STATES_THREADS", kMergeStatesThreads},
        {"EXCHANGE_THREADS", kExchangeThreads},
        {"TILE_TOKENS", kTileTokens},
        {"TILE_COST", kTileCost},
        {"_WHOLE_SHARE", kWholeShare},
        {"CLAIM_TILES", kClaimTiles},
        {"MAX_SMS", kMaxSms},
        {"WARP_THREADS", kWarpThreads},
        {"WARPGROUP_THREADS", kWarpgroupThreads},
        {"MAX_SHARED_BYTES", kMaxSharedBytes},
        {"CTA_SHARED_BYTES", kCtaSharedBytes},
        {"OCTET", kOctet},
        {"_UNIT_OCTETS", kUnitOctets},
        {"WHOLE_JOB", kWholeJob},
        {"_JOB_COLUMNS", JobTable::kColumns},
        {"_SCRATCH_BYTES", static_cast<int>(sizeof(PlanScratch))},
        {"_SECTION_INTS", kPlanSectionInts},
        {"_MIN_HEAD", kMinHead},
        {"_MAX_PACKED_JOBS", kMaxPackedJobs},
        {"_PACKED_PARTS_PER_JOB", kPackedPartsPerJob},
        {"_PACKED_STEP", kPackedStep},
        {"_MIN_HEAD_SHARE", kMinHeadShare},
        {"WHOLE_KEYS", static_cast<int>(kWholeKeys)},
        {"SHARD_RANK_SHIFT", static_cast<int>(kShardRankShift)},
        {"SHARD_INTERLEAVE_SHIFT", static_cast<int>(kShardInterleaveShift)},
        {"SM_WORDS", kSmWords},
        {"HALF_SHARE_UNIT", 1 << kHalfShareShift},
    };
    for (const auto& constant : constants) {
        if (std::strcmp(constant.first, name) == 0) return constant.second;
    }
    return -1;
}

}  // extern "C"
