// A CTA's share of a work item: which query rows, which KV tiles, which keys each row may see.
#pragma once
#include "decode/config.h"
#include "core/softmax.h"
#include "decode/params.h"

namespace mla {

struct BlockWork {
    i32 request, kv_head;
    i32 first_row;   // of this CTA, among the request's seqlen_q * group_heads rows of the kv head
    i32 num_rows;    // of the request; rows past it are padding
    i32 tile_begin, tile_end;
    i32 seqlen_k, seqlen_q, q_begin, slot;

    MLA_DEVICE bool exists() const { return first_row < num_rows; }
    MLA_DEVICE bool has_tiles() const { return exists() && tile_begin < tile_end; }
    MLA_DEVICE bool is_partial() const { return slot != kWholeJob; }
    // Keys before this index are visible to query token `token`.
    MLA_DEVICE i32 visible_end(i32 token) const {
        return kCausal ? seqlen_k - seqlen_q + token + 1 : seqlen_k;
    }
};

// The grid is (blocks_per_job, num_parts): CTAs of one job are neighbours, read the same tiles at about the same time and
// so share them in L2. The number comes from a special register, not from one that the accumulators need.
MLA_DEVICE i32 block_in_job() { return blockIdx.x; }

// The planner leaves out tiles that the whole job may not see; a row block of a causal job may still be given a tile that
// is hidden from all its rows, and masks it.
MLA_DEVICE BlockWork load_block_work(const DecodeParams& params, i32 item_index) {
    const int4* words = reinterpret_cast<const int4*>(plan_items(params.plan, params.num_parts) + item_index);
    const int4 a = words[0];
    const int4 b = words[1];
    BlockWork work;
    work.request = a.x;
    work.kv_head = kv_head_of(a.y);
    work.first_row = (first_row_block_of(a.y) + block_in_job()) * static_cast<i32>(kRows);
    work.tile_begin = a.z;
    work.tile_end = a.w;
    work.seqlen_k = b.x;
    work.seqlen_q = b.y;
    work.q_begin = b.z;
    work.slot = b.w;
    work.num_rows = work.seqlen_q * params.group_heads;
    return work;
}

// Where one query row's data lies.
struct RowPlace {
    i32 token, head;  // query token within the request, query head
    bool exists;
};

MLA_DEVICE RowPlace locate_row(const DecodeParams& params, const BlockWork& work, i32 row_in_block) {
    const i32 row = work.first_row + row_in_block;
    const i32 token = row / params.group_heads;
    return {token, work.kv_head * params.group_heads + row - token * params.group_heads, row < work.num_rows};
}

// The lse of a row that sees no key. In a partial result it is the merge's neutral element, whatever the user asks for.
MLA_DEVICE f32 empty_lse(const DecodeParams& params, const BlockWork& work) {
    return work.is_partial() ? minus_infinity() : params.empty_lse;
}

// A row of D_v elements in a partial slot, which holds values of type T.
template <class T>
MLA_DEVICE T* partial_row(const DecodeParams& params, const BlockWork& work, i32 row_in_block) {
    const i64 slot_rows = static_cast<i64>(params.blocks_per_job) * kRows;
    const i64 row = work.slot * slot_rows + block_in_job() * static_cast<i32>(kRows) + row_in_block;
    return static_cast<T*>(params.partial_out) + row * kLatent;
}

// A row of D_v 16-bit elements: of the user's array, or of this job's partial slot.
MLA_DEVICE u16* output_row(const DecodeParams& params, const BlockWork& work, i32 row_in_block) {
    if (!kPartialIsFloat && work.is_partial()) return partial_row<u16>(params, work, row_in_block);
    const RowPlace place = locate_row(params, work, row_in_block);
    return params.out + work.request * params.out_stride_batch + (work.q_begin + place.token) * params.out_stride_seq +
           place.head * params.out_stride_head;
}

MLA_DEVICE f32* lse_row(const DecodeParams& params, const BlockWork& work, i32 row_in_block) {
    if (work.is_partial()) {
        const i64 slot_rows = static_cast<i64>(params.blocks_per_job) * kRows;
        return params.partial_lse + work.slot * slot_rows + block_in_job() * static_cast<i32>(kRows) + row_in_block;
    }
    const RowPlace place = locate_row(params, work, row_in_block);
    return params.lse + work.request * params.lse_stride_batch + (work.q_begin + place.token) * params.lse_stride_seq +
           place.head * params.lse_stride_head;
}

}  // namespace mla
