// The loader warp: walks the items tile by tile, ahead of the arithmetic and across items, and asks for each run of neighbouring
// rows with one bulk copy. Only rows of tokens that there are.
#pragma once
#include "decode/gathered/narrow_work.h"
#include "decode/gathered_fp8/narrow_query.h"
#include "decode/row_tiles/smem.h"
#include "ptx/tma.h"
#include "source/gathered.h"
#include "source/paged.h"

namespace mla {

static_assert(kChunkTokens >= kWarpTokens && kChunks <= kWarpThreads, "of smaller pages there would be too many copies");

class RowTileLoader {
public:
    MLA_DEVICE RowTileLoader(const GatherParams& params, u32 smem) : params_(params), smem_(smem) {}

    MLA_DEVICE void run(const Items& items) {
        i32 item = items.first();
        for (BlockWork work = next_work(params_, items, item); work.has_tiles(); work = next_work(params_, items, item)) {
            prefetch_query(params_, work, lane(), kWarpThreads);
            load_item(work);
        }
    }

private:
    static MLA_DEVICE u32 lane() { return threadIdx.x % kWarpThreads; }

    // A lane for each chunk. Page numbers are read one tile ahead, before the wait for a free stage: their latency hides behind it.
    MLA_DEVICE void load_item(const BlockWork& work) {
        const i32* const pages = indices_of(params_, work);
        i32 page = page_of_chunk(pages, work.tile_begin, lane(), work.seqlen_k);
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            const i32 next = page_of_chunk(pages, min_i32(tile + 1, work.tile_end - 1), lane(), work.seqlen_k);
            load_tile(work, tile, page);
            page = next;
        }
    }

    MLA_DEVICE void load_tile(const BlockWork& work, i32 tile, i32 page) {
        const u32 full = barrier_of(smem_, Smem::tile_full, ring_.index());
        const i32 first_key = tile * kTileTokens, left = min_i32(work.seqlen_k - first_key, kTileTokens);
        const i32 first = lane() * kChunkTokens;  // token of the tile
        const i32 tokens = clamp_i32(left - first, 0, kChunkTokens);
        const u32 rows = stage_address(smem_, ring_.index()) + first * kRowBytes;
        const bool is_absent = static_cast<u32>(page) >= params_.num_slots / kPageSize;
        i32 absent = is_absent ? tokens : 0;
        mbarrier_wait(barrier_of(smem_, Smem::tile_empty, ring_.index()), ring_.parity() ^ 1);  // passes in the first lap
        if (__any_sync(kFullWarp, absent > 0)) {
            clear(rows, absent);
            fence_async_proxy();  // ahead of what is copied here in the next lap
            absent = __reduce_add_sync(kFullWarp, absent);
        }
        __syncwarp();
        if (lane() == 0) mbarrier_arrive_expect_bytes(full, (left - absent) * kRowBytes);
        __syncwarp();
        if (!is_absent) copy(rows, page, first_key + first, tokens, full);
        __syncwarp();
        ring_.advance();
    }

    // Rows of a page, from that of a key on: as a rule one lies behind the other.
    MLA_DEVICE void copy(u32 destination, i32 page, i32 key, i32 tokens, u32 full) const {
        if (tokens == 0) return;
        const u64 pitch = static_cast<u64>(params_.kv_stride_token) * 16;
        const u8* const source = params_.kv + static_cast<u64>(page) * params_.kv_stride_page * 16 + key % kPageSize * pitch;
        const i32 run = pitch == kRowBytes ? tokens : 1;
#pragma unroll 1
        for (i32 token = 0; token < tokens; token += run)
            tma_load_bytes(destination + token * kRowBytes, source + token * pitch, run * kRowBytes, full);
    }

    // A page outside the cache is zeros.
    static MLA_DEVICE void clear(u32 rows, u32 tokens) {
#pragma unroll 1
        for (u32 byte = 0; byte < tokens * kRowBytes; byte += 16) store_shared_16b(rows + byte, uint4{0, 0, 0, 0});
    }

    const GatherParams& params_;
    u32 smem_;
    StageRing ring_;
};

}  // namespace mla
