// What a values warp converts in the kernel for 64 rows of gathered FP8 tokens: the codes of two tokens of each of a tile's last
// slabs, which PV frees last.
#pragma once
#include "decode/gathered_fp8/wide_pieces.h"

namespace mla {

class SlabShare {
public:
    explicit MLA_DEVICE SlabShare(u32 smem) : smem_(smem) {}

    // Asks for the rows of the CTA's first tile, once.
    MLA_DEVICE void begin() {
        if (tiles_ > 0) return;
        const Next next = wait_for_rows();
        tile_ = next.tile;
        load(next);
        mbarrier_arrive(smem_ + Smem::first_rows_read);
    }

    MLA_DEVICE u32 asked_for() const { return tiles_; }

    // Of the tile that has been read, once PV of the one that was in its stage has read the last slab; asks for the next one's rows.
    MLA_DEVICE void convert(u32 stage, u32 parity) {
        if (tile_ == 0) return;
        const Next next = wait_for_rows();
        if (kMixesCodecs && (tile_ & kTileIsExtra))
            store<ExtraCodec>(stage, parity);
        else
            store<Codec>(stage, parity);
        mbarrier_arrive(tile_full(smem_, stage));
        tile_ = next.tile;
        load(next);
    }

private:
    // From the special register each time: few registers are left to keep it in.
    static MLA_DEVICE u32 warp() {
        u32 thread = threadIdx.x;
        pin_register(thread);
        return thread / kWarpThreads - kWarpgroupWarps;
    }
    // The converter warp that knows of this warp's tokens, which are its pair `pair`.
    static MLA_DEVICE u32 converter() { return warp() / kSlabPairs; }
    static MLA_DEVICE u32 pair() { return kConverterSlabs * kSlabPairs + warp() % kSlabPairs; }  // and those of later slabs

    struct Next {
        u32 tile;
        u64 rows[kShareSlabs];
    };

    MLA_DEVICE Next wait_for_rows() {
        mbarrier_wait(smem_ + Smem::rows_there, tiles_ % 2);
        ++tiles_;
        Next next;
        const u32 place = row_place(smem_, converter(), pair() * kPairTokens + half_of(this_lane()));
#pragma unroll
        for (u32 slab = 0; slab < kShareSlabs; ++slab) {
            const uint2 row = load_shared_8b(place + slab * kSlabPairs * sizeof(u64));
            next.rows[slab] = row.x | static_cast<u64>(row.y) << 32;
        }
        next.tile = load_shared_u32(smem_ + Smem::next_tile);
        return next;
    }

    MLA_DEVICE void load(const Next& next) {
        if (tile_ == 0) return;
#pragma unroll
        for (u32 slab = 0; slab < kShareSlabs; ++slab) {
            if (kMixesCodecs && (tile_ & kTileIsExtra))
                codes_[slab].load<ExtraCodec>(this_lane(), next.rows[slab]);
            else
                codes_[slab].load<Codec>(this_lane(), next.rows[slab]);
        }
    }

    template <class C>
    MLA_DEVICE void store(u32 stage, u32 parity) {
        const u32 lane = this_lane();
        u32 scales[kShareSlabs] = {};
        if constexpr (C::kHasScales) {
            const u32 place = scale_place<C>(smem_, converter(), half_of(lane), first_column(lane) / kColumnsPerScale<C>);
#pragma unroll
            for (u32 slab = 0; slab < kShareSlabs; ++slab)
                scales[slab] = load_shared_u32(place + (pair() + slab * kSlabPairs) * sizeof(u32));
        }
        mbarrier_wait(slab_empty(smem_, stage, kSlabs - 1), parity);
        const u32 token = token_of(converter(), pair() * kPairTokens + half_of(lane));
        const u32 place = piece_place(stage_address(smem_, stage), token, lane);
#pragma unroll
        for (u32 slab = 0; slab < kShareSlabs; ++slab) codes_[slab].store<C>(lane, scales[slab], place, slab * kSlabBytes);
    }

    u32 smem_;
    u32 tile_ = 0;  // what is in the registers
    u32 tiles_ = 0;  // of which the rows have been asked for
    PairCodes codes_[kShareSlabs];
};

}  // namespace mla
