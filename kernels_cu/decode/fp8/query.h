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

// Wide: of the first item's passes, those of the scores warpgroup and of each values warpgroup.
constexpr u32 kScoresPasses = kRowPasses / 2, kHelperPasses = (kRowPasses - kScoresPasses) / kValueWarpgroups;
static_assert(!kWide || kScoresPasses + kValueWarpgroups * kHelperPasses == kRowPasses, "each row is loaded once");

class Fp8Query {
public:
    // Writes the block's rows as operand B, and to `row_scales` what turns a row's scores to log2 units; rows that do not
    // exist are zero.
    // Returns whether they were written split. Contains a barrier of the warpgroup; fence_async_proxy() and another one must
    // follow.
    static MLA_DEVICE bool load(const Fp8Params& params, const BlockWork& work, u32 smem, u32 thread) {
        const Fp8Query query(params, smem, thread);
        uint4 chunks[kTileBoxes];  // of one pass; earlier ones are read again: registers are few
        f32 largest[kRowPasses];
        bool outlier = false;
#pragma unroll
        for (u32 pass = kRowPasses; pass-- > 0;) {
            query.read(work, pass, chunks);
            const Magnitude magnitude = query.measure(chunks);
            largest[pass] = magnitude.largest;
            outlier |= magnitude.has_outlier();
        }
        const bool split = kSplitQuery && !named_barrier_or(kScoresBarrier, kWarpgroupThreads, outlier);
#pragma unroll
        for (u32 pass = 0; pass < kRowPasses; ++pass) {
            if (pass > 0) query.read(work, pass, chunks);
            query.write(pass, split, largest[pass], chunks);
        }
        return split;
    }

    // Of the wide kernel, whose queries are always split, as both of its products read them: writes the rows of some passes.
    // Returns whether one of this thread's rows has an outlier. fence_async_proxy() and a barrier must follow.
    static MLA_DEVICE bool load_split(const Fp8Params& params, const BlockWork& work, u32 smem, u32 thread, u32 pass, u32 pass_end) {
        const Fp8Query query(params, smem, thread);
        bool outlier = false;
#pragma unroll 1
        for (; pass < pass_end; ++pass) {
            uint4 chunks[kTileBoxes];
            query.read(work, pass, chunks);
            const Magnitude magnitude = query.measure(chunks);
            outlier |= magnitude.has_outlier();
            query.write(pass, true, magnitude.largest, chunks);
        }
        return outlier;
    }

private:
    MLA_DEVICE Fp8Query(const Fp8Params& params, u32 smem, u32 thread)
        : params_(params),
          smem_(smem),
          row_(thread / kChunksPerBoxRow),
          chunk_(thread % kChunksPerBoxRow),
          rope_ratio_(kRope == 0 || kRopeApart ? 1.0f : params.rope_ratio()) {}

    struct Magnitude {
        f32 largest, squares;  // of a row
        MLA_DEVICE bool has_outlier() const {
            constexpr f32 kColumns = kLatent + kRope;
            return largest * largest * kColumns > kOutlier * kOutlier * squares;
        }
    };

    // Eight threads share a row: thread c has chunk c, eight values, of each 64 columns.
    MLA_DEVICE void read(const BlockWork& work, u32 pass, uint4 (&chunks)[kTileBoxes]) const {
        const QueryRow source = query_row(params_, work, row_ + pass * kRowsPerPass, chunk_ * kChunkColumns);
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

    MLA_DEVICE Magnitude measure(const uint4 (&chunks)[kTileBoxes]) const {
        Magnitude row{0.0f, 0.0f};
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            f32 values[kChunkColumns];
            unpack(chunks[box], box < kLatentBoxes ? 1.0f : rope_ratio_, values);
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

    // `largest`: the row's largest value.
    MLA_DEVICE void write(u32 pass, bool split, f32 largest, const uint4 (&chunks)[kTileBoxes]) const {
        const u32 row = row_ + pass * kRowsPerPass;
        const f32 power = power_for_row(largest);
        if (chunk_ == 0)
            store_shared_f32(smem_ + Fp8Smem::row_scales + row * sizeof(f32),
                             power / (split ? 1.0f : kFp16Headroom) * params_.latent_scale() * params_.scale_log2);
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            f32 values[kChunkColumns];
            unpack(chunks[box], (box < kLatentBoxes ? 1.0f : rope_ratio_) / power, values);
            if (split)
                write_split(smem_ + Fp8Smem::query, row, box, chunk_, values);
            else
                write_exact(smem_ + Fp8Smem::query, row, box, chunk_, values);
        }
    }

    // Four values as e4m3, and what these are.
    static MLA_DEVICE u32 round_e4m3(const f32* values, f32 (&rounded)[4]) {
        const u32 word = pack_e4m3(values[0], values[1], values[2], values[3]);
        unpack2<Fp16>(e4m3_pair_low(word), rounded[0], rounded[1]);
        unpack2<Fp16>(e4m3_pair_high(word), rounded[2], rounded[3]);
        return word;
    }

    // Eight columns of a row, in each of its parts. fp16 has all bits of a bf16 value and of what e4m3 leaves out of it.
    static MLA_DEVICE void write_split(u32 query, u32 row, u32 box, u32 chunk, const f32 (&values)[kChunkColumns]) {
        constexpr u32 kMinusOne = 0xBC00BC00, kInverseLow = 0x4C004C00;  // twice each
        static_assert(kLowPart == 16.0f, "kInverseLow is fp16's");
        u32 words[2][2];  // part, four values
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const f32* const x = values + i * 4;
            const u32 first = pack2<Fp16>(x[0], x[1]), second = pack2<Fp16>(x[2], x[3]);
            words[0][i] = pack_e4m3(first, second);
            if constexpr (kQueryParts == 2) {
                const u32 first_rest = fma_fp16_pairs(e4m3_pair_low(words[0][i]), kMinusOne, first);
                const u32 second_rest = fma_fp16_pairs(e4m3_pair_high(words[0][i]), kMinusOne, second);
                words[1][i] = pack_e4m3(multiply_fp16_pairs(first_rest, kInverseLow), multiply_fp16_pairs(second_rest, kInverseLow));
            }
        }
        const u32 in_chunk = chunk % 2 * kChunkColumns;
#pragma unroll
        for (u32 part = 0; part < kQueryParts; ++part) {
            const u32 address = query + split_chunk_offset(part * kRows + row, box, chunk / 2) + in_chunk;
            store_shared_8b(address, uint2{words[part][0], words[part][1]});
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
        for (u32 i = 0; i < kChunkColumns; i += 4) {
            f32 x[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
            if (kQueryParts == 1) round_e4m3(values + i, x);
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 step = chunk % 2 * 2 + i / 4;
                store_shared_u32(query + target * kRowBoxBytes + box_chunk_offset(row, step * 2 + half) + t * sizeof(u32),
                                 pack2<Fp16>(x[half * 2] * kFp16Headroom, x[half * 2 + 1] * kFp16Headroom));
            }
        }
    }

    const Fp8Params& params_;
    u32 smem_, row_, chunk_;  // of the first pass
    f32 rope_ratio_;          // of the scales of the two parts
};

}  // namespace mla
