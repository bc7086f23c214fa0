// Shared memory of the kernel for e4m3 caches. cupy_mla/kernels/fp8.py adds up the same sizes and passes the total.
#pragma once
#include "decode/claim.h"
#include "decode/fp8/schedule.h"
#include "decode/narrow/swapped.h"
#include "ptx/mbarrier.h"

namespace mla {

// A part of a tile lies in its stage in the order in which one copy of whole tokens writes it: for each group of eight tokens the
// swizzle atoms [8 tokens][128 bytes] of its boxes of 128 latent columns. The rope columns follow the parts: 64 bytes a token.
constexpr u32 kByteBoxColumns = kBoxRowBytes;  // e4m3 values in a row of a box
constexpr u32 kByteBoxes = kLatent / kByteBoxColumns;
static_assert(kLatent % (kValueWarpgroups * kByteBoxColumns) == 0, "each values warpgroup takes whole boxes");
static_assert(kByteBoxes % kTileParts == 0, "a part is whole boxes");
constexpr u32 kPartBoxes = kByteBoxes / kTileParts;
constexpr u32 kLatentGroupBytes = kPartBoxes * kSwizzleAtomBytes;
constexpr u32 kStagePart = kTileTokens / kAtomRows * kLatentGroupBytes;
constexpr u32 kStageRope = kTileParts * kStagePart;
constexpr u32 kRopeRowBytes = 64;
static_assert(kRope == 0 || kRope == kRopeRowBytes, "a row of rope columns is one row of the 64-byte swizzle");
constexpr u32 kStageBytes = kStageRope + kTileTokens * kRope;

// K as K-major operand: one k32 step is 32 bytes further.
constexpr u64 kLatentKMajor = encode_descriptor(16, kLatentGroupBytes, kSwizzle128B);
constexpr u64 kRopeKMajor = encode_descriptor(16, kAtomRows * kRopeRowBytes, kSwizzle64B);

// Byte offset of a box of columns in a stage; of 16-byte chunk `chunk` (of 8) of a token's row of box `box`.
MLA_DEVICE constexpr u32 box_offset(u32 box) { return box / kPartBoxes * kStagePart + box % kPartBoxes * kSwizzleAtomBytes; }
MLA_DEVICE u32 latent_chunk_offset(u32 token, u32 box, u32 chunk) {
    return token / kAtomRows * kLatentGroupBytes + box_offset(box) + box_chunk_offset(token % kAtomRows, chunk);
}
// Of chunk `chunk` (of 4) of a row of 64 bytes, 64-byte swizzle.
MLA_DEVICE u32 rope_chunk_offset(u32 row, u32 chunk) { return row * kRopeRowBytes + ((chunk ^ (row >> 1 & 3)) << 4); }

// Q as the other operand. Split: e4m3, rows 0.. the high parts, rows kRows.. the low parts, in boxes of 128 columns, then
// rope rows of 64 bytes. Exact, up to 32 rows: fp16 in boxes of 64 columns, in the bytes of two parts.
constexpr u32 kSplitBoxBytes = kQueryParts * kRows * kBoxRowBytes;
constexpr u32 kQueryBytes = (kWide ? kQueryParts : 2) * kRows * (kLatent + kRope);
// Byte offset in Q of 16-byte chunk `chunk` of 64 split columns `box` of a row: a place in the rows of all parts.
MLA_DEVICE u32 split_chunk_offset(u32 place, u32 box, u32 chunk) {
    return box < kLatentBoxes ? box / 2 * kSplitBoxBytes + box_chunk_offset(place, box % 2 * 4 + chunk)
                              : kByteBoxes * kSplitBoxBytes + rope_chunk_offset(place, chunk);
}

constexpr u32 kExchangeBytes = !kSwapped ? 0 : kScoresWarpgroups * kScoresWarps * kRows * sizeof(f32);  // a value per (scores warp, row)
constexpr u32 kMaximaBytes = kWide && kSwapped ? kScoresWarps * kRows * sizeof(f32) : 0;  // the same where no registers are left
constexpr u32 kTurnBytes =
    kTakesTurns ? kScoresWarpgroups * sizeof(u64) + (1 + kSumsPlaces * kHandedValues) * kRows * sizeof(f32) : 0;
constexpr bool kVotes = kSplitQuery || kWritesPlain;  // all that make queries on what they are like
constexpr u32 kOutlierBytes = kVotes ? sizeof(u32) : 0;

struct Fp8Smem {
    static constexpr u32 stages = 0;
    static constexpr u32 query = stages + kStages * kStageBytes;
    static constexpr u32 probabilities = query + kQueryBytes;  // P^T [kRows][64 tokens] of the last tiles
    static constexpr u32 exchange = probabilities + kProbabilityBuffers * kRowBoxBytes;
    static constexpr u32 maxima = exchange + kExchangeBytes;
    static constexpr u32 factors = maxima + kMaximaBytes;  // of each P: rescale O by them first
    static constexpr u32 row_scales = factors + kProbabilityBuffers * kRows * sizeof(f32);  // of Q
    static constexpr u32 inverse_sums = row_scales + kRows * sizeof(f32);
    static constexpr u32 tile_full = inverse_sums + kSumsPlaces * kRows * sizeof(f32);  // TMA -> scores, values
    static constexpr u32 tile_empty = tile_full + kStages * kTileParts * sizeof(u64);  // scores, values -> loader
    static constexpr u32 probabilities_full = tile_empty + kStages * sizeof(u64);  // scores -> values
    static constexpr u32 probabilities_empty = probabilities_full + kProbabilityBuffers * sizeof(u64);  // and back
    static constexpr u32 sums_full = probabilities_empty + kProbabilityBuffers * sizeof(u64);           // scores -> values
    static constexpr u32 sums_empty = sums_full + kSumsPlaces * sizeof(u64);                            // and back
    static constexpr u32 moved = sums_empty + kSumsPlaces * sizeof(u64);  // of each P: whether any factor is not 1
    static constexpr u32 outlier = moved + kProbabilityBuffers * kMovedWords * sizeof(u32);  // in a first item's queries?
    static constexpr u32 claim = outlier + kOutlierBytes;  // the part that this CTA has claimed
    // Of scores warpgroups that take turns: a barrier of each one's turn, for kRowLanes threads of the other, once P of the tile before
    // is there, and the maxima; maxima of each row, as of the last tile; of two items what is handed over, kHandedValues of each row.
    static constexpr u32 turns = claim + kClaimBytes;
    static constexpr u32 turn_maxima = turns + kScoresWarpgroups * sizeof(u64);
    static constexpr u32 handed = turn_maxima + kRows * sizeof(f32);
    static constexpr u32 total = turns + kTurnBytes;
};
static_assert(Fp8Smem::total <= kMaxSharedBytes, "the fp8 kernel's shared memory does not fit");
static_assert(!kTakesTurns || Fp8Smem::turns % sizeof(u64) == 0, "barriers are aligned");
static_assert(Fp8Smem::moved % (kMovedWords * sizeof(u32)) == 0, "the words of a P are read at once");
static_assert(kStageBytes % kSwizzleAtomBytes == 0 && Fp8Smem::query % kSwizzleAtomBytes == 0 &&
                  Fp8Smem::probabilities % kSwizzleAtomBytes == 0,
              "the swizzle is a function of the address: boxes start at its period");
static_assert(Fp8Smem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

MLA_DEVICE u32 stage_address(u32 smem, u32 stage) { return smem + Fp8Smem::stages + stage * kStageBytes; }
MLA_DEVICE u32 barrier_of(u32 smem, u32 first, u32 index) { return smem + first + index * sizeof(u64); }

MLA_DEVICE u32 part_full(u32 smem, u32 stage, u32 part) { return barrier_of(smem, Fp8Smem::tile_full, stage * kTileParts + part); }

// One thread. What a first item's queries have is not known yet.
MLA_DEVICE void initialise_barriers(u32 smem) {
    for (u32 stage = 0; stage < kStages; ++stage) {
        for (u32 part = 0; part < kTileParts; ++part) mbarrier_init(part_full(smem, stage, part), 1);  // with the bytes to come
        mbarrier_init(barrier_of(smem, Fp8Smem::tile_empty, stage), (1 + kValueWarpgroups) * kWarpgroupWarps);
    }
    for (u32 buffer = 0; buffer < kProbabilityBuffers; ++buffer) {
        mbarrier_init(barrier_of(smem, Fp8Smem::probabilities_full, buffer), kWarpgroupThreads);
        mbarrier_init(barrier_of(smem, Fp8Smem::probabilities_empty, buffer), kValueWarpgroups * kWarpgroupWarps);
    }
    for (u32 place = 0; place < kSumsPlaces; ++place) {
        mbarrier_init(barrier_of(smem, Fp8Smem::sums_full, place), kWarpgroupThreads);
        mbarrier_init(barrier_of(smem, Fp8Smem::sums_empty, place), kValueWarpgroups * kWarpgroupWarps);
    }
    for (u32 which = 0; kTakesTurns && which < kScoresWarpgroups; ++which)
        mbarrier_init(barrier_of(smem, Fp8Smem::turns, which), kRowLanes);
    mbarrier_init_fence();
    if (kVotes) store_shared_u32(smem + Fp8Smem::outlier, 0);
}

// Position in a ring of Count places; every role walks the same sequence of tiles.
template <u32 Count, bool kIsPowerOfTwo = (Count & (Count - 1)) == 0>
class RingPosition {
public:
    MLA_DEVICE u32 index() const { return index_; }
    MLA_DEVICE u32 parity() const { return parity_; }
    MLA_DEVICE void advance() {
        if (++index_ == Count) {
            index_ = 0;
            parity_ ^= 1;
        }
    }

private:
    u32 index_ = 0, parity_ = 0;
};

// In one register.
template <u32 Count>
class RingPosition<Count, true> {
public:
    MLA_DEVICE u32 index() const { return places_ % Count; }
    MLA_DEVICE u32 parity() const { return places_ / Count % 2; }
    MLA_DEVICE bool is_at_start() const { return places_ == 0; }
    MLA_DEVICE void advance() { ++places_; }

private:
    u32 places_ = 0;
};

}  // namespace mla
