// From lengths to jobs: which jobs a request has and how many KV tiles each sees.
#pragma once
#include "core/plan_format.h"
#include "plan/params.h"

namespace mla {

// One row per job; columns are arrays of max_jobs ints each.
struct JobTable {
    static constexpr i32 kColumns = 7;
    i32* tiles;
    i32* request;
    i32* head_block;
    i32* part;        // the Fill that the job meets
    i32* left;
    i32* item_begin;  // its first work item
    i32* slot_begin;  // its first partial slot, or kWholeJob

    MLA_DEVICE JobTable(i32* base, i32 max_jobs)
        : tiles(base),
          request(base + max_jobs),
          head_block(base + 2 * max_jobs),
          part(base + 3 * max_jobs),
          left(base + 4 * max_jobs),
          item_begin(base + 5 * max_jobs),
          slot_begin(base + 6 * max_jobs) {}
};

struct PlanInputs {
    const i32* cache_seqlens;  // [batch / requests_per_length], or null: all are the longest
    const i32* cu_seqlens_q;   // [batch + 1], or null: every request has params.seqlen_q tokens
    const i32* extra_lengths;  // [batch / requests_per_extra_length] of the second list of keys, or null: all are the longest
};

constexpr i32 kOneList = -1;  // PlanParams::max_extra_k

struct Request {
    i32 seqlen_k, seqlen_q, q_begin;
    i32 first_list;  // keys of the first list, where there are two
    i32 total_k;     // as the arrays say it; of sharded keys seqlen_k is the rank's share
};

MLA_DEVICE i32 load_length(const i32* lengths, i32 requests_per_length, i32 longest, i32 index) {
    if (lengths == nullptr) return longest;
    return clamp_i32(lengths[requests_per_length == 1 ? index : index / requests_per_length], 0, longest);
}

// Whatever the arrays hold, what comes out stays within the plan's maxima: nothing past an array is ever addressed.
MLA_DEVICE Request load_request(const PlanParams& params, const PlanInputs& inputs, i32 index) {
    Request request{load_length(inputs.cache_seqlens, params.requests_per_length, params.max_seqlen_k, index),
                    params.seqlen_q, 0, 0, 0};
    request.total_k = request.seqlen_k;
    if (params.shard != kWholeKeys) request.seqlen_k = unpack_shard(params.shard).count(request.total_k);
    if (params.max_extra_k != kOneList) {
        // The second list begins with a tile of its own.
        request.first_list = request.seqlen_k;
        request.seqlen_k = ceil_div(request.first_list, kTileTokens) * kTileTokens +
                           load_length(inputs.extra_lengths, params.requests_per_extra_length, params.max_extra_k, index);
    }
    if (inputs.cu_seqlens_q != nullptr) {
        request.q_begin = clamp_i32(inputs.cu_seqlens_q[index], 0, params.total_q);
        const i32 end = clamp_i32(inputs.cu_seqlens_q[index + 1], request.q_begin, params.total_q);
        request.seqlen_q = min_i32(end - request.q_begin, params.seqlen_q);
    }
    return request;
}

// Jobs of one kv head of a request.
MLA_DEVICE i32 jobs_of_head(const PlanParams& params, i32 seqlen_q) {
    return ceil_div(seqlen_q * params.group_heads, params.rows * params.blocks_per_job);
}

// KV tiles that the last query token of a job sees.
MLA_DEVICE i32 job_tiles(const PlanParams& params, const Request& request, i32 first_row_block) {
    i32 visible = request.seqlen_k;
    if (params.causal) {
        const i32 end_row =
            min_i32((first_row_block + params.blocks_per_job) * params.rows, request.seqlen_q * params.group_heads);
        const i32 last_token = (end_row - 1) / params.group_heads;
        const i32 hidden = request.seqlen_q - last_token - 1;
        visible = params.shard == kWholeKeys ? max_i32(visible - hidden, 0)
                                             : unpack_shard(params.shard).count(max_i32(request.total_k - hidden, 0));
    }
    return ceil_div(visible, kTileTokens);
}

// Job `index` of a request, by kv head and then by row blocks, becomes row `job` of the table. Returns its tiles.
MLA_DEVICE i32 write_job(const PlanParams& params, const JobTable& table, const Request& request, i32 request_index,
                         i32 index, i32 job) {
    const i32 per_head = jobs_of_head(params, request.seqlen_q);
    const i32 kv_head = index / per_head;
    const i32 first_row_block = (index - kv_head * per_head) * params.blocks_per_job;
    const i32 tiles = job_tiles(params, request, first_row_block);
    table.tiles[job] = tiles;
    table.request[job] = request_index;
    table.head_block[job] = pack_head_block(kv_head, first_row_block);
    return tiles;
}

}  // namespace mla
