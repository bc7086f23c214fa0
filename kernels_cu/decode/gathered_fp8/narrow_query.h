// Q of a block, as S^T = K Q^T of the narrow kernels for FP8 rows wants it: a power of two is taken out of each row, so that
// fp16 holds it; boxes that meet coded values are fp16, the others bf16. Columns are in the order in which a thread finds K's,
// which takes 16 stored bytes of a token at once.
#pragma once
#include "codec/codec.h"
#include "core/row_power.h"
#include "decode/gathered/work.h"
#include "decode/narrow/store.h"
#include "ptx/convert.h"
#include "ptx/copy_async.h"

namespace mla {

// Asks for Q of an item into L2, by so many threads: a hint, as the scores warpgroup waits for it between two items.
MLA_DEVICE void prefetch_query(const GatherParams& params, const BlockWork& work, u32 thread, u32 threads) {
#pragma unroll 1
    for (u32 line = thread; line < kRows * kTileBoxes; line += threads) {
        const QueryRow row = query_row(params, work, line / kTileBoxes, 0);
        const u32 box = line % kTileBoxes;
        if (row.exists)
            prefetch_to_l2(box < kLatentBoxes ? row.latent + box * kBoxColumns : row.rope + (box - kLatentBoxes) * kBoxColumns);
    }
}

// Eight threads share a row. Each has chunk `chunk` of all its boxes: the columns of half a k16 step (positions 8 * (chunk % 2)
// of step chunk / 2), as pairs. Columns says which pair the i-th of a chunk is, that of the i-th lane of four,
// counted from its box's first.
template <class Columns>
class QueryLoad {
public:
    MLA_DEVICE void read(const GatherParams& params, const BlockWork& work, u32 thread) {
        const u32 chunk = thread % kChunksPerBoxRow;
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
            const QueryRow row = query_row(params, work, thread / kChunksPerBoxRow + pass * kRowsPerPass, 0);
#pragma unroll
            for (u32 box = 0; box < kTileBoxes; ++box) {
                const u32* const words = reinterpret_cast<const u32*>(
                    box < kLatentBoxes ? row.latent + box * kBoxColumns : row.rope + (box - kLatentBoxes) * kBoxColumns);
#pragma unroll
                for (u32 i = 0; i < 4; ++i) pairs_[pass][box][i] = row.exists ? __ldg(pair(words, box, chunk, i)) : 0;
            }
        }
    }

    // Writes the rows, and what turns their scores to log2 units.
    template <class Smem>
    MLA_DEVICE void write(u32 smem, u32 thread, f32 scale_log2) const {
        const u32 chunk = thread % kChunksPerBoxRow;
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
            const u32 row = thread / kChunksPerBoxRow + pass * kRowsPerPass;
            const f32 power = power_for_row(largest(pass)) / kFp16Headroom;
            const f32 inverse = 1.0f / power;
            if (chunk == 0) store_shared_f32(smem + Smem::row_scales + row * sizeof(f32), power * scale_log2);
#pragma unroll
            for (u32 box = 0; box < kTileBoxes; ++box) {
                u32 words[4];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    f32 first, second;
                    unpack2<Bf16>(pairs_[pass][box][i], first, second);
                    words[i] = box < kCodedBoxes ? pack2<Fp16>(first * inverse, second * inverse)
                                                 : pack2<Bf16>(first * inverse, second * inverse);
                }
                store_shared_16b(smem + Smem::query + box * kRowBoxBytes + box_chunk_offset(row, chunk),
                                 uint4{words[0], words[1], words[2], words[3]});
            }
        }
    }

private:
    static MLA_DEVICE const u32* pair(const u32* words, u32 box, u32 chunk, u32 i) {
        return box < kCodedBoxes ? words + Columns::coded(box, chunk, i) : words + Columns::uncoded(chunk, i);
    }

    MLA_DEVICE f32 largest(u32 pass) const {
        f32 most = 0.0f;
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                f32 first, second;
                unpack2<Bf16>(pairs_[pass][box][i], first, second);
                most = fmaxf(most, fmaxf(fabsf(first), fabsf(second)));
            }
        }
#pragma unroll
        for (u32 distance = 1; distance < kChunksPerBoxRow; distance *= 2)
            most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, distance));
        return most;
    }

    u32 pairs_[kRowPasses][kTileBoxes][4];
};

}  // namespace mla
