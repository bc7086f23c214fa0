// Rows that a warp has made in shared memory, on their way to the cache.
// Where L2 has only a part of a sector of 32 bytes it must read the rest before it can write it to memory. Rows of 656 and 528
// bytes begin in the middle of a sector, and scales are a few bytes each. So a row is written as a whole, and rows that are
// neighbours in the cache as one.
#pragma once
#include "cache/blocks.h"
#include "ptx/copy_async.h"

namespace mla {

// Of a token: codes, scales unless they are at the page's end, bfloat16 values.
constexpr i32 kCodedBytes = kChunks[0] * kCodeBytes;
constexpr i32 kPlainStart = kCodedBytes + kRowScaleBytes;
constexpr i32 kRowBytes = kPlainStart + kChunks[1] * kChunkBytes;
constexpr i32 kPageEndBytes = kRowScaleBytes == 0 ? 8 : 0;

constexpr i32 kSectorBytes = 32, kLineBytes = 128;

struct StagedRow {
    u8* row;     // in shared memory
    u8* scales;

    MLA_DEVICE StagedRow() {
        __shared__ alignas(kLineBytes) u8 rows[kBlockWarps * kWarpTokens * kRowBytes];
        __shared__ alignas(8) u8 page_ends[kBlockWarps * kWarpTokens * max_i32(kPageEndBytes, 1)];
        const i32 in_block = static_cast<i32>(threadIdx.y) * kWarpTokens + static_cast<i32>(threadIdx.x) / kTokenLanes;
        row = rows + in_block * kRowBytes;
        scales = kPageEndBytes > 0 ? page_ends + in_block * kPageEndBytes : row + kCodedBytes;
    }
};

// Where it goes.
struct CacheRow {
    u8* row;
    u8* scales;  // at the page's end
    bool exists;
    bool aligned;  // the warp's rows are, for 16 bytes at a time
    bool run;      // they are neighbours in the cache

    MLA_DEVICE CacheRow(const BlocksParams& params, CachePlace place, bool exists) : exists(exists) {
        const AppendSegment& segment = params.segments[0];
        row = cache_row(segment, place, 0);
        scales = token_scales(params, place);
        const u64 addresses = reinterpret_cast<u64>(segment.cache) | segment.cache_page_stride | segment.cache_token_stride;
        aligned = addresses % kChunkBytes == 0;
        const i32 index = static_cast<i32>(threadIdx.x) / kTokenLanes;
        const i32 page = __shfl_sync(kFullWarp, place.page, 0), offset = __shfl_sync(kFullWarp, place.offset, 0);
        run = __all_sync(kFullWarp, exists && place.page == page && place.offset == offset + index) &&
              segment.cache_token_stride == kRowBytes;
    }

    // Sectors of which only a part will be written, so that L2 has the rest when that comes.
    MLA_DEVICE void prefetch_partial_sectors() const {
        if (!exists || run) return;
        if (reinterpret_cast<u64>(row) % kSectorBytes != 0) prefetch_to_l2(row);
        if (reinterpret_cast<u64>(row + kRowBytes) % kSectorBytes != 0) prefetch_to_l2(row + kRowBytes - 1);
        if (kPageEndBytes > 0) prefetch_to_l2(scales);
    }

    // All lanes of the warp are there.
    MLA_DEVICE void write(const StagedRow& staged, i32 lane_of_token) const {
        __syncwarp();
        if (run && aligned) {
            const i32 index = static_cast<i32>(threadIdx.x) / kTokenLanes;
            const i32 before = index * kRowBytes;
            write_lines<kWarpThreads, kWarpTokens * kRowBytes>(staged.row - before, row - before, static_cast<i32>(threadIdx.x));
        } else if (exists && aligned) {
            write_lines<kTokenLanes, kRowBytes>(staged.row, row, lane_of_token);
        } else if (exists) {
            for (i32 byte = lane_of_token * 4; byte < kRowBytes; byte += kTokenLanes * 4)
                *reinterpret_cast<u32*>(row + byte) = *reinterpret_cast<const u32*>(staged.row + byte);
        }
        if (kPageEndBytes > 0 && exists && lane_of_token == 0)
            *reinterpret_cast<uint2*>(scales) = *reinterpret_cast<const uint2*>(staged.scales);
    }

private:
    // By so many lanes, in windows that begin where lines of the cache do.
    template <i32 kLanes, i32 kBytes>
    static MLA_DEVICE void write_lines(const u8* source, u8* target, i32 lane) {
        constexpr i32 kWindow = kLanes * kChunkBytes;
        const i32 start = static_cast<i32>(reinterpret_cast<u64>(target) % kLineBytes);
#pragma unroll
        for (i32 i = 0; i * kWindow < kBytes + kLineBytes - kChunkBytes; ++i) {
            const i32 byte = i * kWindow + lane * kChunkBytes - start;
            if (byte < 0 || byte >= kBytes) continue;
            *reinterpret_cast<uint4*>(target + byte) = *reinterpret_cast<const uint4*>(source + byte);
        }
    }
};

}  // namespace mla
