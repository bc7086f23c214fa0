// The loader warp: walks a part's items tile by tile, ahead of the arithmetic and across items, and asks TMA for each tile.
#pragma once
#include "decode/fp8/smem.h"
#include "decode/work_item.h"
#include "ptx/launch.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "source/paged.h"

namespace mla {

static_assert(kGroupTokens == kAtomRows, "a copy brings whole swizzle atoms: pages hold multiples of 16 tokens");
static_assert(kChunks <= kWarpThreads, "a lane for each chunk of a tile");

class Fp8Loader {
public:
    MLA_DEVICE Fp8Loader(const TensorMap* latent, const TensorMap* rope, const DecodeParams& params, u32 smem)
        : latent_(latent), rope_(rope), params_(params), smem_(smem) {}

    // Page numbers are read one tile ahead, before the wait for a free stage: their latency hides behind it.
    MLA_DEVICE void load_item(const BlockWork& work) {
        const i32* pages = pages_of(params_, work.request);
        pin_register(pages);
        pdl_wait();
        i32 page = page_of_chunk(pages, work.tile_begin, lane(), work.seqlen_k);
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            const i32 next = page_of_chunk(pages, min_i32(tile + 1, work.tile_end - 1), lane(), work.seqlen_k);
            load_tile(work, tile, page);
            if (kLaunchesFromLoader && tile == work.tile_begin) pdl_launch_dependents();
            page = next;
        }
    }

private:
    // From the special register each time: no register is left to keep it in.
    static MLA_DEVICE u32 lane() {
        u32 thread = threadIdx.x;
        pin_register(thread);
        return thread % kWarpThreads;
    }

    MLA_DEVICE void load_tile(const BlockWork& work, i32 tile, i32 page) {
        const i32 first_key = tile * kTileTokens;
        const u32 valid_chunks = ceil_div(min_i32(work.seqlen_k - first_key, kTileTokens), kChunkTokens);
        mbarrier_wait(barrier_of(smem_, Fp8Smem::tile_empty, ring_.index()), ring_.parity() ^ 1);  // passes in the first lap
        if (lane() == 0) {
#pragma unroll
            for (u32 part = 0; part < kTileParts; ++part)
                mbarrier_arrive_expect_bytes(part_full(smem_, ring_.index(), part),
                                             valid_chunks * kChunkTokens * (kLatent / kTileParts + (part + 1 == kTileParts ? kRope : 0)));
        }
        __syncwarp();
        if constexpr (kChunks == 1) {
            // Known to be the same in all of the warp: else each copy is asked for in a loop over those that differ.
            page = __shfl_sync(kFullWarp, page, 0);
            if (lane() < valid_chunks) load_chunk(work, first_key, 0, page);
        } else {
            if (lane() < valid_chunks) load_chunk(work, first_key, lane(), page);
        }
        __syncwarp();
        ring_.advance();
    }

    MLA_DEVICE void load_chunk(const BlockWork& work, i32 first_key, u32 chunk, i32 page) const {
        const u32 token = chunk * kChunkTokens;
        const u32 stage = stage_address(smem_, ring_.index());
        const KvPlace place(params_, first_key + static_cast<i32>(token), page, work.kv_head);
#pragma unroll
        for (u32 part = 0; part < kTileParts; ++part)
            tma_load_5d(stage + part * kStagePart + token / kAtomRows * kLatentGroupBytes, latent_,
                        part_full(smem_, ring_.index(), part), 0, 0, part * kPartBoxes, place.group, place.latent);
        if constexpr (kRope > 0)
            tma_load_5d(stage + kStageRope + token * kRope, rope_, part_full(smem_, ring_.index(), kTileParts - 1), 0, 0, 0, place.group,
                        place.rope);
    }

    const TensorMap* latent_;
    const TensorMap* rope_;
    const DecodeParams& params_;
    u32 smem_;
    RingPosition<kStages> ring_;
};

}  // namespace mla
