// The producer warp of the narrow kernel: walks a part's items tile by tile, ahead of the arithmetic and across items, and
// asks TMA for the boxes of each tile.
#pragma once
#include "decode/narrow/smem.h"
#include "decode/work_item.h"
#include "ptx/mbarrier.h"
#include "source/paged.h"

namespace mla {

static_assert(kSameType<Stored, Operand>, "TMA brings tiles as they are multiplied");

class BoxLoader {
public:
    MLA_DEVICE BoxLoader(const TensorMap* latent, const TensorMap* rope, const DecodeParams& params, u32 smem, u32 lane)
        : latent_(latent), rope_(rope), params_(params), smem_(smem), lane_(lane) {}

    // Asks for the tiles of a short item to be brought to L2, while the kernel ahead may still write page numbers and
    // cache. Only a hint: load_item reads the page numbers again, so none of them may stay in L1. CTAs of a job share the
    // boxes out. Longer items gain nothing, as HBM is what bounds them, and hold up the merge ahead.
    MLA_DEVICE void prefetch_short_item(const BlockWork& work) const {
        if (work.tile_end - work.tile_begin > kPrefetchedTiles) return;
        const volatile i32* table = pages_of(params_, work.request);
        for (u32 chunk = lane_; chunk < kPrefetchedTiles * kChunks; chunk += kWarpThreads) {
            const i32 token = work.tile_begin * kTileTokens + static_cast<i32>(chunk * kChunkTokens);
            if (token >= min_i32(work.tile_end * kTileTokens, work.seqlen_k)) break;
            const KvPlace place(params_, token, table[token / static_cast<i32>(kPageSize)], work.kv_head);
            for (u32 box = block_in_job(); box < kTileBoxes; box += params_.blocks_per_job) {
                const bool is_latent = box < kLatentBoxes;
                tma_prefetch_5d(is_latent ? latent_ : rope_, 0, 0, is_latent ? box : box - kLatentBoxes, place.group,
                                is_latent ? place.latent : place.rope);
            }
        }
    }

    // Page numbers are read one tile ahead, before the wait for free slots: their latency hides behind it.
    MLA_DEVICE void load_item(const BlockWork& work) {
        const i32* table = pages_of(params_, work.request);
        Pages pages = read_pages(table, work, work.tile_begin);
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            const Pages next = read_pages(table, work, min_i32(tile + 1, work.tile_end - 1));
            load_tile(work, tile, pages);
            pages = next;
        }
    }

private:
    // Lane l holds the pages of chunks l, l + 32, ... of a tile.
    static constexpr u32 kChunksPerLane = (kChunks + kWarpThreads - 1) / kWarpThreads;
    struct Pages {
        i32 number[kChunksPerLane];
    };

    MLA_DEVICE Pages read_pages(const i32* table, const BlockWork& work, i32 tile) const {
        Pages pages;
#pragma unroll
        for (u32 i = 0; i < kChunksPerLane; ++i) {
            const u32 chunk = lane_ + i * kWarpThreads;
            pages.number[i] = page_of_chunk(table, tile, chunk, work.seqlen_k);
        }
        return pages;
    }

    MLA_DEVICE void load_tile(const BlockWork& work, i32 tile, const Pages& pages) {
        const i32 first_key = tile * kTileTokens;
        const u32 valid_tokens = min_i32(work.seqlen_k - first_key, kTileTokens);
        const u32 valid_chunks = (valid_tokens + kChunkTokens - 1) / kChunkTokens;
        // Lane b serves box b. All boxes of a tile are asked for back to back once all their slots are free: 0.5% faster.
        if (lane_ < kTileBoxes) {
            const BoxRing::Slot slot = ring_.slot(lane_);
            mbarrier_wait(empty_barrier(smem_, slot.index), slot.parity ^ 1);  // passes at once in the first lap
            mbarrier_arrive_expect_bytes(full_barrier(smem_, slot.index), valid_chunks * kChunkTokens * kBoxRowBytes);
        }
        __syncwarp();
        if constexpr (kChunks == 1) {
            // Known to be the same in all of the warp: else each copy is asked for in a loop over those that differ, 130 clocks.
            const i32 page = __shfl_sync(kFullWarp, pages.number[0], 0);
            if (lane_ < valid_chunks) load_chunk(work, first_key, 0, page);
        } else {
#pragma unroll
            for (u32 i = 0; i < kChunksPerLane; ++i) {
                const u32 chunk = lane_ + i * kWarpThreads;
                if (chunk < valid_chunks) load_chunk(work, first_key, chunk, pages.number[i]);
            }
        }
        __syncwarp();
        ring_.advance();
    }

    MLA_DEVICE void load_chunk(const BlockWork& work, i32 first_key, u32 chunk, i32 page) const {
        const KvPlace place(params_, first_key + static_cast<i32>(chunk * kChunkTokens), page, work.kv_head);
        const u32 row_offset = chunk * kChunkTokens * kBoxRowBytes;
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            const u32 slot = ring_.slot(box).index;
            const bool is_latent = box < kLatentBoxes;
            tma_load_5d(box_address(smem_, slot) + row_offset, is_latent ? latent_ : rope_, full_barrier(smem_, slot), 0, 0,
                        is_latent ? box : box - kLatentBoxes, place.group, is_latent ? place.latent : place.rope);
        }
    }

    const TensorMap* latent_;
    const TensorMap* rope_;
    const DecodeParams& params_;
    u32 smem_, lane_;
    BoxRing ring_;
};

}  // namespace mla
