// Brings what gathered tokens are multiplied by and they themselves: for each item a stage with its query rows, then its tiles.
// Every values warp gathers eight rows of each stage, ahead of the arithmetic and across items. Indices are read one tile
// ahead: their latency hides behind a tile's arithmetic.
#pragma once
#include "decode/wide/row_places.h"
#include "decode/wide/smem.h"
#include "ptx/copy_async.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "source/gathered.h"

namespace mla {

// Where a warp stands, in shared memory: it has no registers to spare.
struct alignas(16) GatherState {
    const i32* indices;  // of the next tile
    i32 left;            // indices of the item's list from there on; none: nothing is left
    i32 item;            // with kOfExtra in the extra list; its complement while its query rows are due
};
static_assert(sizeof(GatherState) == kGatherStateBytes, "WideSmem reserves this much");

// Every lane when what it has asked for is there, and lane 0 of each warp for the valid bits.
constexpr u32 kGatherArrivals = kGatherWarps * (kWarpThreads + 1);

// GatherState::item while no query rows are due.
constexpr i32 kOfExtra = 1 << 30;  // no plan has so many items
MLA_DEVICE i32 item_index(i32 item) { return kHasExtra ? item & ~kOfExtra : item; }
MLA_DEVICE bool is_of_extra(i32 item) { return kHasExtra && (item & kOfExtra) != 0; }

class Gatherer {
public:
    MLA_DEVICE Gatherer(const GatherParams& params, const Items& items, u32 smem, u8* shared)
        : params_(params), items_(items), smem_(smem), states_(reinterpret_cast<GatherState*>(shared + WideSmem::loader)) {}

    MLA_DEVICE void start() { open_item(items_.first()); }

    // Asks for this warp's share of what comes next, if anything does, into a stage that is free.
    MLA_DEVICE void load_next(u32 stage) {
        if (state()->left <= 0) return;
        gather(stage);
        GatherState next = *state();
        if (next.item < 0) {
            next.item = ~next.item;
            put_state(next);
            return;
        }
        next.left -= kTileTokens;
        if (next.left > 0) {
            next.indices += kTileTokens;
            put_state(next);
            read_indices(next);
        } else if (kHasExtra && !is_of_extra(next.item)) {
            open_item(next.item, true);
        } else {
            open_item(item_index(next.item) + items_.step());
        }
    }

private:
    static MLA_DEVICE u32 lane() { return thread() % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return thread() / kWarpThreads - kWarpgroupWarps; }

    // From the special register each time. Pinned, or the compiler computes all addresses once and keeps them, for which no
    // registers are left.
    static MLA_DEVICE u32 thread() {
        u32 thread = threadIdx.x;
        pin_register(thread);
        return thread;
    }

    MLA_DEVICE GatherState* state() const { return states_ + warp(); }

    // Whether the tile at hand is of the extra list. Looked up each time: no register is left to keep it in.
    MLA_DEVICE bool is_extra() const { return is_of_extra(state()->item); }

    MLA_DEVICE void put_state(const GatherState& next) {
        __syncwarp();
        if (lane() == 0) *state() = next;
        __syncwarp();
    }

    // Moves to the first item from `item` on that has tiles for this CTA; of this one, only those of its second list count if
    // its first one is done.
    MLA_DEVICE void open_item(i32 item, bool is_first_done = false) {
        GatherState next{};
        for (; item < items_.end(); item += items_.step()) {
            const BlockWork work = load_block_work(params_, item);
            const i32 tile = kHasExtra && is_first_done ? first_list_tiles(work) : work.tile_begin;
            if (work.exists() && tile < work.tile_end) {
                const TokenRun tokens = tokens_from(params_, work, tile);
                const i32 in_list = tokens.is_extra ? item | kOfExtra : item;
                next = {tokens.indices, tokens.left, kHasExtra && is_first_done ? in_list : ~in_list};
                break;
            }
            is_first_done = false;
        }
        put_state(next);
        read_indices(next);
    }

