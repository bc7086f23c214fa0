// The loader warps of the narrow kernel for gathered tokens: they walk the items tile by tile, ahead of the arithmetic and
// across items, and ask for the rows of each tile's tokens with cp.async, eight lanes to 128 bytes of a row.
#pragma once
#include "decode/gathered/narrow_query.h"
#include "decode/gathered/narrow_smem.h"
#include "decode/gathered/narrow_work.h"
#include "decode/narrow/store.h"
#include "decode/rows.h"
#include "ptx/copy_async.h"
#include "ptx/load.h"
#include "ptx/tma.h"
#include "ptx/warp.h"
#include "source/gathered.h"

namespace mla {

// Bits of the 16 tokens that scores warp `warp` has scores of, written by the loader warp of the same number before it arrives
// for the tile's first group.
MLA_DEVICE u32 valid_word(u32 smem, const GroupRing& ring, u32 warp) {
    return smem + Smem::valid + ring.first * Smem::valid_bytes + warp * static_cast<u32>(sizeof(u32));
}
constexpr u32 kAllValid = (1u << kWarpTokens) - 1;

// By lane 0 of a scores warp, one of those that announce P: racecheck follows whoever reads and arrives himself.
MLA_DEVICE u32 read_valid(u32 smem, const GroupRing& ring, u32 warp, u32 lane) {
    const u32 valid = lane == 0 ? load_shared_u32(valid_word(smem, ring, warp)) : 0;
    return __shfl_sync(kFullWarp, valid, 0);
}

// Whether the first item is what was read ahead of the wait for the kernel ahead.
constexpr bool kOpensEarly = kIsPlanned && kRows == 16;

// `next_work` from the CTA's first item on.
MLA_DEVICE BlockWork first_work(const GatherParams& params, const Items& items, i32& item) {
    item = items.first();
    if (!kOpensEarly || !items.opened().has_tiles()) return next_work(params, items, item);
    item += items.step();
    return items.opened();
}

class TokenLoader {
public:
    // What is done with the first item while the kernel ahead may still run: hints, of what to bring to L2.
    static MLA_DEVICE auto ahead(const GatherParams& params) {
        if constexpr (kOpensEarly)
            return [&params](const BlockWork& work) {
                const u32 warpgroup = threadIdx.x / kWarpgroupThreads, thread = threadIdx.x % kWarpgroupThreads;
                if (warpgroup > kValuesWarpgroup)
                    prefetch_first(params, work, thread);
                else if (warpgroup == kValuesWarpgroup)
                    prefetch_first_rows(params, work, thread);
            };
        else
            return NothingAhead{};
    }

    // `thread` counts the loader threads.
    MLA_DEVICE TokenLoader(const GatherParams& params, const Items& items, u32 smem, u32 thread)
        : params_(params), items_(items), smem_(smem), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads) {
        const u32 row = warp_ * kWarpTokens + lane_ / kLineLanes;
        even_row_ = box_chunk_offset(row, lane_ % kLineLanes);
        odd_row_ = box_chunk_offset(row + kPassTokens, lane_ % kLineLanes);
    }

    // Indices are read one tile ahead, also across items: their latency hides behind the copies of a tile.
    MLA_DEVICE void run() {
        i32 item;
        BlockWork work = first_work(params_, items_, item);
        i32 slot = read(work, work.tile_begin);
        while (work.has_tiles()) {
            const BlockWork next = next_work(params_, items_, item);
            if (kRowsAlongM)
                load_query_groups(work);
            else if (kTakesTurns)
                load_query(work);
            else if (next.has_tiles())
                prefetch_query(params_, next, warp_ * kWarpThreads + lane_);
            for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
                const bool is_last = tile + 1 == work.tile_end;
                const i32 next_slot = is_last ? read(next, next.tile_begin) : read(work, tile + 1);
                load_tile(work.kv_head, slot, is_extra_tile(work, tile));
                slot = next_slot;
            }
            work = next;
        }
    }

