// Where the query rows of a CTA lie: in q, in the output, in partial results. Params: DecodeParams or GatherParams, whose
// members for these have the same names.
#pragma once
#include "core/partial_format.h"
#include "core/softmax.h"
#include "decode/work_item.h"
#include "ptx/warp.h"

namespace mla {

struct RowPlace {
    i32 token, head;  // query token within the request, query head
    bool exists;
};

template <class Params>
MLA_DEVICE RowPlace locate_row(const Params& params, const BlockWork& work, i32 row_in_block) {
    const i32 row = work.first_row + row_in_block;
    const i32 token = row / params.group_heads;
    return {token, work.kv_head * params.group_heads + row - token * params.group_heads, row < work.num_rows};
}

MLA_DEVICE bool row_exists(const BlockWork& work, i32 row_in_block) {
    return work.first_row + row_in_block < work.num_rows;
}

// The two parts of a row of q, from a column of each on.
struct QueryRow {
    const u16* latent;
    const u16* rope;
    bool exists;

    MLA_DEVICE uint4 load_latent(u32 column) const { return load(latent + column); }
    MLA_DEVICE uint4 load_rope(u32 column) const { return load(rope + column); }

private:
    // Eight values; zeros for a row that does not exist.
    MLA_DEVICE uint4 load(const u16* source) const {
        return exists ? __ldg(reinterpret_cast<const uint4*>(source)) : uint4{0, 0, 0, 0};
    }
};

template <class Params>
MLA_DEVICE QueryRow query_row(const Params& params, const BlockWork& work, i32 row_in_block, u32 column) {
    const RowPlace place = locate_row(params, work, row_in_block);
    const i64 token = work.q_begin + place.token;
    QueryRow row;
    row.exists = place.exists;
    row.latent = params.q_latent + work.request * params.q_latent_stride_batch + token * params.q_latent_stride_seq +
                 place.head * params.q_latent_stride_head + column;
    row.rope = params.q_rope + work.request * params.q_rope_stride_batch + token * params.q_rope_stride_seq +
               place.head * params.q_rope_stride_head + column;
    return row;
}

template <class Params>
MLA_DEVICE i64 slot_rows(const Params& params) {
    return static_cast<i64>(params.blocks_per_job) * kRows;
}

// A row of D_v elements in a partial slot, which holds values of type T.
template <class T, class Params>
MLA_DEVICE T* partial_row(const Params& params, const BlockWork& work, i32 row_in_block) {
    const i64 row = work.slot * slot_rows(params) + block_in_job() * static_cast<i32>(kRows) + row_in_block;
    return static_cast<T*>(params.partial_out) + row * kLatent;
}

// A row of D_v 16-bit elements: of the user's array, or of this job's partial slot.
template <class Params>
MLA_DEVICE u16* output_row(const Params& params, const BlockWork& work, i32 row_in_block) {
    if (!kPartialIsFloat && work.is_partial()) return partial_row<u16>(params, work, row_in_block);
    const RowPlace place = locate_row(params, work, row_in_block);
    return params.out + work.request * params.out_stride_batch + (work.q_begin + place.token) * params.out_stride_seq +
           place.head * params.out_stride_head;
}

template <class Params>
MLA_DEVICE f32* lse_row(const Params& params, const BlockWork& work, i32 row_in_block) {
    if (work.is_partial()) {
        const i64 first = work.slot * slot_rows(params) * kRowWords;
        const i64 row = first + block_in_job() * static_cast<i32>(kRows) + row_in_block;
        return params.partial_lse + row;
    }
    const RowPlace place = locate_row(params, work, row_in_block);
    return params.lse + work.request * params.lse_stride_batch + (work.q_begin + place.token) * params.lse_stride_seq +
           place.head * params.lse_stride_head;
}

// The lse of a row that sees no key. In a partial result it is the merge's neutral element, whatever the user asks for.
template <class Params>
MLA_DEVICE f32 empty_lse(const Params& params, const BlockWork& work) {
    return work.is_partial() ? minus_infinity() : params.empty_lse;
}

// An lse as it is stored: of a partial result, it says by what the values are divided (core/partial_format.h). -inf is left as
// it is: its values count for nothing.
MLA_DEVICE f32 mark_lse(const BlockWork& work, f32 lse, u32 mark) {
    if (!kPartialIsScaled || !work.is_partial() || lse == minus_infinity()) return lse;
    return __uint_as_float((__float_as_uint(lse) & ~kMarkMask) | mark);
}

// From a row's running maximum, in log2 units, and its sum of 2^(score - maximum).
template <class Params>
MLA_DEVICE f32 lse_of(const Params& params, const BlockWork& work, f32 maximum, f32 sum) {
    return sum == 0.0f ? empty_lse(params, work) : (maximum + fast_log2(sum)) * kLn2;
}

}  // namespace mla
