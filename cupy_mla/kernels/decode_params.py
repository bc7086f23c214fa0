"""The by-value parameters of the decode kernels: kernels_cu/decode/params.h, DecodeParams, field by field."""

from __future__ import annotations

import numpy as np

MAX_SMS = 160  # a full GH100 has 144
SM_WORDS = MAX_SMS // 32  # of 32 bits
HALF_SHARE_UNIT = 1 << 16  # second_half_share is a fraction of it
_POINTER = np.uint64
DECODE_PARAMS = np.dtype(
    [
        ("q_latent", _POINTER),
        ("q_latent_strides", np.int64, 3),  # batch, seq, head; elements, as all strides here
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
