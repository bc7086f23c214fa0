// Q of a block to shared memory, as the fp8 kernel's Q K^T wants it: 16-bit values in, with a power of two for each row.
#pragma once
#include "core/row_power.h"
#include "decode/fp8/params.h"
#include "decode/fp8/shard.h"
#include "decode/fp8/smem.h"
#include "decode/narrow/store.h"
#include "ptx/convert_fp8.h"
#include "ptx/copy_async.h"
#include "ptx/launch.h"
#include "ptx/load.h"

namespace mla {

constexpr f32 kLowPart = 16.0f;       // x = high + low / 16

// fp8 tensor cores add with 13 fraction bits below the largest product of a step. In a row with a value that is so many
// times the row's root mean square, those bits do not reach the others, and K may have outliers in the same columns: scores
// were off by 0.1. Blocks with such a row are computed exactly. Of 576 normal values the largest is 3 to 5 times that.
constexpr f32 kOutlier = 8.0f;

// Threads that share a row: each has a chunk of eight values of every 64 columns (up to 32 rows, of every other 64).
constexpr u32 kBoxThreads = kWide ? 1 : 2;
constexpr u32 kQueryRowThreads = kBoxThreads * kChunksPerBoxRow;
constexpr u32 kThreadBoxes = (kTileBoxes + kBoxThreads - 1) / kBoxThreads;
// A warpgroup makes so many rows in a pass. Of a CTA's first item with tiles values warps, which have nothing to do yet, make half.
constexpr u32 kQueryPassRows = kWarpgroupThreads / kQueryRowThreads, kQueryPasses = kRows / kQueryPassRows;
constexpr u32 kHelpers = kWide ? 2 : 1;  // values warpgroups
constexpr u32 kScoresPasses = kQueryPasses / 2, kHelperPasses = (kQueryPasses - kScoresPasses) / kHelpers;
constexpr u32 kQueryThreads = (kScoresWarpgroups + kHelpers) * kWarpgroupThreads;
static_assert(kScoresPasses + kHelpers * kHelperPasses == kQueryPasses, "each row is made once");
static_assert(kLatentBoxes % kBoxThreads == 0, "all threads have as many latent boxes");

// Whether addresses are found before the wait for the kernels ahead. It takes 0.1 us off short calls of 16 rows; with more rows
// it gains nothing, and long ones lose 0.4%.
constexpr bool kAims = kRows == 16;

class Fp8Query {
public:
    // The scores warpgroup's rows of an item: all, or of a CTA's first item half. Afterwards Q is complete, for wgmma too. Returns
    // whether to multiply it split. The wide kernel's is written so in any case, as both of its products read it so.
    static MLA_DEVICE bool make(const Fp8Params& params, const BlockWork& work, u32 smem, u32 thread, bool is_first) {
        return make_share(params, work, smem, thread, 0, is_first ? kScoresPasses : kQueryPasses, is_first);
    }

    // The other rows of a first item, by `thread` of the values warpgroup number `helper`.
    static MLA_DEVICE void help(const Fp8Params& params, const BlockWork& work, u32 smem, u32 helper, u32 thread) {
        if (helper >= kHelpers) return;
        const u32 pass = kScoresPasses + helper * kHelperPasses;
        make_share(params, work, smem, thread, pass, pass + kHelperPasses, true);
    }

    // By a scores warpgroup that makes none.
    static MLA_DEVICE void await(bool is_first) {
        pdl_wait();
        barrier(is_first);
    }

private:
    MLA_DEVICE Fp8Query(const Fp8Params& params, const BlockWork& work, u32 smem, u32 thread, u32 pass)
        : params_(params),
          smem_(smem),
          row_(thread / kQueryRowThreads),
          first_box_(thread / kChunksPerBoxRow % kBoxThreads),
          chunk_(thread % kChunksPerBoxRow),
          first_source_(source_of(work, pass)) {
        if (kAims) {
            aim(first_source_);
        } else {
            pin_register(first_source_.latent);
            pin_register(first_source_.rope);
        }
        pdl_wait();
    }

    // Nothing but an access keeps ptxas from finding addresses behind the wait, a division and some 100 instructions later.
    MLA_DEVICE void aim(const QueryRow& source) const {
        if (!source.exists) return;
        prefetch_to_l2(source.latent);
        if (kRope > 0) prefetch_to_l2(source.rope);
    }

    // How rows are written: as two e4m3 parts, as fp16 with a power of two each, as fp16 without.
    enum Form { kSplit, kScaled, kPlain };
    static constexpr Form kFirstForm = kSplitQuery ? kSplit : kWritesPlain ? kPlain : kScaled;

