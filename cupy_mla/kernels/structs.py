"""The kernels' by-value parameters and the records of a plan, field by field as the C++ headers have them.

DecodeParams is in kernels_cu/decode/params.h, Fp8Params in decode/fp8/params.h, GatherParams in
decode/gathered/params.h, PlanParams in plan/params.h, the parameters of merges in combine/params.h, the records of a
plan in core/plan_format.h, AppendParams in cache/append.cu, its parts in cache/places.h, BlocksParams in
cache/blocks.h, CopyPagesParams in cache/copy_pages.cu, SlotsParams in cache/slots.h, LocalSlotsParams in
cache/local_slots.cu, PushParams in exchange/push.cu, PushMergeParams in exchange/merge.cu; tests compare the two sides.
Strides are in elements unless said, those of segments, of scales, of copied pages and of pushed rows in bytes.
"""

from __future__ import annotations

import numpy as np

from ..gpu import hopper

SM_WORDS = hopper.MAX_SMS // 32  # of 32 bits
HALF_SHARE_UNIT = 1 << 16  # second_half_share is a fraction of it

_POINTER = np.uint64

DECODE_PARAMS = np.dtype(
    [
        ("q_latent", _POINTER),
        ("q_latent_strides", np.int64, 3),  # batch, seq, head
        ("q_rope", _POINTER),
        ("q_rope_strides", np.int64, 3),
        ("block_table", _POINTER),
        ("block_table_stride", np.int64),
        ("out", _POINTER),
        ("out_strides", np.int64, 3),
        ("lse", _POINTER),
        ("lse_strides", np.int64, 3),  # batch, seq, head
        ("partial_out", _POINTER),
        ("partial_lse", _POINTER),
        ("plan", _POINTER),
        ("num_parts", np.int32),
        ("blocks_per_job", np.int32),
        ("group_heads", np.int32),
        ("latent_page_step", np.int32),
        ("latent_head_step", np.int32),
        ("rope_page_step", np.int32),
        ("rope_head_step", np.int32),
        ("scale_log2", np.float32),
        ("empty_lse", np.float32),
        ("plan_is_settled", np.int32),
        ("second_half_share", np.int32),
        ("second_half", np.uint32, SM_WORDS),
    ],
    align=True,
)
assert DECODE_PARAMS.fields is not None
FP8_PARAMS = np.dtype(
    [
        *((name, field[0]) for name, field in DECODE_PARAMS.fields.items()),
        ("latent_scale_at", _POINTER),
        ("rope_scale_at", _POINTER),
        ("latent_scale_value", np.float32),
        ("rope_scale_value", np.float32),
    ],
    align=True,
)
KV_UNIT = 16  # bytes; strides of pages and tokens are counted in it
MAX_SLOTS = 2**31  # what an index can name, so that a negative one names nothing
GATHER_PARAMS = np.dtype(
    [
        ("q", _POINTER),
        ("q_strides", np.int64, 3),  # batch, seq, head
        ("kv", _POINTER),
        ("kv_stride_head", np.int64),  # bytes; 0 for one kv head
        ("indices", _POINTER),
        ("indices_strides", np.int64, 3),  # batch, seq, kv head
        ("topk_length", _POINTER),
        ("topk_length_stride", np.int64),
        ("out", _POINTER),
        ("out_strides", np.int64, 3),  # batch, seq, head
        ("lse", _POINTER),
        ("lse_strides", np.int64, 3),  # batch, seq, head
        ("max_logits", _POINTER),
        ("max_logits_strides", np.int64, 2),  # query token, head
        ("attn_sink", _POINTER),
        ("partial_out", _POINTER),
        ("partial_lse", _POINTER),
        ("plan", _POINTER),
        ("kv_stride_page", np.uint32),  # 16 bytes
        ("kv_stride_token", np.uint32),  # 16 bytes
        ("num_slots", np.uint32),
        ("topk", np.int32),
        ("num_tokens", np.int32),
        ("num_parts", np.int32),
        ("blocks_per_job", np.int32),
        ("group_heads", np.int32),
        ("seqlen_q", np.int32),
        ("scale_log2", np.float32),
        ("empty_lse", np.float32),
        ("plan_is_settled", np.int32),
        ("second_half_share", np.int32),
        ("second_half", np.uint32, SM_WORDS),
        ("kv_scale_value", np.float32),
        ("kv_scale_at", _POINTER),
        ("q_rope", _POINTER),
        ("q_rope_strides", np.int64, 3),  # batch, seq, head
        ("kv_rope", _POINTER),
        ("kv_rope_stride_head", np.int64),  # bytes
        ("kv_rope_stride_page", np.uint32),  # 16 bytes
        ("extra_num_slots", np.uint32),
        ("extra_kv", _POINTER),
        ("extra_kv_stride_head", np.int64),  # bytes
        ("extra_indices", _POINTER),
        ("extra_indices_strides", np.int64, 3),  # batch, seq, kv head
        ("extra_kv_stride_page", np.uint32),  # 16 bytes
        ("extra_kv_stride_token", np.uint32),  # 16 bytes
    ],
    align=True,
)
PLAN_HEADER = np.dtype(
    [
        ("num_items", np.int32),
        ("num_merges", np.int32),
        ("num_slots", np.int32),
        ("budget", np.int32),
        ("num_jobs", np.int32),
        ("claimed_parts", np.int32),
        ("claims", np.uint32),
        ("shard", np.uint32),
    ]
)
WORK_ITEM = np.dtype(
    [
        ("request", np.int32),
        ("head_block", np.int32),
        ("tile_begin", np.int32),
        ("tile_end", np.int32),
        ("seqlen_k", np.int32),
        ("seqlen_q", np.int32),
        ("q_begin", np.int32),
        ("slot", np.int32),
    ]
)
MERGE_ITEM = np.dtype(
    [
        ("request", np.int32),
        ("head_block", np.int32),
        ("seqlen_q", np.int32),
        ("q_begin", np.int32),
        ("slot_begin", np.int32),
        ("slot_count", np.int32),
        ("reserved", np.int32, 2),
    ]
)
PLAN_PARAMS = np.dtype(
    [
        ("batch", np.int32),
        ("num_parts", np.int32),
        ("blocks_per_job", np.int32),
        ("rows", np.int32),
        ("group_heads", np.int32),
        ("num_heads_kv", np.int32),
        ("seqlen_q", np.int32),
        ("total_q", np.int32),
        ("max_seqlen_k", np.int32),
        ("max_extra_k", np.int32),
        ("requests_per_length", np.int32),
        ("requests_per_extra_length", np.int32),
        ("causal", np.int32),
        ("shard", np.uint32),
        ("fixed_split_tiles", np.int32),
        ("piece_overhead", np.int32),
        ("split_overhead", np.int32),
        ("merge_overhead", np.int32),
        ("packs", np.int32),
        ("max_jobs", np.int32),
        ("merges_offset", np.int32),
        ("workspace_offset", np.int32),
        ("table_in_shared", np.int32),
    ]
)
_COMBINE_FIELDS: list[tuple[str, type] | tuple[str, type, int]] = [
    ("partial_out", _POINTER),
    ("partial_lse", _POINTER),
    ("plan", _POINTER),
    ("out", _POINTER),
    ("out_strides", np.int64, 3),  # batch (0 when ragged), seq, head
    ("lse", _POINTER),
    ("lse_strides", np.int64, 3),  # batch (0 when ragged), seq, head
    ("merges_offset", np.int32),
    ("slot_rows", np.int32),
    ("rows", np.int32),
    ("group_heads", np.int32),
    ("d_v", np.int32),
    ("aligned", np.int32),
    ("empty_lse", np.float32),
    ("seqlen_q", np.int32),  # of GATHER_COMBINE_PARAMS only
]
COMBINE_PARAMS = np.dtype(_COMBINE_FIELDS)
GATHER_COMBINE_PARAMS = np.dtype([*_COMBINE_FIELDS, ("attn_sink", _POINTER)])
MERGE_STATES_PARAMS = np.dtype(
    [
        ("outs", _POINTER),
        ("outs_strides", np.int64, 4),  # state, then the three row indices
        ("lses", _POINTER),
        ("lses_strides", np.int64, 4),
        ("out", _POINTER),
        ("out_strides", np.int64, 3),
        ("lse", _POINTER),
        ("lse_strides", np.int64, 3),
        ("num_states", np.int32),
        ("sizes", np.int32, 3),
        ("d_v", np.int32),
        ("aligned", np.int32),
    ]
)
MEETINGS = np.dtype(
    [
        ("memories", _POINTER),
        ("flags", np.int64),
        ("calls", _POINTER),
        ("world", np.int32),
        ("rank", np.int32),
    ]
)
PUSH_PARAMS = np.dtype(
    [
        ("from", _POINTER),
        ("from_strides", np.int64, 3),
        ("to", np.int64),
        ("to_strides", np.int64, 3),
        ("packets", np.int64),
        ("sizes", np.int32, 3),
        ("chunks", np.int32),
        ("starts_next", np.int32),
        ("unused", np.int32),
        ("meetings", MEETINGS),
    ]
)
PUSH_MERGE_PARAMS = np.dtype(
    [
        ("outs", _POINTER),
        ("lses", _POINTER),
        ("received_outs", np.int64),
        ("received_lses", np.int64),
        ("out", _POINTER),
        ("out_strides", np.int64, 3),
        ("lse", _POINTER),
        ("lse_strides", np.int64, 3),
        ("packets", np.int64),
        ("sizes", np.int32, 3),
        ("d_v", np.int32),
        ("places", np.int32),
        ("aligned", np.int32),
        ("meetings", MEETINGS),
    ]
)
APPEND_SEGMENT = np.dtype(
    [
        ("cache", _POINTER),
        ("rows", _POINTER),
        ("cache_page_stride", np.int64),
        ("cache_token_stride", np.int64),
        ("cache_head_stride", np.int64),
        ("rows_token_stride", np.int64),
        ("rows_head_stride", np.int64),
    ]
)
APPEND_PLACES = np.dtype(
    [
        ("slot_mapping", _POINTER),
        ("block_table", _POINTER),
        ("positions", _POINTER),
        ("requests", _POINTER),
        ("block_table_stride", np.int64),
        ("num_tokens", np.int32),
        ("num_heads_kv", np.int32),
        ("page_size", np.int32),
        ("num_pages", np.int32),
        ("num_requests", np.int32),
        ("max_pages_per_seq", np.int32),
        ("tokens_per_request", np.int32),
        ("reserved", np.int32),
    ]
)
APPEND_PARAMS = np.dtype([("segments", APPEND_SEGMENT, 2), ("places", APPEND_PLACES)])
BLOCKS_PARAMS = np.dtype(
    [
        ("segments", APPEND_SEGMENT, 2),
        ("places", APPEND_PLACES),
        ("rows_page_steps", np.int64, 2),
        ("scales", _POINTER),
        ("scales_page_stride", np.int64),
        ("scales_token_stride", np.int64),
        ("kv_scales", _POINTER, 2),
        ("kv_scale_values", np.float32, 2),
    ]
)
_PAGES_SIDE = np.dtype(
    [
        ("pages", _POINTER),
        ("numbers", _POINTER),
        ("page_stride", np.int64),
        ("token_stride", np.int64),
        ("head_stride", np.int64),
        ("num_pages", np.int32),
        ("reserved", np.int32),
    ]
)
COPY_PAGES_PARAMS = np.dtype(
    [
        ("source", _PAGES_SIDE),
        ("target", _PAGES_SIDE),
        ("num_heads_kv", np.int32),
        ("row_units", np.int32),
        ("page_units", np.int32),
        ("blocks_per_page", np.int32),
    ]
)
SLOTS_PARAMS = np.dtype(
    [
        ("tokens", _POINTER),
        ("block_table", _POINTER),
        ("requests", _POINTER),
        ("slots", _POINTER),
        ("block_table_stride", np.int64),
        ("row_tokens", np.int64),
        ("blocks_per_row", np.int32),
        ("page_size", np.int32),
        ("num_requests", np.int32),
        ("max_pages_per_seq", np.int32),
    ]
)

assert SLOTS_PARAMS.fields is not None
LOCAL_SLOTS_PARAMS = np.dtype(
    [
        *((name, field[0]) for name, field in SLOTS_PARAMS.fields.items()),
        ("counts", _POINTER),
        ("rows_per_request", np.int32),
        ("shard", np.uint32),
    ]
)


def words_of(struct: np.dtype[np.void], *names: str) -> tuple[int, ...]:
    """Where fields of 8 bytes lie in a struct, in words: to write addresses takes a third of the time by these."""
    assert struct.fields is not None
    return tuple(struct.fields[name][1] // np.dtype(_POINTER).itemsize for name in names)
