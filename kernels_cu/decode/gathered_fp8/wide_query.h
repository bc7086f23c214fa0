// Q of 64 rows for gathered FP8 tokens, in shared memory: a power of two is taken out of each row, so that fp16 holds it; boxes
// that meet fp16 values are fp16, the others bf16.
#pragma once
#include "core/row_power.h"
#include "ptx/convert_fp8.h"
#include "decode/gathered/work.h"
#include "decode/gathered_fp8/wide_smem.h"
#include "ptx/convert.h"

namespace mla {

// Boxes of a row of Q lie one behind the other; by request the rope columns may be an array of their own.
MLA_DEVICE const u16* box_of(const QueryRow& row, u32 box) {
    if (kByRequest && box >= kLatentBoxes) return row.rope + (box - kLatentBoxes) * kBoxColumns;
    return row.latent + box * kBoxColumns;
}
MLA_DEVICE uint4 load_box(const QueryRow& row, u32 box) {
    if (kByRequest && box >= kLatentBoxes) return row.load_rope((box - kLatentBoxes) * kBoxColumns);
    return row.load_latent(box * kBoxColumns);
}

// By a warpgroup, 16 rows at a time: eight threads share a row, each has 16 bytes of every box.
class QueryLoad {
public:
    static constexpr u32 kChunkColumns = 8, kChunks = kBoxColumns / kChunkColumns;
    static constexpr u32 kLoadedRows = kWarpgroupThreads / kChunks;

    // Asks for those from first_row on.
    MLA_DEVICE void read(const GatherParams& params, const BlockWork& work, u32 first_row) {
        const QueryRow row = query_row(params, work, first_row + own_row(), chunk() * kChunkColumns);
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            const uint4 loaded = load_box(row, box);
            words_[box][0] = loaded.x;
            words_[box][1] = loaded.y;
            words_[box][2] = loaded.z;
            words_[box][3] = loaded.w;
        }
    }

    // Writes them, and what turns their scores to log2 units.
    MLA_DEVICE void write(u32 smem, u32 first_row, f32 scale_log2) {
        const u32 row = first_row + own_row();
        const f32 power = power_for_row(largest()) / kFp16Headroom;
        const f32 inverse = 1.0f / power;
        if (chunk() == 0) store_shared_f32(smem + Smem::row_scales + row * sizeof(f32), power * scale_log2);
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            u32 words[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                pin_register(words_[box][i]);  // or all of a row's values are kept from the search for the largest
                f32 first, second;
                unpack2<Bf16>(words_[box][i], first, second);
                words[i] = box < kFp16Boxes ? pack2<Fp16>(first * inverse, second * inverse)
                                             : pack2<Bf16>(first * inverse, second * inverse);
            }
            store_shared_16b(smem + Smem::query + box * kBoxBytes + box_chunk_offset(row, chunk()),
                             uint4{words[0], words[1], words[2], words[3]});
        }
    }

private:
    static MLA_DEVICE u32 chunk() { return threadIdx.x % kChunks; }
    static MLA_DEVICE u32 own_row() { return threadIdx.x % kWarpgroupThreads / kChunks; }

    MLA_DEVICE f32 largest() const {
        u32 most = 0;  // magnitudes as numbers of 16 bits, in which order a bf16 has them, too
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) most = max_u16_pairs(most, words_[box][i] & 0x7FFF7FFFu);
        }
#pragma unroll
        for (u32 distance = 1; distance < kChunks; distance *= 2)
            most = max_u16_pairs(most, __shfl_xor_sync(kFullWarp, most, distance));
        f32 first, second;
        unpack2<Bf16>(most, first, second);
        return __float_as_uint(first) > __float_as_uint(second) ? first : second;  // as numbers again, or NaN would not count
    }

    u32 words_[kTileBoxes][4];
};

// The values warpgroups, which have stored the item before meanwhile, load the last rows of an item; the scores warpgroup the others.
constexpr u32 kScoresQueryRows = kRows - kValueWarpgroups * QueryLoad::kLoadedRows;

}  // namespace mla
