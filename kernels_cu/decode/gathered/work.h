// Work of the kernels of gathered tokens: which items a CTA takes and what an item is. With a plan, as in dense decode; or by a
// static schedule, which deals out the query tokens to the parts in turn.
#pragma once
#include "decode/entry.h"
#include "decode/gathered/params.h"
#include "decode/gathered/part_items.h"
#include "decode/rows.h"
#include "ptx/cluster.h"

namespace mla {

constexpr bool kIsPlanned = MLA_PLANNED;
constexpr bool kByRequest = MLA_BY_REQUEST;  // decode/gathered/params.h
static_assert(!kByRequest || kIsPlanned, "requests are planned");
constexpr bool kHasExtra = MLA_EXTRA_PAGE_SIZE > 0;  // whether there is a second cache, with a list of tokens of its own
constexpr u32 kExtraPageSize = kHasExtra ? MLA_EXTRA_PAGE_SIZE : 1;
// Whether a static item is shared by the CTAs of a cluster: decode/gathered/cluster.h.
constexpr bool kIsClustered = MLA_CLUSTERED;
static_assert(!kIsClustered || !kIsPlanned, "a plan cuts its own jobs");
static_assert(!kHasExtra || (kIsPlanned && !kByRequest), "only sparse decode has two lists");

// A static item is a query token. The grid is (row blocks of a kv head, parts, kv heads): the CTAs of a token are neighbours. In
// clusters there is one for each row block, whose CTAs take as many of the item's tiles each.
MLA_DEVICE BlockWork static_block_work(const GatherParams& params, i32 token) {
    BlockWork work;
    work.request = token;
    work.q_begin = 0;
    work.kv_head = blockIdx.z;
    work.first_row = static_cast<i32>((kIsClustered ? cluster_index() : block_in_job()) * kRows);
    // Else the compiler computes the rows' addresses once and keeps them, for which no registers are left.
    pin_register(work.request);
    pin_register(work.first_row);
    work.num_rows = params.group_heads;
    work.seqlen_q = 1;
    work.seqlen_k = params.topk;
    if (params.topk_length != nullptr)
        work.seqlen_k = clamp_i32(__ldg(params.topk_length + token * params.topk_length_stride), 0, params.topk);
    work.tile_begin = 0;
    work.tile_end = ceil_div(work.seqlen_k, kTileTokens);
    work.slot = kWholeJob;
    if constexpr (kIsClustered) {
        const i32 tiles = work.tile_end, rank = cluster_rank(), ctas = cluster_size();
        work.tile_begin = tiles * rank / ctas;
        work.tile_end = tiles * (rank + 1) / ctas;
        work.slot = 0;  // of the only job, in shared memory
    }
    return work;
}

MLA_DEVICE BlockWork load_block_work(const GatherParams& params, i32 item) {
    if constexpr (kIsPlanned) {
        pin_register(item);
        BlockWork work = planned_block_work(params, item_words(params, item));
        if constexpr (kHasExtra) {
            work.first_list = work.q_begin;
            work.q_begin = 0;
        }
        if (!kByRequest && params.seqlen_q > 1) {
            const i32 token = work.request;
            work.request = token / params.seqlen_q;
            work.q_begin = token - work.request * params.seqlen_q;
        }
        return work;
    } else {
        return static_block_work(params, item);
    }
}

// Rows of a job are heads of one query token; by request, of all of its query tokens.
MLA_DEVICE RowPlace locate_row(const GatherParams& params, const BlockWork& work, i32 row_in_block) {
    const i32 row = work.first_row + row_in_block;
    if constexpr (kByRequest) {
        const u32 token = static_cast<u32>(row) / static_cast<u32>(params.group_heads);
        return {static_cast<i32>(token), work.kv_head * params.group_heads + row - static_cast<i32>(token) * params.group_heads,
                row < work.num_rows};
    }
    return {0, work.kv_head * params.group_heads + row, row < work.num_rows};
}

MLA_DEVICE QueryRow query_row(const GatherParams& params, const BlockWork& work, i32 row_in_block, u32 column) {
    const RowPlace place = locate_row(params, work, row_in_block);
    QueryRow row;
    const i64 token = work.q_begin + place.token;
    row.exists = place.exists;
    row.latent = params.q + work.request * params.q_stride_batch + token * params.q_stride_seq +
                 place.head * params.q_stride_head + column;
    row.rope = row.latent + kLatent;
    if constexpr (kByRequest)
        row.rope = params.q_rope + work.request * params.q_rope_stride_batch + token * params.q_rope_stride_seq +
                   place.head * params.q_rope_stride_head + column;
    return row;
}

// In a cluster, what a CTA leaves there of a row besides its output. decode/gathered/cluster.h and the kernels say where.
constexpr u32 kLseOfRow = 0, kLargestOfRow = 1, kRowValues = 2;
MLA_DEVICE f32* row_value(u32 which, i32 row_in_block);

MLA_DEVICE f32* lse_row(const GatherParams& params, const BlockWork& work, i32 row_in_block) {
#if MLA_CLUSTERED  // other kernels need not say where
    if (work.is_partial()) return row_value(kLseOfRow, row_in_block);
#endif
    return lse_row<GatherParams>(params, work, row_in_block);
}

// Where the largest score of a row that exists goes.
MLA_DEVICE f32* max_logit(const GatherParams& params, const BlockWork& work, i32 row_in_block) {
#if MLA_CLUSTERED
    if (work.is_partial()) return row_value(kLargestOfRow, row_in_block);
#endif
    const RowPlace place = locate_row(params, work, row_in_block);
    return params.max_logits + work.request * params.max_logits_stride_token + place.head * params.max_logits_stride_head;
}

struct NothingAhead {};

// The items of this CTA: first(), first() + step(), ... below end(). From where they are written each time: no registers are
// left to keep them in.
class Items {
public:
    // All threads call this, once; the first one runs `prepare`. decode/entry.h. With a plan that is settled all run `ahead`, if there
    // is something to do, with the first item, while the kernel ahead of this one may still run.
    template <class Prepare, class Ahead = NothingAhead>
    MLA_DEVICE Items(const GatherParams& params, u8* slot, Prepare prepare, Ahead ahead = {})
        : params_(params), part_(reinterpret_cast<volatile i32*>(slot) + 1) {
        if constexpr (kIsPlanned && kPartItems > 0) {
            static_assert(kSameType<Ahead, NothingAhead>, "kernels that keep items read none ahead");
            keep_items(params, enter(params, slot, prepare));
            pdl_wait();
        } else if constexpr (kIsPlanned) {
            const i32 part = enter(params, slot, prepare) - plan_part_begin(params.plan);
            if (threadIdx.x == 0) *part_ = part;
            if constexpr (!kSameType<Ahead, NothingAhead>) {
                const i32 item = plan_part_begin(params.plan)[part];
                if (item < plan_part_begin(params.plan)[part + 1]) opened_ = load_block_work(params, item);
                __syncthreads();
                if (params.plan_is_settled) ahead(opened_);
                pdl_wait();
                return;
            }
            pdl_wait();
        } else {
            if (threadIdx.x == 0) prepare();
            // Clusters with the query tokens after these may start on SMs that have no more work.
            if constexpr (!kIsClustered && kSameType<Stored, Output>) pdl_launch_dependents();
        }
        __syncthreads();
    }

    // The first item, if there was something to do ahead. It lies in registers: roles ask for it as they begin, or not at all.
    MLA_DEVICE const BlockWork& opened() const { return opened_; }

    MLA_DEVICE i32 first() const {
        if constexpr (kIsPlanned && kPartItems > 0) return kept_items()->begin;
        return kIsPlanned ? plan_part_begin(params_.plan)[*part_] : blockIdx.y;
    }
    MLA_DEVICE i32 end() const {
        if constexpr (kIsPlanned && kPartItems > 0) return kept_items()->end;
        return kIsPlanned ? plan_part_begin(params_.plan)[*part_ + 1] : params_.num_tokens;
    }
    MLA_DEVICE i32 step() const { return kIsPlanned ? 1 : gridDim.y; }

private:
    const GatherParams& params_;
    volatile i32* part_;
    BlockWork opened_{};
};

}  // namespace mla
