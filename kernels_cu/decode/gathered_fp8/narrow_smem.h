// Shared memory of the narrow kernel for gathered tokens of FP8 caches. cupy_mla/kernels adds up the same sizes.
#pragma once
#include "decode/claim.h"
#include "decode/gathered/narrow_softmax.h"
#include "decode/gathered_fp8/narrow_schedule.h"
#include "ptx/mbarrier.h"

namespace mla {

constexpr u32 kAllValid = (1u << kSlabTokens) - 1;

struct GatheredFp8NarrowSmem {
    static constexpr u32 value_bytes = kLatentBoxes * kBoxBytes;
    static constexpr u32 query_bytes = kTileBoxes * kRowBoxBytes;
    static constexpr u32 probability_bytes = kBuffers * kRowBoxBytes;
    static constexpr u32 row_bytes = kRows * sizeof(f32);  // a value of each row
    static constexpr u32 row_values = kWarpgroupWarps + 2 * kBuffers + 1;
    static constexpr u32 barriers = kFreedGroups + 3 * kBuffers;
    static constexpr u32 fixed_bytes = value_bytes + query_bytes + probability_bytes + row_values * row_bytes +
                                       barriers * sizeof(u64) + kBuffers * sizeof(u32) + kClaimBytes;
    static constexpr u32 slab_rows_bytes = kSlabTokens * kRowPitch;
    static constexpr u32 slab_bytes = slab_rows_bytes + kSlabTokens * Codec::kPageEndBytes;
    static constexpr u32 slabs = (kSharedBytes - fixed_bytes) / (slab_bytes + 2 * sizeof(u64) + sizeof(u32));

    static constexpr u32 values = 0;  // a tile's V in boxes of [64 tokens][64 columns]
    static constexpr u32 query = values + value_bytes;
    static constexpr u32 probabilities = query + query_bytes;  // P^T [kRows][64 tokens] of each buffer
    static constexpr u32 raw = probabilities + probability_bytes;  // the slabs
    static constexpr u32 exchange = raw + slabs * slab_bytes;      // one value per (scores warp, row)
    static constexpr u32 factors = exchange + kWarpgroupWarps * row_bytes;  // by which O is rescaled before a tile's PV
    static constexpr u32 inverse_sums = factors + kBuffers * row_bytes;  // after an item's last tile, for its buffer
    static constexpr u32 row_scales = inverse_sums + kBuffers * row_bytes;  // what turns a row's scores to log2 units
    static constexpr u32 raw_full = row_scales + row_bytes;
    static constexpr u32 raw_empty = raw_full + slabs * sizeof(u64);
    static constexpr u32 values_empty = raw_empty + slabs * sizeof(u64);
    static constexpr u32 probabilities_full = values_empty + kFreedGroups * sizeof(u64);
    static constexpr u32 probabilities_empty = probabilities_full + kBuffers * sizeof(u64);
    static constexpr u32 sums_full = probabilities_empty + kBuffers * sizeof(u64);
    static constexpr u32 rescales = sums_full + kBuffers * sizeof(u64);  // whether any factor of a buffer is not 1
    static constexpr u32 claim = rescales + kBuffers * sizeof(u32);
    static constexpr u32 valid = claim + kClaimBytes;  // bits of each slab's tokens
    static constexpr u32 total = valid + slabs * sizeof(u32);
};
using Smem = GatheredFp8NarrowSmem;
static_assert(Smem::total <= kSharedBytes && Smem::slabs >= kWarpgroupWarps, "a tile must fit in the ring");
static_assert(Smem::query % kSwizzleAtomBytes == 0 && Smem::probabilities % kSwizzleAtomBytes == 0,
              "the swizzle is a function of the address: boxes start at its period");
static_assert(Smem::total == MLA_SHARED_BYTES, "cupy_mla/kernels adds up other sizes");

// A warp's position in the ring of slabs: its own slab of one tile after the other.
struct SlabRing {
    u32 index;  // at first the warp's number
    u32 parity = 0;

    MLA_DEVICE void advance() {
        index += kWarpgroupWarps;
        if (index >= Smem::slabs) {
            index -= Smem::slabs;
            parity ^= 1;
        }
    }
};

MLA_DEVICE u32 slab_address(u32 smem, u32 slab) { return smem + Smem::raw + slab * Smem::slab_bytes; }
// Where in a slab what lies at the page's end of its token of a number is.
MLA_DEVICE u32 page_end_place(u32 smem, u32 slab, u32 token) {
    return slab_address(smem, slab) + Smem::slab_rows_bytes + token * Codec::kPageEndBytes;
}
MLA_DEVICE u32 valid_word(u32 smem, u32 slab) { return smem + Smem::valid + slab * sizeof(u32); }

// Barriers. Who arrives, who waits:
// raw_full: the lane of each token, with the bytes of its copy or once it has cleared the row, and once what is of the page's end
// is there; the scores warp of the number of that loader warp.
MLA_DEVICE u32 raw_full_barrier(u32 smem, u32 slab) { return smem + Smem::raw_full + slab * sizeof(u64); }
// raw_empty: every lane of that scores warp, once its share of the slab is in registers; the loader warp.
MLA_DEVICE u32 raw_empty_barrier(u32 smem, u32 slab) { return smem + Smem::raw_empty + slab * sizeof(u64); }
// values_empty: one lane of each values warp, once PV has read a group of boxes; scores.
MLA_DEVICE u32 values_empty_barrier(u32 smem, u32 group) { return smem + Smem::values_empty + group * sizeof(u64); }
// Those of NarrowSoftmax, the first of which also says that V is there:
MLA_DEVICE u32 probabilities_full_barrier(u32 smem, u32 buffer) { return smem + Smem::probabilities_full + buffer * sizeof(u64); }
MLA_DEVICE u32 probabilities_empty_barrier(u32 smem, u32 buffer) {
    return smem + Smem::probabilities_empty + buffer * sizeof(u64);
}
MLA_DEVICE u32 sums_full_barrier(u32 smem, u32 buffer) { return smem + Smem::sums_full + buffer * sizeof(u64); }

MLA_DEVICE void initialise_barriers(u32 smem) {
    for (u32 slab = 0; slab < Smem::slabs; ++slab) {
        mbarrier_init(raw_full_barrier(smem, slab), kSlabTokens * (Codec::kPageEndBytes > 0 ? 2 : 1));
        mbarrier_init(raw_empty_barrier(smem, slab), kWarpThreads);
        store_shared_u32(valid_word(smem, slab), kAllValid);  // nothing is cleared
    }
    for (u32 group = 0; group < kFreedGroups; ++group) mbarrier_init(values_empty_barrier(smem, group), kWarpgroupWarps);
    for (u32 buffer = 0; buffer < kBuffers; ++buffer) {
        mbarrier_init(probabilities_full_barrier(smem, buffer), kProbabilityArrivals);
        mbarrier_init(probabilities_empty_barrier(smem, buffer), kWarpgroupWarps);
        mbarrier_init(sums_full_barrier(smem, buffer), kRowLanes);
    }
    mbarrier_init_fence();
}

}  // namespace mla
