// The loader warps of the wide prefill kernel: for each item a stage with its query rows, then its tiles, across items. Every lane
// copies 16 bytes of each box of a row, eight lanes a row.
#pragma once
#include "decode/gathered/prefill_smem.h"
#include "decode/wide/row_places.h"
#include "ptx/copy_async.h"
#include "ptx/warp.h"
#include "source/gathered.h"

namespace mla {

// What a warp is to ask for next, in shared memory: it has few registers.
struct LoaderState {
    const i32* indices = nullptr;  // of the next tile
    i32 left = 0;                  // indices from there on; none: nothing is left
    i32 item = 0;                  // its complement while its query rows are due
};
constexpr u32 kOfHead = 16;  // behind it: from kv head 0 to the item's, in bytes
static_assert(kOfHead == sizeof(LoaderState) && kOfHead + sizeof(u64) <= kLoaderStateBytes, "WideSmem reserves as much");

class TokenLoader {
public:
    MLA_DEVICE TokenLoader(const GatherParams& params, const Items& items, u32 smem)
        : params_(params), items_(items), smem_(smem) {}

    MLA_DEVICE void run() {
        open_item(items_.first());
        for (u32 stages = 0;; ++stages) {  // asked for so far
            const LoaderState state = get_state();
            if (state.left <= 0) break;
            const u32 stage = stages % kStages;
            mbarrier_wait(tile_empty(smem_, stage), stages / kStages % 2 ^ 1);  // passes at once in the first lap
            if (state.item < 0)
                load(stage, query_rows(~state.item), 0);
            else
                load_tile(stage);
            advance();
        }
    }

private:
    static constexpr u32 kRowLanes = kBoxRowBytes / 16;  // lanes that copy a row of a box
    static constexpr u32 kRowsAtOnce = kWarpThreads / kRowLanes;

    // From the special register each time. Pinned, or the compiler keeps what comes of it, for which no registers are left.
    static MLA_DEVICE u32 thread() {
        u32 thread = threadIdx.x;
        pin_register(thread);
        return thread;
    }
    static MLA_DEVICE u32 lane() { return thread() % kWarpThreads; }
    static MLA_DEVICE u32 warp() { return thread() % kWarpgroupThreads / kWarpThreads; }
    static MLA_DEVICE u32 chunk() { return lane() % kRowLanes; }

    MLA_DEVICE u32 state_address() const { return smem_ + WideSmem::loader + warp() * kLoaderStateBytes; }

    MLA_DEVICE LoaderState get_state() const {
        u32 words[4];
        load_shared_words(state_address(), words);
        return {reinterpret_cast<const i32*>(static_cast<u64>(words[1]) << 32 | words[0]), static_cast<i32>(words[2]),
                static_cast<i32>(words[3])};
    }

    MLA_DEVICE void put_state(const LoaderState& next) const {
        const u64 indices = reinterpret_cast<u64>(next.indices);
        __syncwarp();
        if (lane() == 0)
            store_shared_16b(state_address(), uint4{static_cast<u32>(indices), static_cast<u32>(indices >> 32),
                                                    static_cast<u32>(next.left), static_cast<u32>(next.item)});
        __syncwarp();
    }

    // Before put_state, for the others' sake.
    MLA_DEVICE void put_head_offset(i64 bytes) const {
        __syncwarp();
        if (lane() == 0)
            store_shared_8b(state_address() + kOfHead, uint2{static_cast<u32>(bytes), static_cast<u32>(bytes >> 32)});
    }

    MLA_DEVICE void advance() {
        LoaderState next = get_state();
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
        } else {
            open_item(next.item + items_.step());
        }
    }

    // Moves to the first item from `item` on that has tiles for this CTA.
    MLA_DEVICE void open_item(i32 item) {
        LoaderState next{};
        for (; item < items_.end(); item += items_.step()) {
            const BlockWork work = load_block_work(params_, item);
            if (work.has_tiles()) {
                const TokenRun tokens = tokens_from(params_, work, work.tile_begin);
                next = {tokens.indices, tokens.left, ~item};
                i32 kv_head = work.kv_head;
                pin_register(kv_head);  // else the product is kept from item to item
                put_head_offset(kv_head * params_.kv_stride_head);
                break;
            }
        }
        put_state(next);
        read_indices(next);
    }

    // Lane l has the index of token l % 16. Indices past the last one that counts are not read.
    MLA_DEVICE void read_indices(const LoaderState& next) {
        const i32 token = warp() * kLoaderTokens + lane() % kLoaderTokens;
        index_ = token < next.left ? __ldg(next.indices + token) : -1;
    }

    // Rows of this warp's share. Lane l has the address of row l % 16.
    struct Rows {
        u64 address;
        u32 exist;  // a bit for each
    };

    MLA_DEVICE Rows query_rows(i32 item) const {
        const BlockWork work = load_block_work(params_, item);
        const QueryRow query = query_row(params_, work, row_at(work, warp() * kLoaderTokens + lane() % kLoaderTokens), 0);
        return {reinterpret_cast<u64>(query.latent), __ballot_sync(kFullWarp, query.exists)};
    }

    // From kv head 0 to the item's. Of one kv head no stride counts.
    MLA_DEVICE u64 head_offset() const {
        if (params_.kv_stride_head == 0) return 0;
        const uint2 offset = load_shared_8b(state_address() + kOfHead);
        return static_cast<u64>(offset.y) << 32 | offset.x;
    }

    MLA_DEVICE void load_tile(u32 stage) const {
        const bool is_valid = is_token(params_, index_);
        // Of a token that there is not, any place within the cache: nothing is read, but an address outside might be checked.
        const u8* first = token_address(params_, is_valid ? index_ : 0);
        const Rows rows{reinterpret_cast<u64>(first) + head_offset(), __ballot_sync(kFullWarp, is_valid)};
        load(stage, rows, rows.exist);
    }

    // A row that there is not is a copy of no bytes: zeros. `valid`: a bit for each token of this warp's share.
    MLA_DEVICE void load(u32 stage, const Rows& rows, u32 valid) const {
#pragma unroll 1
        for (u32 place = lane() / kRowLanes; place < kLoaderTokens; place += kRowsAtOnce) {
            const u64 address = __shfl_sync(kFullWarp, rows.address, place);
            const u32 row = warp() * kLoaderTokens + place;
            const u8* source = reinterpret_cast<const u8*>(address) + chunk() * 16;
            const u32 bytes = (rows.exist >> place & 1) * 16;
            const u32 destination = stage_address(smem_, stage) + latent_row(row, 0) + ((chunk() ^ row % kAtomRows) << 4);
#pragma unroll
            for (u32 box = 0; box < kLatentBoxes; ++box)
                copy_async_16b<kWholeLines>(destination + box * kSwizzleAtomBytes, source + box * kBoxRowBytes, bytes);
        }
        const u32 full = tile_full(smem_, stage);
        copy_async_arrive(full);
        if (lane() == 0) {
            store_shared_u16(smem_ + WideSmem::valid + stage * kValidBytes + warp() * 2, valid & 0xFFFF);
            mbarrier_arrive(full);
        }
    }

    const GatherParams& params_;
    const Items& items_;
    u32 smem_;
    i32 index_;
};

}  // namespace mla
