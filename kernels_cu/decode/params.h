// The decode kernels' by-value parameters. cupy_mla/kernels/structs.py mirrors DecodeParams; a test compares the two.
#pragma once
#include "core/hopper.h"
#include "core/plan_format.h"
#include "core/types.h"

namespace mla {

constexpr i32 kSmWords = kMaxSms / 32;
constexpr i32 kHalfShareShift = 16;

// Strides in elements. T is the configuration's 16-bit type; D_v = latent width.
struct DecodeParams {
    const u16* q_latent;  // T [batch, seqlen_q, heads, latent] or ragged [total_q, heads, latent] (batch stride 0)
    i64 q_latent_stride_batch, q_latent_stride_seq, q_latent_stride_head;
    const u16* q_rope;  // T [..., rope]
    i64 q_rope_stride_batch, q_rope_stride_seq, q_rope_stride_head;
    const i32* block_table;  // [batch, max_pages_per_seq]
    i64 block_table_stride;
    u16* out;  // T [batch, seqlen_q, heads, D_v] or ragged [total_q, heads, D_v]
    i64 out_stride_batch, out_stride_seq, out_stride_head;
    f32* lse;  // [batch, heads, seqlen_q] or ragged [heads, total_q], natural logarithm
    i64 lse_stride_batch, lse_stride_seq, lse_stride_head;
    void* partial_out;  // Partial [slots, blocks_per_job * rows, D_v], normalised; decode/config.h has the type
    f32* partial_lse;  // [slots, kRowWords, blocks_per_job * rows], natural logarithms: core/partial_format.h
    i32* plan;         // core/plan_format.h; only its `claims` is written, and is 0 again at the end
    i32 num_parts;
    i32 blocks_per_job;
    i32 group_heads;  // query heads per kv head
    i32 latent_page_step, latent_head_step;  // source/paged.h
    i32 rope_page_step, rope_head_step;
    f32 scale_log2;   // softmax_scale * log2(e): the softmax works in powers of two
    f32 empty_lse;    // lse of a row that sees no key: -inf, or +inf as FlashMLA has it
    i32 plan_is_settled;  // 1: the plan was complete before the kernel ahead of this one began
    i32 second_half_share;  // of all SMs, in 1 / 2^kHalfShareShift; 0: nobody claims. decode/claim.h
    u32 second_half[kSmWords];  // a bit for each of its SMs
};

}  // namespace mla
