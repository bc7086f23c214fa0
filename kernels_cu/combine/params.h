// The merging kernels' by-value parameters. cupy_mla/kernels/structs.py mirrors them; a test compares the two.
#pragma once
#include "core/types.h"

namespace mla {

// Strides in elements. T is the 16-bit type the kernel is compiled for.
struct CombineParams {
    const void* partial_out;  // MLA_PARTIAL [slots, slot_rows, d_v], normalised
    const f32* partial_lse;  // [slots, kRowWords, slot_rows], natural logarithms, -inf: nothing seen; core/partial_format.h
    const i32* plan;         // core/plan_format.h
    u16* out;                // T [batch, seqlen_q, heads, d_v] or ragged [total_q, heads, d_v] (batch stride 0)
    i64 out_stride_batch, out_stride_seq, out_stride_head;
    f32* lse;  // [batch, heads, seqlen_q] or ragged [heads, total_q]
    i64 lse_stride_batch, lse_stride_seq, lse_stride_head;
    i32 merges_offset;  // in the plan, ints
    i32 slot_rows;      // blocks_per_job * rows
    i32 rows;           // of a row block
    i32 group_heads;    // query heads per kv head
    i32 d_v;            // a multiple of 8
    i32 aligned;        // 1: every row of out begins at a multiple of 16 bytes
    f32 empty_lse;      // lse of a row that sees no key
    i32 seqlen_q;       // GatherCombineParams only: query tokens of a batch entry, each a request of the plan
};

struct GatherCombineParams : CombineParams {
    const f32* attn_sink;  // [heads], natural logarithm: out becomes out * exp(lse) / (exp(lse) + exp(sink)). Null: none
};

// n partial states of rows that three indices name, whatever they mean to the caller. T is the kernel's type.
struct MergeStatesParams {
    const u8* outs;  // T [n, size0, size1, size2, d_v]
    i64 outs_stride_state, outs_stride0, outs_stride1, outs_stride2;
    const f32* lses;  // [n, size0, size1, size2]
    i64 lses_stride_state, lses_stride0, lses_stride1, lses_stride2;
    u8* out;  // T [size0, size1, size2, d_v]
    i64 out_stride0, out_stride1, out_stride2;
    f32* lse;  // [size0, size1, size2]
    i64 lse_stride0, lse_stride1, lse_stride2;
    i32 num_states;
    i32 size0, size1, size2;
    i32 d_v;      // a multiple of 8
    i32 aligned;  // 1: every row of outs and out begins at a multiple of 16 bytes
};

static_assert(sizeof(CombineParams) == 11 * sizeof(i64) + 8 * sizeof(i32), "no padding");
static_assert(sizeof(GatherCombineParams) == sizeof(CombineParams) + sizeof(i64), "no padding");
static_assert(sizeof(MergeStatesParams) == 18 * sizeof(i64) + 6 * sizeof(i32), "no padding");

}  // namespace mla