private:
    static constexpr u32 kLineLanes = kBoxRowBytes / 16;  // lanes that copy one row of a box
    static constexpr u32 kPassTokens = kWarpThreads / kLineLanes;
    static constexpr u32 kPasses = kWarpTokens / kPassTokens;
    static_assert(2 * kPassTokens == kAtomRows, "the swizzle of a lane's rows is one of two");

    // Indices and Q.
    static MLA_DEVICE void prefetch_first(const GatherParams& params, const BlockWork& work, u32 thread) {
        if (!work.has_tiles()) return;
        prefetch_query(params, work, thread);
        if (kHasBlockTable) return;
        constexpr i32 kLineIndices = 128 / sizeof(i32);
        const TokenRun tokens = tokens_from(params, work, work.tile_begin);
        for (i32 place = thread * kLineIndices; place < tokens.left; place += kLoaderWarps * kWarpThreads * kLineIndices)
            prefetch_to_l2(tokens.indices + place);
    }

    // The rows of the first tile, and no more: the merge ahead reads, too. By the values warps, which are idle yet. Indices may be
    // about to be written: then other rows are asked for, or none.
    static MLA_DEVICE void prefetch_first_rows(const GatherParams& params, const BlockWork& work, u32 thread) {
        static_assert(kTileTokens <= kWarpgroupThreads, "a thread for each token");
        if (kHasBlockTable || !work.has_tiles()) return;
        const TokenRun tokens = tokens_from(params, work, work.tile_begin);
        if (static_cast<i32>(thread) >= min_i32(tokens.left, kTileTokens)) return;
        const i32 slot = load_global_relaxed(tokens.indices + thread);
        if (!is_token(params, slot, tokens.is_extra)) return;
        const u8* const row = token_address(params, slot, tokens.is_extra) + work.kv_head * head_stride(params, tokens.is_extra);
        tma_prefetch_bytes(row, (kByRequest ? kLatentBoxes : kTileBoxes) * kBoxRowBytes);
        if (kByRequest && kRopeBoxes > 0)
            tma_prefetch_bytes(token_rope_address(params, slot) + work.kv_head * params.kv_rope_stride_head,
                               kRopeBoxes * kBoxRowBytes);
    }

    // A hint: Q of an item to L2, which the scores warpgroup waits for.
    static MLA_DEVICE void prefetch_query(const GatherParams& params, const BlockWork& work, u32 thread) {
        for (u32 line = thread; line < kRows * kTileBoxes; line += kLoaderWarps * kWarpThreads) {
            const u32 box = line % kTileBoxes;
            const QueryRow row = query_row(params, work, line / kTileBoxes, 0);
            if (row.exists)
                prefetch_to_l2(box < kLatentBoxes ? row.latent + box * kBoxColumns
                                                  : row.rope + (box - kLatentBoxes) * kBoxColumns);
        }
    }

    // Of an item, where the loaders bring it. Rows that do not exist are zeros.
    MLA_DEVICE void load_query(const BlockWork& work) {
        mbarrier_wait(query_empty_barrier(smem_), query_parity_ ^ 1);  // passes at once for the first item
        query_parity_ ^= 1;
        const u32 chunk = lane_ % kLineLanes;
#pragma unroll
        for (u32 first = 0; first < kRows; first += kLoaderWarps * kPassTokens) {
            const u32 row_in_block = first + warp_ * kPassTokens + lane_ / kLineLanes;
            copy_query_chunks(params_, work, smem_, row_in_block, chunk);
        }
        copy_async_arrive(query_full_barrier(smem_));
    }

    // The same through the ring, two boxes of Q in the place of one of a tile, or four.
    MLA_DEVICE void load_query_groups(const BlockWork& work) {
        constexpr u32 kPlaceBoxes = kGroupBytes / kRowBoxBytes;
        const u32 chunk = lane_ % kLineLanes;
#pragma unroll
        for (u32 group = 0; group != kQueryGroups; ++group) {
            const GroupRing::Place place = ring_.place(group);
#pragma unroll
            for (u32 i = 0; i < kGroupFrees; ++i) mbarrier_wait(empty_barrier(smem_, place.index, i), place.parity ^ 1);
#pragma unroll
            for (u32 first = 0; first < kRows; first += kLoaderWarps * kPassTokens) {
                const u32 row_in_block = first + warp_ * kPassTokens + lane_ / kLineLanes;
                const QueryRow row = query_row(params_, work, row_in_block, chunk * kChunkColumns);
                const u32 destination = smem_ + Smem::ring + place.index * kGroupBytes + box_chunk_offset(row_in_block, chunk);
                const u32 bytes = row.exists ? 16 : 0;
#pragma unroll
                for (u32 box = group * kPlaceBoxes; box < kTileBoxes && box < (group + 1) * kPlaceBoxes; ++box)
                    copy_async_16b<false>(destination + box % kPlaceBoxes * kRowBoxBytes,
                                          box < kLatentBoxes ? row.latent + box * kBoxColumns
                                                             : row.rope + (box - kLatentBoxes) * kBoxColumns,
                                          bytes);
            }
            copy_async_arrive(full_barrier(smem_, place.index));
            if (lane_ == 0) mbarrier_arrive(full_barrier(smem_, place.index));
        }
        ring_.skip_query();
    }

    // The slot of token lane % 16 of this warp's share of a tile. Indices past the last that counts are not read.
    MLA_DEVICE i32 read(const BlockWork& work, i32 tile) const {
        if (!work.has_tiles()) return -1;
        const TokenRun tokens = tokens_from(params_, work, tile);
        const i32 place = warp_ * kWarpTokens + lane_ % kWarpTokens;
        return place < tokens.left ? __ldg(tokens.indices + place) : -1;
    }

    // Of this warp's tokens, the one that this lane copies from in a pass; and its row, from this lane's chunk on, given the
    // address of the row of token lane % 16.
    MLA_DEVICE u32 token_of_pass(u32 pass) const { return pass * kPassTokens + lane_ / kLineLanes; }
    MLA_DEVICE const u8* row_of_pass(u64 address, u32 pass) const {
        const u64 row = __shfl_sync(kFullWarp, address, token_of_pass(pass));
        return reinterpret_cast<const u8*>(row) + lane_ % kLineLanes * 16;
    }

    MLA_DEVICE void load_tile(i32 kv_head, i32 slot, bool is_extra) {
        const bool is_valid = is_token(params_, slot, is_extra);
        const u32 valid = __ballot_sync(kFullWarp, is_valid) & kAllValid;
        // Of a token that there is not, any place within the cache: nothing is read, but an address outside might be checked.
        const u64 address =
            reinterpret_cast<u64>(token_address(params_, is_valid ? slot : 0, is_extra) + kv_head * head_stride(params_, is_extra));
        u64 rope_address = 0;
        if constexpr (kByRequest && kRopeBoxes > 0)
            rope_address = reinterpret_cast<u64>(token_rope_address(params_, is_valid ? slot : 0) +
                                                 kv_head * params_.kv_rope_stride_head);
        const u8* rows[kPasses];  // of this lane's token in each pass, from its chunk on
        u32 bytes[kPasses];
#pragma unroll
        for (u32 pass = 0; pass < kPasses; ++pass) {
            rows[pass] = row_of_pass(address, pass);
            bytes[pass] = (valid >> token_of_pass(pass) & 1) * 16;  // a token that there is not is zeros
        }
#pragma unroll
        for (u32 group = 0; group < kTileGroups; ++group) {
            const GroupRing::Place place = ring_.place(group);
            const u32 boxes = box_address(smem_, ring_, group * kGroupBoxes);
#pragma unroll
            for (u32 freed = 0; freed < kGroupFrees; ++freed) {
                mbarrier_wait(empty_barrier(smem_, place.index, freed), place.parity ^ 1);  // passes at once in the first lap
                if (group == 0 && freed == 0 && lane_ == 0) store_shared_u32(valid_word(smem_, ring_, warp_), valid);
                const u32 begin = group * kGroupBoxes + freed * kFreedBoxes;
#pragma unroll
                for (u32 pass = 0; pass < kPasses; ++pass) {
                    const u32 destination = boxes + (pass % 2 ? odd_row_ : even_row_) + pass / 2 * kSwizzleAtomBytes;
                    const u8* source = rows[pass];
#pragma unroll
                    for (u32 box = begin; box < begin + kFreedBoxes; ++box) {
                        if (kByRequest && box == kLatentBoxes)  // from here on it is another array, in place of these boxes
                            source = row_of_pass(rope_address, pass) - kLatentBoxes * kBoxRowBytes;
                        copy_async_16b<kWholeLines>(destination + box % kGroupBoxes * kBoxBytes, source + box * kBoxRowBytes,
                                                    bytes[pass]);
                    }
                }
            }
            copy_async_arrive(full_barrier(smem_, place.index));
            if (lane_ == 0) mbarrier_arrive(full_barrier(smem_, place.index));
        }
        ring_.advance();
    }

    const GatherParams& params_;
    const Items& items_;
    u32 smem_, warp_, lane_;
    u32 even_row_, odd_row_;  // where this lane's chunk lies in a box, in even and odd passes
    GroupRing ring_;
    u32 query_parity_ = 0;
};

}  // namespace mla
