// What a kernel of gathered tokens takes by value. cupy_mla/kernels/structs.py mirrors GatherParams; a test
// compares the two.
//
// Every query token attends to tokens of its own, which its row of `indices` names by their slots in the cache: page *
// page_size + offset. -1 and every other number outside the cache is no token. To the plan each query token is a request of
// one token, in the order of [batch, seqlen_q], and the places in its row are its keys. "static": of the schedule without a plan.
//
// There may be a second cache: the tokens of its list follow those of the first, from the next tile on (core/plan_format.h).
//
// "By request": dense decode over pages of one token, or of FP8 rows. The block table is the indices, the same for all query
// tokens of a request, or the pages of these, and the plan is that of dense decode; queries may be ragged, latent and rope parts arrays of their own.
#pragma once
#include "core/plan_format.h"
#include "decode/params.h"

namespace mla {

// Strides in elements unless said. T is the configuration's 16-bit type; D_v = latent width.
struct GatherParams {
    const u16* q;  // T [batch, seqlen_q, heads, latent + rope]
    i64 q_stride_batch, q_stride_seq, q_stride_head;
    const u8* kv;         // T [num_pages, page_size, num_heads_kv, latent + rope], or bytes as a codec (codec/codec.h) has them;
                          // rows begin at multiples of 16 bytes
    i64 kv_stride_head;   // bytes
    const i32* indices;   // [batch, seqlen_q, num_heads_kv, topk]
    i64 indices_stride_batch, indices_stride_seq, indices_stride_head;
    const i32* topk_length;  // static: [num_tokens], how many leading indices count; null: all
    i64 topk_length_stride;
    u16* out;  // T [batch, seqlen_q, heads, D_v]
    i64 out_stride_batch, out_stride_seq, out_stride_head;
    f32* lse;  // [batch, heads, seqlen_q], natural logarithm
    i64 lse_stride_batch, lse_stride_seq, lse_stride_head;
    f32* max_logits;  // static: [num_tokens, heads], largest scaled score, natural logarithm; null: not wanted
    i64 max_logits_stride_token, max_logits_stride_head;
    const f32* attn_sink;  // [heads], natural logarithm; null: none. Partial results are left alone: the merge applies it
    void* partial_out;     // Partial [slots, blocks_per_job * rows, D_v], normalised
    f32* partial_lse;      // [slots, kRowWords, blocks_per_job * rows], natural logarithms: core/partial_format.h
    i32* plan;             // core/plan_format.h; only its `claims` is written, and is 0 again at the end
    u32 kv_stride_page, kv_stride_token;  // in 16 bytes
    u32 num_slots;       // num_pages * page_size
    i32 topk;            // static: indices of a query token
    i32 num_tokens;      // static: query tokens; their stride is that of batch, and seqlen_q is 1
    i32 num_parts;       // planned, as blocks_per_job
    i32 blocks_per_job;
    i32 group_heads;     // query heads per kv head
    i32 seqlen_q;        // planned: query tokens of a batch entry
    f32 scale_log2;      // softmax_scale * log2(e): the softmax works in powers of two
    f32 empty_lse;       // lse of a row that sees no key: -inf, or +inf as FlashMLA has it
    i32 plan_is_settled;    // 1: the plan was complete before the kernel ahead of this one began
    i32 second_half_share;  // decode/claim.h, also the next
    u32 second_half[kSmWords];
    f32 kv_scale_value;      // of an e4m3 cache with one scale, where there is no address of it
    const f32* kv_scale_at;
    const u16* q_rope;  // by request, also the next; those above are then of the latent part
    i64 q_rope_stride_batch, q_rope_stride_seq, q_rope_stride_head;
    const u8* kv_rope;
    i64 kv_rope_stride_head;  // bytes
    u32 kv_rope_stride_page;  // in 16 bytes
    u32 extra_num_slots;      // from here on: of a second cache, like their namesakes
    const u8* extra_kv;
    i64 extra_kv_stride_head;
    const i32* extra_indices;
    i64 extra_indices_stride_batch, extra_indices_stride_seq, extra_indices_stride_head;
    u32 extra_kv_stride_page, extra_kv_stride_token;
};

}  // namespace mla
