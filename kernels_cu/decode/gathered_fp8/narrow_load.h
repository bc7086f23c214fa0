// The loader warps of the narrow kernel for gathered tokens of FP8 caches: they walk the items tile by tile, ahead of the
// arithmetic and across items, and ask for each token's row with one bulk copy.
#pragma once
#include "decode/gathered/narrow_work.h"
#include "decode/gathered_fp8/narrow_smem.h"
#include "ptx/copy_async.h"
#include "ptx/tma.h"
#include "source/gathered.h"

namespace mla {

class RowLoader {
public:
    // `thread` counts the loader threads.
    MLA_DEVICE RowLoader(const GatherParams& params, const Items& items, u32 smem, u32 thread)
        : params_(params), items_(items), smem_(smem), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads), ring_{warp_} {}

    // Indices are read one tile ahead, also across items: their latency hides behind the copies of a tile.
    MLA_DEVICE void run() {
        item_ = items_.first();
        Indices indices = open_item();
        i32 slot = read(indices);
        while (indices.left > 0) {
            indices.first += kTileTokens;
            indices.left -= kTileTokens;
            if (indices.left <= 0) indices = open_item();
            const i32 next_slot = read(indices);
            load_slab(slot);
            slot = next_slot;
        }
    }

private:
    struct Indices {
        const i32* first;  // of a tile
        i32 left;          // of the item from there on
    };

    // The next item that has tiles for this CTA. Its Q is asked for into L2, a hint: the scores warpgroup waits for it between
    // two items.
    MLA_DEVICE Indices open_item() {
        const BlockWork work = next_work(params_, items_, item_);
        if (!work.has_tiles()) return {nullptr, 0};
#pragma unroll 1
        for (u32 line = warp_ * kWarpThreads + lane_; line < kRows * kTileBoxes; line += kLoaderWarps * kWarpThreads) {
            const QueryRow row = query_row(params_, work, line / kTileBoxes, 0);
            if (row.exists) prefetch_to_l2(row.latent + line % kTileBoxes * kBoxColumns);
        }
        const i32 first = work.tile_begin * kTileTokens;
        return {indices_of(params_, work) + first, min_i32(work.tile_end * kTileTokens, work.seqlen_k) - first};
    }

    // The slot of token `lane` of this warp's share of a tile. Indices past the last that counts are not read.
    MLA_DEVICE i32 read(const Indices& indices) const {
        const i32 place = warp_ * kSlabTokens + lane_;
        return lane_ < kSlabTokens && place < indices.left ? __ldg(indices.first + place) : -1;
    }

    MLA_DEVICE void load_slab(i32 slot) {
        const bool is_valid = is_token(params_, slot);
        const u32 valid = __ballot_sync(kFullWarp, is_valid);
        const u32 full = raw_full_barrier(smem_, ring_.index);
        const u32 row = slab_address(smem_, ring_.index) + row_place(lane_) * kRowPitch;
        mbarrier_wait(raw_empty_barrier(smem_, ring_.index), ring_.parity ^ 1);  // passes at once in the first lap
        fence_async_proxy();  // the rows before may have been cleared by ordinary stores
        if (lane_ == 0) store_shared_u32(valid_word(smem_, ring_.index), valid);
        if (lane_ < kSlabTokens) {
            if (is_valid) {
                mbarrier_arrive_expect_bytes(full, Codec::kRowBytes);
                tma_load_bytes(row, token_address(params_, slot), Codec::kRowBytes, full);
            } else {
                // A token that there is not is zeros, scales too.
#pragma unroll 1
                for (u32 byte = 0; byte < Codec::kRowBytes; byte += 16) store_shared_16b(row + byte, uint4{0, 0, 0, 0});
                mbarrier_arrive(full);
            }
        }
        __syncwarp();
        ring_.advance();
    }

    const GatherParams& params_;
    const Items& items_;
    u32 smem_, warp_, lane_;
    i32 item_;  // the one after the item that is open
    SlabRing ring_;
};

}  // namespace mla
