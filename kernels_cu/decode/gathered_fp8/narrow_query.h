// Q of a block, as S^T = K Q^T of the narrow kernel for FP8 caches wants it: a power of two is taken out of each row, so that
// fp16 holds it; boxes that meet coded values are fp16, the others bf16. Columns are in the order in which a thread finds K's,
// which takes 16 stored bytes of a token at once.
#pragma once
#include "core/row_power.h"
#include "decode/gathered/work.h"
#include "decode/gathered_fp8/narrow_smem.h"
#include "decode/narrow/store.h"
#include "ptx/convert.h"

namespace mla {

// Eight threads share a row. Each has chunk `chunk` of all its boxes: the columns of half a k16 step (positions 8 * (chunk % 2)
// of step chunk / 2), as pairs.
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
                for (u32 i = 0; i < 4; ++i) pairs_[pass][box][i] = row.exists ? __ldg(words + pair_of(box, chunk, i)) : 0;
            }
        }
    }

    // Writes the rows, and what turns their scores to log2 units.
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
    // Which pair of a box's 32 is the i-th of a chunk: those of the i-th lane of four. Coded: 16 bytes of a lane are 16
    // columns, a word of them the lane's share of a step. Not coded: a lane has 16 bytes of each half of the box, two words of
    // them for a step.
    static MLA_DEVICE u32 pair_of(u32 box, u32 chunk, u32 i) {
        return box < kCodedBoxes ? i * 8 + chunk : chunk / 4 * 16 + i * 4 + chunk % 4;
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
