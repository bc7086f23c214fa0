// The configuration this kernel is compiled for; cupy_mla/kernels passes the macros.
#pragma once
#include "core/hopper.h"
#include "core/plan_format.h"
#include "core/smem_descriptor.h"
#include "core/types.h"

namespace mla {

using Output = MLA_DTYPE;            // of q and of out: Bf16 or Fp16; of 16-bit partial results, but: core/partial_format.h
#ifdef MLA_STORED
using Stored = MLA_STORED;           // what the cache holds
using Operand = Fp16;                // what wgmma multiplies: it holds every e4m3 value
static_assert(kSameType<Stored, E4m3>, "16-bit caches hold what q does");
#else
using Stored = Output;
using Operand = Output;
#endif
constexpr u32 kLatent = MLA_LATENT;  // also the width of V and of the output
constexpr u32 kRope = MLA_ROPE;      // may be 0
constexpr bool kCausal = MLA_CAUSAL;
#ifdef MLA_SHARDED
constexpr bool kSharded = true;      // the causal mask goes by places in requests of which the cache has a shard
static_assert(kCausal, "without a mask places do not matter");
#else
constexpr bool kSharded = false;
#endif
constexpr bool kGathered = MLA_GATHERED;  // tokens are named one by one (indices), not by pages and lengths
constexpr u32 kPageSize = MLA_PAGE_SIZE;  // tokens; gathered: 1 also where all slots are equally far apart
constexpr u32 kRows = MLA_ROWS;      // query rows of a CTA

constexpr u32 kLatentBoxes = kLatent / kBoxColumns;
constexpr u32 kRopeBoxes = kRope / kBoxColumns;
static_assert(kLatent % kBoxColumns == 0 && kRope % kBoxColumns == 0, "widths are whole boxes");

// Rounded to 16 bits and again in the output, one row in 64 pieces has up to 2.9e-3 of error (2.1e-3 with float32 partial
// results), more than FlashMLA's test of dense decoding allows; over many rows the mean counts, which is below its bound.
constexpr bool kPartialIsFloat = MLA_FLOAT_PARTIALS;
static_assert(!kPartialIsFloat || kRows == 16, "only the kernel of few rows can store them");

}  // namespace mla