    struct Magnitude {
        f32 largest, squares;  // of a row
        // Whether fp16 has it not as it is: bf16 values below 2^-17 of a row that is no smaller than this lose bits that nothing shows.
        MLA_DEVICE bool needs_power() const {
            constexpr f32 kLargest = 32768.0f, kSmallest = 1.0f / 64.0f;
            return !(largest <= kLargest && (largest >= kSmallest || largest == 0.0f));
        }
        MLA_DEVICE bool has_outlier() const {
            constexpr f32 kColumns = kLatent + kRope;
            return largest * largest * kColumns > kOutlier * kOutlier * squares;
        }
    };

    // Writes rows as operand B, and to `row_scales` what turns a row's scores to log2 units; rows that do not exist are zero.
    // Few have outliers, so rows are written split before it is known whether they may be.
    static MLA_DEVICE bool make_share(const Fp8Params& params, const BlockWork& work, u32 smem, u32 thread, u32 pass,
                                      u32 pass_end, bool is_first) {
        const bool outlier = Fp8Query(params, work, smem, thread, pass).make_passes<kFirstForm>(work, pass, pass_end);
        fence_async_proxy();
        if constexpr (!kVotes) {
            barrier(is_first);
            return false;
        }
        const bool split = !any_outlier(smem, outlier, is_first);
        if constexpr (!kWide) {
            if (!split) {
                Fp8Query(params, work, smem, thread, pass).make_passes<kScaled>(work, pass, pass_end);
                fence_async_proxy();
                barrier(is_first);
            }
        }
        return split;
    }

    // Of all threads that make an item's rows, or multiply them.
    static MLA_DEVICE void barrier(bool is_first) {
        named_barrier_sync(is_first ? kQueryBarrier : kTakesTurns ? kItemBarrier : kScoresBarrier,
                           is_first ? kQueryThreads : kScoresWarpgroups * kWarpgroupThreads);
    }

    // Of a first item through shared memory: two roles would reach a barrier that also says it at two places of the code, which
    // synccheck takes for threads of one warp gone apart.
    static MLA_DEVICE bool any_outlier(u32 smem, bool outlier, bool is_first) {
        if (!is_first) return named_barrier_or(kScoresBarrier, kWarpgroupThreads, outlier);
        if (outlier) or_shared_u32(smem + Fp8Smem::outlier, 1);
        named_barrier_sync(kQueryBarrier, kQueryThreads);
        return load_shared_u32(smem + Fp8Smem::outlier) != 0;
    }

    // Returns whether one of this thread's rows has an outlier. The next pass, if there is one, is read ahead of the arithmetic of
    // this one; at 64 rows no registers are left for that.
    template <Form kForm>
    MLA_DEVICE bool make_passes(const BlockWork& work, u32 pass, u32 pass_end) {
        bool outlier = false;
        uint4 chunks[kThreadBoxes], next[kThreadBoxes];
        QueryRow source = first_source_;
        if (!kWide) read(source, chunks);
        rope_ratio_ = kRope == 0 || kRopeApart ? 1.0f : params_.rope_ratio();
#pragma unroll 1
        for (; pass < pass_end; ++pass) {
            if constexpr (kWide) {
                read(source, chunks);
                source = source_of(work, min_i32(pass + 1, pass_end - 1));
            } else if (pass + 1 < pass_end) {
                read(source_of(work, pass + 1), next);
            }
            if constexpr (kForm == kPlain) {
                write<kPlain>(pass, 0.0f, chunks);
                outlier |= measure(chunks).needs_power();
            } else {
                const Magnitude magnitude = measure(chunks);
                outlier |= magnitude.has_outlier();
                write<kForm>(pass, magnitude.largest, chunks);
            }
#pragma unroll
            for (u32 index = 0; index < kThreadBoxes && !kWide; ++index) chunks[index] = next[index];
        }
        return outlier;
    }

    // This thread's boxes of 64 columns are first_box_ and every kBoxThreads-th from there. The rope box is the last one of all,
    // and that of threads with first_box_ = 0.
    static constexpr bool is_rope(u32 index) { return index >= kLatentBoxes / kBoxThreads; }
    MLA_DEVICE u32 box(u32 index) const { return index * kBoxThreads + first_box_; }

    MLA_DEVICE QueryRow source_of(const BlockWork& work, u32 pass) const {
        QueryRow source = query_row(params_, work, row_ + pass * kQueryPassRows, chunk_ * kChunkColumns);
        if (kAims) {
            source.latent += first_box_ * kBoxColumns;
            pin_register(source.latent);  // whole: each load is at a constant distance
            pin_register(source.rope);
        }
        return source;
    }

