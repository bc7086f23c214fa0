// The loader of the wide kernel: walks a part's items tile by tile, ahead of the arithmetic, and asks TMA for each KV tile. Run
// by one values warp, whole. Where it stands lies in shared memory, and the page numbers of the next tile come there by
// cp.async: a load into a register would be waited for at once, where the warp has multiplications to issue.
#pragma once
#include "decode/fp8/smem.h"
#include "decode/work_item.h"
#include "ptx/copy_async.h"
#include "ptx/warp.h"
#include "source/paged.h"

namespace mla {

static_assert(kChunks <= kLoaderPages, "Fp8Smem reserves a word for each");
static_assert(kGroupTokens == kAtomRows, "a copy brings whole swizzle atoms: pages hold multiples of 16 tokens");

class WideLoader {
public:
    MLA_DEVICE WideLoader(const TensorMap* latent, const TensorMap* rope, const DecodeParams& params, u32 smem)
        : latent_(latent), rope_(rope), params_(params), smem_(smem) {}

    MLA_DEVICE void start(i32 item, i32 item_end) const { open_item(item, item_end); }

    // Asks for the next tile, if there is one, into a stage that is free.
    MLA_DEVICE void load_next(u32 stage_index) const {
        const Place place = load_place();
        if (place.tile >= place.tile_end) return;
        const i32 first_key = place.tile * kTileTokens;
        const u32 full = barrier_of(smem_, Fp8Smem::tile_full, stage_index);
        // Chunks past the sequence's end have no page to come from.
        const u32 valid_chunks =
            kChunks == 1 ? 1 : ceil_div(min_i32(place.seqlen_k - first_key, kTileTokens), kChunkTokens);
        if (lane() < valid_chunks) {
            if (lane() == 0) mbarrier_arrive_expect_bytes(full, valid_chunks * kChunkTokens * (kLatent + kRope));
            copy_async_wait();
            const i32 page = load_shared_u32(page_address());
            const u32 token = lane() * kChunkTokens;
            const u32 stage = stage_address(smem_, stage_index);
            const KvPlace kv(params_, first_key + static_cast<i32>(token), page, place.kv_head);
            tma_load_5d(stage + token / kAtomRows * kLatentGroupBytes, latent_, full, 0, 0, 0, kv.group, kv.latent);
            if constexpr (kRope > 0)
                tma_load_5d(stage + kStageRope + token * kRope, rope_, full, 0, 0, 0, kv.group, kv.rope);
        }
        if (place.tile + 1 < place.tile_end) {
            if (lane() == 0) store_shared_u32(smem_ + Fp8Smem::loader, place.tile + 1);
            request_pages(place.tile + 1, place.seqlen_k, load_item().request);
        } else {
            const Item current = load_item();
            open_item(current.item + 1, current.item_end);
        }
        __syncwarp();
    }

private:
    // Where the loader stands: the next tile of an item, and the item. Each is read at once.
    struct Place {
        i32 tile, tile_end, seqlen_k, kv_head;
    };
    struct Item {
        i32 request, item, item_end;
    };

    MLA_DEVICE Place load_place() const {
        u32 words[4];
        load_shared_words(smem_ + Fp8Smem::loader, words);
        return {static_cast<i32>(words[0]), static_cast<i32>(words[1]), static_cast<i32>(words[2]), static_cast<i32>(words[3])};
    }
    MLA_DEVICE Item load_item() const {
        u32 words[4];
        load_shared_words(smem_ + Fp8Smem::loader + kLoaderPlaceBytes, words);
        return {static_cast<i32>(words[0]), static_cast<i32>(words[1]), static_cast<i32>(words[2])};
    }

    // From the special register each time: no register is left to keep it in.
    static MLA_DEVICE u32 lane() {
        u32 thread = threadIdx.x;
        pin_register(thread);
        return thread % kWarpThreads;
    }

    // Each lane asks for and reads its own.
    MLA_DEVICE u32 page_address() const { return smem_ + Fp8Smem::loader + 2 * kLoaderPlaceBytes + lane() * sizeof(i32); }

    // Moves to the first item from `item` on that has tiles for this CTA.
    MLA_DEVICE void open_item(i32 item, i32 item_end) const {
        BlockWork work{};
        for (; item < item_end; ++item) {
            work = load_block_work(params_, item);
            if (work.has_tiles()) break;
        }
        const bool exists = item < item_end;
        __syncwarp();
        if (lane() == 0) {
            store_shared_16b(smem_ + Fp8Smem::loader,
                             uint4{static_cast<u32>(work.tile_begin), static_cast<u32>(exists ? work.tile_end : work.tile_begin),
                                   static_cast<u32>(work.seqlen_k), static_cast<u32>(work.kv_head)});
            store_shared_16b(smem_ + Fp8Smem::loader + kLoaderPlaceBytes,
                             uint4{static_cast<u32>(work.request), static_cast<u32>(item), static_cast<u32>(item_end), 0});
        }
        __syncwarp();
        if (exists) request_pages(work.tile_begin, work.seqlen_k, work.request);
    }

    MLA_DEVICE void request_pages(i32 tile, i32 seqlen_k, i32 request) const {
        if (lane() >= kChunks) return;
        const u32 token = tile * kTileTokens + lane() * kChunkTokens;
        copy_async_4b(page_address(), pages_of(params_, request) + token / kPageSize, token < static_cast<u32>(seqlen_k));
    }

    const TensorMap* latent_;
    const TensorMap* rope_;
    const DecodeParams& params_;
    u32 smem_;
};

}  // namespace mla
