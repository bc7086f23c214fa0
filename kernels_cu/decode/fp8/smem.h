// Shared memory of the kernel for e4m3 caches. cupy_mla/kernels/fp8.py adds up the same sizes and passes the total.
#pragma once
#include "decode/claim.h"
#include "decode/fp8/schedule.h"
#include "decode/narrow/swapped.h"

namespace mla {

// A tile lies in its stage in the order in which one copy of whole tokens writes it: for each group of eight tokens the
// swizzle atoms [8 tokens][128 bytes] of all boxes of 128 latent columns. The rope columns follow: 64 bytes a token.
constexpr u32 kByteBoxColumns = kBoxRowBytes;  // e4m3 values in a row of a box
constexpr u32 kByteBoxes = kLatent / kByteBoxColumns;
static_assert(kLatent % (kValueWarpgroups * kByteBoxColumns) == 0, "each values warpgroup takes whole boxes");
constexpr u32 kLatentGroupBytes = kByteBoxes * kSwizzleAtomBytes;
constexpr u32 kStageRope = kTileTokens / kAtomRows * kLatentGroupBytes;
constexpr u32 kRopeRowBytes = 64;
static_assert(kRope == 0 || kRope == kRopeRowBytes, "a row of rope columns is one row of the 64-byte swizzle");
constexpr u32 kStageBytes = kStageRope + kTileTokens * kRope;

// K as K-major operand: one k32 step is 32 bytes further, one box of columns kSwizzleAtomBytes further.
constexpr u64 kLatentKMajor = encode_descriptor(16, kLatentGroupBytes, kSwizzle128B);
constexpr u64 kRopeKMajor = encode_descriptor(16, kAtomRows * kRopeRowBytes, kSwizzle64B);

// Byte offset of 16-byte chunk `chunk` (of 8) of a token's row of box `box`, in a stage.
MLA_DEVICE u32 latent_chunk_offset(u32 token, u32 box, u32 chunk) {
    return token / kAtomRows * kLatentGroupBytes + box * kSwizzleAtomBytes + box_chunk_offset(token % kAtomRows, chunk);
}
// Of chunk `chunk` (of 4) of a row of 64 bytes, 64-byte swizzle.
MLA_DEVICE u32 rope_chunk_offset(u32 row, u32 chunk) { return row * kRopeRowBytes + ((chunk ^ (row >> 1 & 3)) << 4); }

// Q as the other operand. Split: e4m3, rows 0.. the high parts, rows kRows.. the low parts, in boxes of 128 columns, then
// rope rows of 64 bytes. Exact: fp16 in boxes of 64 columns. Both take the same bytes.
constexpr u32 kSplitBoxBytes = 2 * kRows * kBoxRowBytes;
constexpr u32 kQueryBytes = kRows * (kLatent + kRope) * 2;

struct Fp8Smem {
    static constexpr u32 stages = 0;
    static constexpr u32 query = stages + kStages * kStageBytes;
    static constexpr u32 probabilities = query + kQueryBytes;  // P^T [kRows][64 tokens] of the last tiles
    static constexpr u32 exchange = probabilities + kProbabilityBuffers * kRowBoxBytes;  // a value per (scores warp, row)
    static constexpr u32 factors = exchange + kScoresWarps * kRows * sizeof(f32);        // of each P: rescale O by them first
    static constexpr u32 row_scales = factors + kProbabilityBuffers * kRows * sizeof(f32);  // of Q
    static constexpr u32 inverse_sums = row_scales + kRows * sizeof(f32);
    static constexpr u32 tile_full = inverse_sums + kRows * sizeof(f32);           // TMA -> scores, values
    static constexpr u32 tile_empty = tile_full + kStages * sizeof(u64);           // scores, values -> loader
    static constexpr u32 probabilities_full = tile_empty + kStages * sizeof(u64);  // scores -> values
    static constexpr u32 probabilities_empty = probabilities_full + kProbabilityBuffers * sizeof(u64);  // and back
    static constexpr u32 sums_full = probabilities_empty + kProbabilityBuffers * sizeof(u64);           // scores -> values
    static constexpr u32 sums_empty = sums_full + sizeof(u64);                                          // and back
    static constexpr u32 moved = sums_empty + sizeof(u64);  // of each P: whether any factor is not 1
    static constexpr u32 claim = moved + kProbabilityBuffers * sizeof(u32);  // the part that this CTA has claimed
    static constexpr u32 total = claim + kClaimBytes;
};
static_assert(Fp8Smem::total <= kMaxSharedBytes, "the fp8 kernel's shared memory does not fit");
static_assert(kStageBytes % kSwizzleAtomBytes == 0 && Fp8Smem::query % kSwizzleAtomBytes == 0 &&
                  Fp8Smem::probabilities % kSwizzleAtomBytes == 0,
              "the swizzle is a function of the address: boxes start at its period");
static_assert(Fp8Smem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

MLA_DEVICE u32 stage_address(u32 smem, u32 stage) { return smem + Fp8Smem::stages + stage * kStageBytes; }
MLA_DEVICE u32 barrier_of(u32 smem, u32 first, u32 index) { return smem + first + index * sizeof(u64); }

// Position in a ring of Count places; every role walks the same sequence of tiles.
template <u32 Count>
struct RingPosition {
    u32 index = 0;
    u32 parity = 0;
    MLA_DEVICE void advance() {
        if (++index == Count) {
            index = 0;
            parity ^= 1;
        }
    }
};

}  // namespace mla
