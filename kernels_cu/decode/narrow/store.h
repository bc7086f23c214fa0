// How the warpgroup that multiplies with swapped operands moves whole query rows between global memory and boxes of [kRows][64].
// Eight threads share a row: 16 bytes each, 128 contiguous bytes per box, free of bank conflicts in the swizzled box.
#pragma once
#include "decode/narrow/swapped.h"
#include "decode/rows.h"
#include "ptx/convert.h"
#include "ptx/copy_async.h"
#include "ptx/load.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"

namespace mla {

constexpr u32 kChunkColumns = 8;  // 16-bit values in 16 bytes
constexpr u32 kChunksPerBoxRow = kBoxColumns / kChunkColumns;
constexpr u32 kRowsPerPass = kWarpgroupThreads / kChunksPerBoxRow;
constexpr u32 kRowPasses = kRows / kRowsPerPass;

MLA_DEVICE uint4 load_shared_16b(u32 address) {
    return *static_cast<const uint4*>(__cvta_shared_to_generic(address));
}

// Q of the block, latent boxes first; zero for rows that do not exist.
class QueryRows {
public:
    // Where they lie, which is a division and some 100 instructions. Nothing but an access keeps ptxas from doing it later than it is
    // said, behind a wait.
    template <class Params>
    MLA_DEVICE void find(const Params& params, const BlockWork& work, u32 thread) {
        const u32 column = thread % kChunksPerBoxRow * kChunkColumns;
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
            const QueryRow row = query_row(params, work, thread / kChunksPerBoxRow + pass * kRowsPerPass, column);
            latent_[pass] = row.latent;
            rope_[pass] = row.rope;
            exists_[pass] = row.exists;
            pin_register(latent_[pass]);
            pin_register(rope_[pass]);
            if (!row.exists) continue;
            prefetch_to_l2(latent_[pass]);
            if (kRopeBoxes > 0) prefetch_to_l2(rope_[pass]);
        }
    }

    // No read-only loads: ptxas moves these ahead of a wait.
    MLA_DEVICE void read() {
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
#pragma unroll
            for (u32 box = 0; box < kTileBoxes; ++box) {
                const u16* const source = box < kLatentBoxes ? latent_[pass] + box * kBoxColumns
                                                             : rope_[pass] + (box - kLatentBoxes) * kBoxColumns;
                chunks_[pass][box] = load_global_16b(source, exists_[pass]);
            }
        }
    }

    MLA_DEVICE void write(u32 query, u32 thread) const {
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
            const u32 row = thread / kChunksPerBoxRow + pass * kRowsPerPass;
#pragma unroll
            for (u32 box = 0; box < kTileBoxes; ++box)
                store_shared_16b(query + box * kRowBoxBytes + box_chunk_offset(row, thread % kChunksPerBoxRow),
                                 chunks_[pass][box]);
        }
    }

private:
    const u16* latent_[kRowPasses];
    const u16* rope_[kRowPasses];
    bool exists_[kRowPasses];
    uint4 chunks_[kRowPasses][kTileBoxes];
};

// A fragment of the transposed accumulators (m64nN: lane / 4 and lane / 4 + 8 along M of the warp's 16, query rows along N)
// as values of a 16-bit type T into a box of [kRows][64 along M]. The warp writes chunks 2 * warp and 2 * warp + 1 of every row.
// `is_refined`: of P of a refined block, whose next eight rows are what T leaves out of the first (decode/work_item.h).
template <class T>
MLA_DEVICE void store_fragment_transposed(u32 box, u32 warp, u32 lane, const float (&fragment)[kRows / 2],
                                          bool is_refined = false) {
    constexpr u32 kRowsPerStore = 16;  // four 8x8 matrices: two of 8 rows, for each two of 8 along M
    const u32 row = lane / 16 * 8 + lane % 8;
    const u32 address = box + box_chunk_offset(row, warp * 2 + lane / 8 % 2);
#pragma unroll
    for (u32 store = 0; store < kRows / kRowsPerStore; ++store) {
        const float* f = fragment + store * 8;
        const u32 upper = pack2<T>(f[0], f[1]), lower = pack2<T>(f[2], f[3]);
        const bool is_rest = is_refined && store == 0;
        store_matrix_x4_transposed(address + store * kRowsPerStore * kBoxRowBytes, upper, lower,
                                   is_rest ? rest2<T>(upper, f[0], f[1]) : pack2<T>(f[4], f[5]),
                                   is_rest ? rest2<T>(lower, f[2], f[3]) : pack2<T>(f[6], f[7]));
    }
}

// Writes the rows that exist; `chunk(box, row, index)` gives 16 bytes of the output. kStreams: it is the first to leave L2.
template <bool kStreams = false, class Params, class Chunk>
MLA_DEVICE void store_output_rows(const Params& params, const BlockWork& work, u32 thread, Chunk chunk) {
    const u32 index = thread % kChunksPerBoxRow;
#pragma unroll
    for (u32 pass = 0; pass < kRowPasses; ++pass) {
        const i32 row = thread / kChunksPerBoxRow + pass * kRowsPerPass;
        if (!row_exists(work, row)) continue;
        u16* destination = output_row(params, work, row) + index * kChunkColumns;
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) {
            const uint4 values = chunk(box, row, index);
            if constexpr (kStreams)
                store_streaming_16b(destination + box * kBoxColumns, values);
            else
                *reinterpret_cast<uint4*>(destination + box * kBoxColumns) = values;
        }
    }
}

template <class Params>
MLA_DEVICE void store_staged_output(const Params& params, const BlockWork& work, u32 staged, u32 thread) {
    store_output_rows(params, work, thread, [staged](u32 box, u32 row, u32 index) {
        return load_shared_16b(staged + box * kRowBoxBytes + box_chunk_offset(row, index));
    });
}

template <class Params>
MLA_DEVICE void store_lse(const Params& params, const BlockWork& work, i32 row, float lse, u32 mark = kUsualMark) {
    if (row_exists(work, row)) *lse_row(params, work, row) = mark_lse(work, lse, mark);
}

// Straight from the fragments into a float32 partial result: eight lanes write 32 bytes of a row.
template <class Params>
MLA_DEVICE void store_float_partial(const Params& params, const BlockWork& work, u32 warp, u32 lane,
                                    const float (&output)[kLatentBoxes][kFragment]) {
    f32* const column = partial_row<f32>(params, work, 0) + warp * kWarpTokens + lane / 4;
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
        const i32 row = row_of_lane(lane, i);
        if (!row_exists(work, row)) continue;
        f32* const destination = column + row * static_cast<i32>(kLatent);
#pragma unroll
        for (u32 box = 0; box < kLatentBoxes; ++box) {
            destination[box * kBoxColumns] = output[box][row_element(i)];
            destination[box * kBoxColumns + 8] = output[box][row_element(i) + 2];
        }
    }
}

// No key is visible to any row: out = 0, lse = -inf or what the user asked for. Only a whole job is without tiles.
template <class Params>
MLA_DEVICE void store_empty(const Params& params, const BlockWork& work, u32 thread) {
    store_output_rows(params, work, thread, [](u32, u32, u32) { return uint4{0, 0, 0, 0}; });
    if (thread < kRows) store_lse(params, work, thread, empty_lse(params, work));
}

}  // namespace mla
