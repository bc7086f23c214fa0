// Walks a part's items tile by tile, ahead of the arithmetic, and asks TMA for each KV tile, or for this
// warp's share of it: the loader warps walk alike. Run by whole warps. Page numbers are read one tile ahead: their
// latency hides behind a tile's arithmetic.
#pragma once
#include "decode/wide/smem.h"
#include "decode/work_item.h"
#include "ptx/mbarrier.h"
#include "source/paged.h"

namespace mla {

static_assert(kSameType<Stored, Operand>, "TMA brings tiles as they are multiplied");

// Where the loader stands, in shared memory: the values warpgroup it runs in has no registers to spare.
struct alignas(16) LoaderState {
    i32 tile, tile_end;  // next tile of the current item
    i32 seqlen_k, kv_head;
    i32 request;
    i32 item, item_end;
    i32 reserved;
};
static_assert(sizeof(LoaderState) == kLoaderStateBytes, "WideSmem reserves this much");

class TileLoader {
public:
    MLA_DEVICE TileLoader(const TensorMap* latent, const TensorMap* rope, const DecodeParams& params, u32 smem,
                          LoaderState* states)
        : latent_(latent), rope_(rope), params_(params), smem_(smem), states_(states) {}

    MLA_DEVICE void start(i32 item, i32 item_end) { open_item(item, item_end); }

    // Asks for the next tile, if there is one, into a stage that is free.
    MLA_DEVICE void load_next(u32 stage_index) {
        const i32 tile = state()->tile;
        if (tile >= state()->tile_end) return;
        const u32 stage = stage_address(smem_, stage_index);
        const u32 full = tile_full(smem_, stage_index);
        // Chunks past the sequence's end have no page to come from.
        const u32 valid_chunks =
            kChunks == 1 ? 1 : ceil_div(min_i32(state()->seqlen_k - tile * kTileTokens, kTileTokens), kChunkTokens);
        if (lane() == 0) mbarrier_arrive_expect_bytes(full, own_bytes(valid_chunks));
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < kChunksPerLane; ++i) {
            const u32 chunk = chunk_of(i);
            if (chunk < valid_chunks) load_chunk(stage, full, tile, chunk, pages_[i]);
        }
        __syncwarp();
        if (tile + 1 < state()->tile_end) {
            if (lane() == 0) state()->tile = tile + 1;
            __syncwarp();
            read_pages();
        } else {
            open_item(state()->item + 1, state()->item_end);
        }
    }

private:
    // From the special register each time: no register is left to keep it in.
    static MLA_DEVICE u32 lane() { return threadIdx.x % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return kLoaderWarps == 1 ? 0 : threadIdx.x % kWarpgroupThreads / kWarpThreads; }

    MLA_DEVICE LoaderState* state() const { return states_ + warp(); }

    // Warps deal out the chunks of a tile.
    static constexpr u32 kChunksPerLane = (kChunks / kLoaderWarps + kWarpThreads - 1) / kWarpThreads;
    static_assert(kChunks % kLoaderWarps == 0, "warps have as many chunks as each other");
    static MLA_DEVICE u32 chunk_of(u32 i) { return (lane() + i * kWarpThreads) * kLoaderWarps + warp(); }

    // What this warp asks for of a tile's first `valid_chunks` chunks.
    static MLA_DEVICE u32 own_bytes(u32 valid_chunks) {
        const u32 chunks = (valid_chunks + kLoaderWarps - 1 - warp()) / kLoaderWarps;
        return chunks * kChunkTokens * (kLatentBoxes + kRopeBoxes) * kBoxRowBytes;
    }

    // Moves to the first item from `item` on that has tiles for this CTA.
    MLA_DEVICE void open_item(i32 item, i32 item_end) {
        LoaderState next{};
        for (; item < item_end; ++item) {
            const BlockWork work = load_block_work(params_, item);
            if (!work.has_tiles()) continue;
            next = {work.tile_begin, work.tile_end, work.seqlen_k, work.kv_head, work.request, item, item_end, 0};
            break;
        }
        __syncwarp();
        if (lane() == 0) *state() = next;
        __syncwarp();
        if (item < item_end) read_pages();
    }

    MLA_DEVICE void read_pages() {
        const i32* pages = pages_of(params_, state()->request);
#pragma unroll
        for (u32 i = 0; i < kChunksPerLane; ++i)
            pages_[i] = page_of_chunk(pages, state()->tile, chunk_of(i), state()->seqlen_k);
    }

    MLA_DEVICE void load_chunk(u32 stage, u32 full, i32 tile, u32 chunk, i32 page) {
        const u32 token = chunk * kChunkTokens;  // of the tile
        const KvPlace place(params_, tile * kTileTokens + static_cast<i32>(token), page, state()->kv_head);
        constexpr u32 kCopyBoxes = kCopiesWholeTokens ? kLatentBoxes : 1;
#pragma unroll 1
        for (u32 box = 0; box < kLatentBoxes; box += kCopyBoxes)
            tma_load_5d(stage + latent_row(token, box), latent_, full, 0, 0, box, place.group, place.latent);
        if constexpr (kRopeBoxes > 0)
            tma_load_5d(stage + kStageRope + token * kBoxRowBytes, rope_, full, 0, 0, 0, place.group, place.rope);
    }

    const TensorMap* latent_;
    const TensorMap* rope_;
    const DecodeParams& params_;
    u32 smem_;
    LoaderState* states_;
    i32 pages_[kChunksPerLane];
};

}  // namespace mla