    // No read-only loads where they aim: ptxas moves these ahead of a wait.
    MLA_DEVICE void read(const QueryRow& source, uint4 (&chunks)[kThreadBoxes]) const {
#pragma unroll
        for (u32 index = 0; index < kThreadBoxes; ++index) {
            if (kAims)
                chunks[index] = is_rope(index) ? load_global_16b(source.rope, source.exists && first_box_ == 0)
                                               : load_global_16b(source.latent + index * kBoxThreads * kBoxColumns, source.exists);
            else if (!is_rope(index))
                chunks[index] = source.load_latent(box(index) * kBoxColumns);
            else
                chunks[index] = first_box_ == 0 ? source.load_rope(0) : uint4{0, 0, 0, 0};
        }
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

    MLA_DEVICE Magnitude measure(const uint4 (&chunks)[kThreadBoxes]) const {
        constexpr u32 kChains = 4;  // side by side, or each value would wait for the one before
        f32 largest[kChains] = {}, squares[kChains] = {};
#pragma unroll
        for (u32 index = 0; index < kThreadBoxes; ++index) {
            f32 values[kChunkColumns];
            unpack(chunks[index], is_rope(index) ? rope_ratio_ : 1.0f, values);
#pragma unroll
            for (u32 i = 0; i < kChunkColumns; ++i) {
                largest[i % kChains] = fmaxf(largest[i % kChains], fabsf(values[i]));
                squares[i % kChains] = fmaf(values[i], values[i], squares[i % kChains]);
            }
        }
        Magnitude row{fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])),
                      (squares[0] + squares[1]) + (squares[2] + squares[3])};
#pragma unroll
        for (u32 distance = 1; distance < kQueryRowThreads; distance *= 2) {
            row.largest = fmaxf(row.largest, __shfl_xor_sync(kFullWarp, row.largest, distance));
            row.squares += __shfl_xor_sync(kFullWarp, row.squares, distance);
        }
        return row;
    }

    // `largest`: the row's largest value.
    template <Form kForm>
    MLA_DEVICE void write(u32 pass, f32 largest, const uint4 (&chunks)[kThreadBoxes]) const {
        const u32 row = row_ + pass * kQueryPassRows;
        const f32 power = kForm == kPlain ? 1.0f : power_for_row(largest);
        const f32 inverse = kForm == kPlain ? 1.0f : inverse_power(power);  // a row without a power has a scale of NaN
        if (first_box_ == 0 && chunk_ == 0)
            store_shared_f32(smem_ + Fp8Smem::row_scales + row * sizeof(f32),
                             power / (kForm == kScaled ? kFp16Headroom : 1.0f) * params_.latent_scale() * params_.scale_log2);
#pragma unroll
        for (u32 index = 0; index < kThreadBoxes; ++index) {
            if (is_rope(index) && first_box_ != 0) continue;
            f32 values[kChunkColumns];
            unpack(chunks[index], is_rope(index) ? rope_ratio_ * inverse : inverse, values);
            if constexpr (kForm == kSplit)
                write_split(smem_ + Fp8Smem::query, row, box(index), chunk_, values);
            else
                write_exact<kForm>(smem_ + Fp8Smem::query, row, box(index), chunk_, values);
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
    template <Form kForm>
    static MLA_DEVICE void write_exact(u32 query, u32 row, u32 box, u32 chunk, const f32 (&values)[kChunkColumns]) {
        const bool is_latent = box < kLatentBoxes;
        const u32 sixteenth = is_latent ? box % 2 * 4 + chunk / 2 : chunk / 2;
        const u32 t = is_latent ? sixteenth / 2 : sixteenth;
        const u32 target = is_latent ? box / 2 * 2 + sixteenth % 2 : box;
        constexpr f32 kHeadroom = kForm == kPlain ? 1.0f : kFp16Headroom;
#pragma unroll
        for (u32 i = 0; i < kChunkColumns; i += 4) {
            f32 x[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
            if (kQueryParts == 1) round_e4m3(values + i, x);
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 step = chunk % 2 * 2 + i / 4;
                store_shared_u32(query + target * kRowBoxBytes + box_chunk_offset(row, step * 2 + half) + t * sizeof(u32),
                                 pack2<Fp16>(x[half * 2] * kHeadroom, x[half * 2 + 1] * kHeadroom));
            }
        }
    }

    const Fp8Params& params_;
    u32 smem_, row_, first_box_, chunk_;  // row_: of pass 0
    QueryRow first_source_;
    f32 rope_ratio_;  // of the scales of the two parts
};

}  // namespace mla
