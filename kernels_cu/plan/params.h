// The planner's by-value parameters. cupy_mla/kernels/structs.py mirrors them; a test compares the two.
#pragma once
#include "core/types.h"

namespace mla {

struct PlanParams {
    i32 batch;
    i32 num_parts;
    i32 blocks_per_job;
    i32 rows;  // query rows of a row block
    i32 group_heads;
    i32 num_heads_kv;
    i32 seqlen_q;  // the largest of any request
    i32 total_q;   // rows of a ragged q; batch * seqlen_q otherwise
    i32 max_seqlen_k;
    i32 max_extra_k;  // of a second list of keys; kOneList: there is none
    i32 requests_per_length;        // that share an entry of cache_seqlens
    i32 requests_per_extra_length;  // that share an entry of extra_lengths
    i32 causal;              // 0 or 1
    u32 shard;               // core/shard.h; of sharded keys lengths and max_seqlen_k are those of whole requests
    i32 fixed_split_tiles;   // 0: split where the load asks for it
    i32 piece_overhead;      // these three in 1/16 tile, see PieceCosts in cupy_mla/schedule/pieces.py
    i32 split_overhead;
    i32 merge_overhead;
    i32 packs;               // 0 or 1, also from there
    i32 max_jobs;
    i32 merges_offset;       // in the plan buffer, ints
    i32 workspace_offset;
    i32 table_in_shared;  // 1: the job table lies in dynamic shared memory and the plan has no workspace
};

static_assert(sizeof(PlanParams) == 23 * sizeof(i32), "no padding");

}  // namespace mla