    // Lane l has the index of token l % 8. Indices past the last one that counts are not read.
    MLA_DEVICE void read_indices(const GatherState& next) {
        const i32 token = warp() * kAtomRows + lane() % kAtomRows;
        index_ = token < next.left ? __ldg(next.indices + token) : -1;
    }

    // 16 bytes of a row, from a box to the next.
    struct RowChunk {
        const u8* first;
        u32 bytes;  // none of a row that there is not
    };

    MLA_DEVICE QueryRow query_of(const BlockWork& work, u32 row, u32 chunk) {
        return query_row(params_, work, row_at(work, warp() * kAtomRows + row), chunk * 8);
    }

    MLA_DEVICE RowChunk query_chunk(i32 item, u32 row, u32 chunk) {
        const QueryRow query = query_of(load_block_work(params_, item), row, chunk);
        return {reinterpret_cast<const u8*>(query.latent), query.exists ? 16u : 0u};
    }

    MLA_DEVICE RowChunk token_chunk(i32 item, u32 row, u32 chunk) {
        const i32 slot = __shfl_sync(kFullWarp, index_, row);
        const u8* first = token_address(params_, slot, is_extra()) + chunk * 16;
        // Of one kv head no stride counts, of neither cache.
        if (params_.kv_stride_head != 0)
            first += load_block_work(params_, item_index(item)).kv_head * head_stride(params_, is_extra());
        return {first, is_token(params_, slot, is_extra()) ? 16u : 0u};
    }

    // The same of its rope part. By request it may lie anywhere, and is looked for when its turn has come.
    MLA_DEVICE const u8* rope_chunk(const RowChunk& source, i32 item, u32 row, u32 chunk) {
        if constexpr (!kByRequest) return source.first + kLatentBoxes * kBoxRowBytes;
        if (item < 0) {
            const BlockWork work = load_block_work(params_, ~item);
            return reinterpret_cast<const u8*>(query_of(work, row, chunk).rope);
        }
        const u8* rope = token_rope_address(params_, __shfl_sync(kFullWarp, index_, row)) + chunk * 16;
        if (params_.kv_rope_stride_head != 0)
            rope += load_block_work(params_, item).kv_head * params_.kv_rope_stride_head;
        return rope;
    }

    // Eight lanes bring a row, 16 bytes each of every box; four rows at once.
    MLA_DEVICE void gather(u32 stage_index) {
        constexpr u32 kChunks = kBoxRowBytes / 16;
        constexpr u32 kRowsAtOnce = kWarpThreads / kChunks;
        const u32 stage = stage_address(smem_, stage_index);
        const i32 item = state()->item;
#pragma unroll 1
        for (u32 row = lane() / kChunks; row < kAtomRows; row += kRowsAtOnce) {
            const u32 chunk = lane() % kChunks;
            const RowChunk source = item < 0 ? query_chunk(item_index(~item), row, chunk) : token_chunk(item, row, chunk);
            const u32 in_atom = box_chunk_offset(row, chunk);
            const u32 latent = stage + warp() * kLatentGroupBytes + in_atom;
#pragma unroll
            for (u32 box = 0; box < kLatentBoxes; ++box)
                copy_async_16b<kWholeLines>(latent + box * kSwizzleAtomBytes, source.first + box * kBoxRowBytes, source.bytes);
            if constexpr (kRopeBoxes > 0)
                copy_async_16b<kWholeLines>(stage + kStageRope + warp() * kSwizzleAtomBytes + in_atom, rope_chunk(source, item, row, chunk), source.bytes);
        }
        const u32 full = tile_full(smem_, stage_index);
        copy_async_arrive(full);
        const u32 valid = __ballot_sync(kFullWarp, is_token(params_, index_, is_extra()));
        if (lane() == 0) {
            store_shared_u8(smem_ + WideSmem::valid + stage_index * kGatherWarps + warp(), valid & 0xFF);
            mbarrier_arrive(full);
        }
    }

    const GatherParams& params_;
    const Items& items_;
    u32 smem_;
    GatherState* states_;
    i32 index_;
};

}  // namespace mla
