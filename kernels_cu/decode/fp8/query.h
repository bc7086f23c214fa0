// Q of a block to shared memory, as the fp8 kernel's Q K^T wants it: 16-bit values in, with a power of two for each row.
#pragma once
#include "core/row_power.h"
#include "decode/fp8/params.h"
#include "decode/fp8/smem.h"
#include "decode/narrow/store.h"
#include "ptx/convert_fp8.h"

namespace mla {

constexpr f32 kLowPart = 16.0f;       // x = high + low / 16

// fp8 tensor cores add with 13 fraction bits below the largest product of a step. In a row with a value that is so many
// times the row's root mean square, those bits do not reach the others, and K may have outliers in the same columns: scores
// were off by 0.1. Blocks with such a row are computed exactly. Of 576 normal values the largest is 3 to 5 times that.
constexpr f32 kOutlier = 8.0f;

class Fp8Query {
public:
    // Writes the block's rows as operand B, and to `row_scales` what turns a row's scores to log2 units; rows that do not
    // exist are zero.
    // Returns whether they were written split. Contains a barrier of the warpgroup; fence_async_proxy() and another one must
    // follow.
    static MLA_DEVICE bool load(const Fp8Params& params, const BlockWork& work, u32 smem, u32 thread) {
        const f32 latent_scale = params.latent_scale();
        const f32 rope_ratio = kRope == 0 ? 1.0f : params.rope_scale() / latent_scale;
        const u32 row = thread / kChunksPerBoxRow, chunk = thread % kChunksPerBoxRow;
        uint4 chunks[kTileBoxes];  // of one pass; earlier ones are read again: registers are few
        f32 largest[kRowPasses];
        bool outlier = false;
#pragma unroll
        for (u32 pass = kRowPasses; pass-- > 0;) {
            read(params, work, row + pass * kRowsPerPass, chunk, chunks);
            const Magnitude magnitude = measure(rope_ratio, chunks);
            largest[pass] = magnitude.largest;
            outlier |= magnitude.has_outlier();
        }
        const bool split = kSplitQuery && !named_barrier_or(kScoresBarrier, kWarpgroupThreads, outlier);
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
            if (pass > 0) read(params, work, row + pass * kRowsPerPass, chunk, chunks);
            const u32 block_row = row + pass * kRowsPerPass;
            const f32 power = power_for_row(largest[pass]) / (split ? 1.0f : kFp16Headroom);
            if (chunk == 0)
                store_shared_f32(smem + Fp8Smem::row_scales + block_row * sizeof(f32), power * latent_scale * params.scale_log2);
            write(smem + Fp8Smem::query, block_row, chunk, rope_ratio, split, power, chunks);
        }
        return split;
    }

private:
    struct Magnitude {
        f32 largest, squares;  // of a row
        MLA_DEVICE bool has_outlier() const {
            constexpr f32 kColumns = kLatent + kRope;
            return largest * largest * kColumns > kOutlier * kOutlier * squares;
        }
    };

    // Eight threads share a row: thread c has chunk c, eight values, of each 64 columns.
    static MLA_DEVICE void read(const Fp8Params& params, const BlockWork& work, u32 row, u32 chunk, uint4 (&chunks)[kTileBoxes]) {
        const QueryRow source = query_row(params, work, row, chunk * kChunkColumns);
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box)
            chunks[box] = box < kLatentBoxes ? source.load_latent(box * kBoxColumns) : source.load_rope(0);
    }

    static MLA_DEVICE void unpack(uint4 chunk, f32 factor, f32 (&values)[kChunkColumns]) {
        const u32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            unpack2<Output>(words[i], values[2 * i], values[2 * i + 1]);
            values[2 * i] *= factor;
            values[2 * i + 1] *= factor;
        }
    }

    static MLA_DEVICE Magnitude measure(f32 rope_ratio, const uint4 (&chunks)[kTileBoxes]) {
        Magnitude row{0.0f, 0.0f};
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            f32 values[kChunkColumns];
            unpack(chunks[box], box < kLatentBoxes ? 1.0f : rope_ratio, values);
#pragma unroll
            for (u32 i = 0; i < kChunkColumns; ++i) {
                row.largest = fmaxf(row.largest, fabsf(values[i]));
                row.squares = fmaf(values[i], values[i], row.squares);
            }
        }
