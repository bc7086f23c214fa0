// The loader warps of the narrow kernel for gathered tokens of FP8 caches: they walk the items tile by tile, ahead of the
// arithmetic and across items, and ask for each token's row with one bulk copy.
#pragma once
#include "decode/gathered/narrow_work.h"
#include "decode/gathered_fp8/narrow_query.h"
#include "decode/gathered_fp8/narrow_smem.h"
#include "ptx/copy_async.h"
#include "ptx/tma.h"
#include "source/gathered.h"

namespace mla {

class RowLoader {
public:
    // What might be done: gathered/narrow_load.h. Here 16 requests took 0.2 to 1.0 us longer, if only by reading the item.
    static MLA_DEVICE NothingAhead ahead(const GatherParams&) { return {}; }

    // `thread` counts the loader threads.
    MLA_DEVICE RowLoader(const GatherParams& params, const Items& items, u32 smem, u32 thread)
        : params_(params), items_(items), smem_(smem), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads), ring_{warp_} {}

    // Indices are read one tile ahead, also across items: their latency hides behind the copies of a tile.
    MLA_DEVICE void run() {
        item_ = items_.first();
        TokenRun tokens = open_item();
        i32 slot = read(tokens);
        while (tokens.left > 0) {
            const bool is_extra = tokens.is_extra;  // of `slot`
            tokens.next_tile();
            if (tokens.left <= 0) tokens = open_next(is_extra);
            const i32 next_slot = read(tokens);
            load_slab(slot, is_extra);
            slot = next_slot;
        }
    }

private:
    // What follows the end of a list: the second list of the item that is open, or the next item.
    MLA_DEVICE TokenRun open_next(bool is_extra) {
        if (kHasExtra && !is_extra) {
            const BlockWork work = load_block_work(params_, item_ - items_.step());
            const i32 tile = first_list_tiles(work);
            if (tile < work.tile_end) return tokens_from(params_, work, tile);
        }
        return open_item();
    }

    // The next item that has tiles for this CTA.
    MLA_DEVICE TokenRun open_item() {
        const BlockWork work = next_work(params_, items_, item_);
        if (!work.has_tiles()) return {nullptr, 0, false};
        prefetch_query(params_, work, warp_ * kWarpThreads + lane_, kLoaderWarps * kWarpThreads);
        return tokens_from(params_, work, work.tile_begin);
    }

    // The slot of token `lane` of this warp's share of a tile. Indices past the last that counts are not read.
    MLA_DEVICE i32 read(const TokenRun& tokens) const {
        const i32 place = warp_ * kSlabTokens + lane_;
        return lane_ < kSlabTokens && place < tokens.left ? tokens.slot(params_, place) : -1;
    }

    MLA_DEVICE void load_slab(i32 slot, bool is_extra) {
        const bool is_valid = is_token(params_, slot, is_extra);
        const u32 valid = __ballot_sync(kFullWarp, is_valid);
        const u32 full = raw_full_barrier(smem_, ring_.index);
        const u32 row = slab_address(smem_, ring_.index) + row_place(lane_) * kRowPitch;
        mbarrier_wait(raw_empty_barrier(smem_, ring_.index), ring_.parity ^ 1);  // passes at once in the first lap
        // Rows that the slab had before may have been cleared by ordinary stores. Not always: the fence also waits for what this
        // thread has asked for with cp.async.
        if (load_shared_u32(valid_word(smem_, ring_.index)) != kAllValid) fence_async_proxy();
        __syncwarp();
        if (lane_ == 0) store_shared_u32(valid_word(smem_, ring_.index), valid);
        if (lane_ < kSlabTokens) {
            const u32 row_bytes = kMixesCodecs && is_extra ? ExtraCodec::kRowBytes : Codec::kRowBytes;
            if (is_valid) {
                if constexpr (Codec::kPageEndBytes > 0) {
                    copy_async_8b(page_end_place(smem_, ring_.index, lane_),
                                  page_end_address(params_, slot, Codec::kRowBytes, Codec::kPageEndBytes, is_extra));
                    copy_async_arrive(full);
                }
                mbarrier_arrive_expect_bytes(full, row_bytes);
                tma_load_bytes(row, token_address(params_, slot, is_extra), row_bytes, full);
            } else {
                // A token that there is not is zeros, scales too; but at the page's end they are such as need no care.
#pragma unroll 1
                for (u32 byte = 0; byte < row_bytes; byte += 16) store_shared_16b(row + byte, uint4{0, 0, 0, 0});
                if constexpr (Codec::kPageEndBytes > 0) {
                    store_shared_8b(page_end_place(smem_, ring_.index, lane_), uint2{kE8m0Ones, kE8m0Ones});
                    mbarrier_arrive(full);
                }
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
