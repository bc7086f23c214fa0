// The configuration this kernel is compiled for; cupy_mla/kernels/configs.py passes the macros.
#pragma once
#include "core/smem_descriptor.h"
#include "core/types.h"
#include "core/plan_format.h"

namespace mla {

using Element = MLA_DTYPE;               // Bf16 or Fp16
constexpr u32 kLatent = MLA_LATENT;      // also the width of V and of the output
constexpr u32 kRope = MLA_ROPE;          // may be 0
constexpr u32 kPageSize = MLA_PAGE_SIZE; // tokens
constexpr bool kCausal = MLA_CAUSAL;
constexpr u32 kRows = MLA_ROWS;          // query rows of a CTA

constexpr u32 kElementBytes = 2;
constexpr u32 kLatentBoxes = kLatent / kBoxColumns;
constexpr u32 kRopeBoxes = kRope / kBoxColumns;
static_assert(kLatent % kBoxColumns == 0 && kRope % kBoxColumns == 0, "widths are whole boxes");

constexpr MLA_DEVICE u32 greatest_common_divisor(u32 a, u32 b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }
// Tokens of a tile that surely lie in one page: what one copy-engine box takes.
constexpr u32 kChunkTokens = greatest_common_divisor(kPageSize, kTileTokens);
constexpr u32 kChunks = kTileTokens / kChunkTokens;
// Of a chunk, the tokens of one swizzle atom: boxes may lie side by side in it, and then one copy brings all columns.
constexpr u32 kGroupTokens = kChunkTokens < kAtomRows ? kChunkTokens : kAtomRows;

constexpr u32 kWarpThreads = 32;
constexpr u32 kWarpgroupThreads = 128;

constexpr u32 kClaimBytes = 8;  // of shared memory, for the part that decode/claim.h finds: one word, and one unused

// Rounded to 16 bits and again in the output, one row in 64 pieces has up to 2.9e-3 of error (2.1e-3 with float32 partial
// results), more than FlashMLA's test of dense decoding allows; over many rows the mean counts, which is below its bound.
constexpr bool kPartialIsFloat = MLA_FLOAT_PARTIALS;
static_assert(!kPartialIsFloat || kRows == 16, "only the kernel of few rows can store them");

}  // namespace mla