#pragma unroll
        for (u32 distance = 1; distance < kChunksPerBoxRow; distance *= 2) {
            row.largest = fmaxf(row.largest, __shfl_xor_sync(kFullWarp, row.largest, distance));
            row.squares += __shfl_xor_sync(kFullWarp, row.squares, distance);
        }
        return row;
    }

    static MLA_DEVICE void write(u32 query, u32 row, u32 chunk, f32 rope_ratio, bool split, f32 power,
                                 const uint4 (&chunks)[kTileBoxes]) {
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            f32 values[kChunkColumns];
            unpack(chunks[box], (box < kLatentBoxes ? 1.0f : rope_ratio) / power, values);
            if (split)
                write_split(query, row, box, chunk, values);
            else
                write_exact(query, row, box, chunk, values);
        }
    }

    // Eight columns of a row, high and low part.
    static MLA_DEVICE void write_split(u32 query, u32 row, u32 box, u32 chunk, const f32 (&values)[kChunkColumns]) {
        u32 words[2][2];  // part, four values
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            u32 high[2], low[2];
#pragma unroll
            for (u32 pair = 0; pair < 2; ++pair) {
                const f32 first = values[i * 4 + pair * 2], second = values[i * 4 + pair * 2 + 1];
                high[pair] = pack_e4m3(first, second);
                f32 rounded[2];
                unpack2<Fp16>(e4m3_pair_low(high[pair]), rounded[0], rounded[1]);
                low[pair] = pack_e4m3((first - rounded[0]) * kLowPart, (second - rounded[1]) * kLowPart);
            }
            words[0][i] = high[0] | high[1] << 16;
            words[1][i] = low[0] | low[1] << 16;
        }
        const u32 in_chunk = chunk % 2 * kChunkColumns;
#pragma unroll
        for (u32 part = 0; part < 2; ++part) {
            const u32 place = part * kRows + row;
            const u32 chunk_offset = box < kLatentBoxes
                                         ? box / 2 * kSplitBoxBytes + box_chunk_offset(place, box % 2 * 4 + chunk / 2)
                                         : kByteBoxes * kSplitBoxBytes + rope_chunk_offset(place, chunk / 2);
            store_shared_8b(query + chunk_offset + in_chunk, uint2{words[part][0], words[part][1]});
        }
    }

    // Eight columns of a row in fp16, in the order in which a thread finds K's columns: it takes 16 stored bytes of K, of
    // which word s is its share of step s. So column 16 (2 t + j) + 4 s + 2 h + e of a box of 128 is position
    // 16 s + 8 h + 2 t + e of box j of 64; of the rope columns, 16 t + 4 s + 2 h + e is position 16 s + 8 h + 2 t + e.
    static MLA_DEVICE void write_exact(u32 query, u32 row, u32 box, u32 chunk, const f32 (&values)[kChunkColumns]) {
        const bool is_latent = box < kLatentBoxes;
        const u32 sixteenth = is_latent ? box % 2 * 4 + chunk / 2 : chunk / 2;
        const u32 t = is_latent ? sixteenth / 2 : sixteenth;
        const u32 target = is_latent ? box / 2 * 2 + sixteenth % 2 : box;
#pragma unroll
        for (u32 i = 0; i < kChunkColumns; i += 2) {
            const u32 step = chunk % 2 * 2 + i / 4, half = i % 4 / 2;
            store_shared_u32(query + target * kRowBoxBytes + box_chunk_offset(row, step * 2 + half) + t * sizeof(u32),
                             pack2<Fp16>(values[i], values[i + 1]));
        }
    }
};

}  // namespace mla
