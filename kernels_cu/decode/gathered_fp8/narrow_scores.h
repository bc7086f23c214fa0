// The scores warpgroup of the narrow kernel for FP8 caches: turns a tile's stored rows into K, which is wgmma's A operand in
// registers, multiplies, and leaves the same registers in shared memory as V; then softmax and P.
#pragma once
#include "core/quad.h"
#include "decode/gathered_fp8/narrow_query.h"
#include "decode/gathered_fp8/narrow_smem.h"
#include "decode/gathered_fp8/token_unit.h"
#include "ptx/convert_fp8.h"
#include "ptx/wgmma.h"

namespace mla {

class ScoresRole {
public:
    MLA_DEVICE ScoresRole(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), thread_(thread), lane_(thread % kWarpThreads), softmax_(params, smem, thread),
          ring_{thread / kWarpThreads} {
        // Tokens lane / 4 and lane / 4 + 8 of this warp's 16, of each 64 columns those from 16 * (lane % 4) on.
        const u32 token = ring_.index * kSlabTokens + lane_ / 4;
        values_ = smem + Smem::values + box_chunk_offset(token, lane_ % 4 * 2);
    }

    // Items that have tiles. Q of the next is read once QK of an item's last tile is done.
    MLA_DEVICE void run(const Items& items) {
        i32 item = items.first();
        BlockWork work = next_work(params_, items, item);
        if (work.has_tiles()) {
            Query query;
            query.read(params_, work, thread_);
            query.write<Smem>(smem_, thread_, params_.scale_log2 * cache_scale(params_));
        }
        while (work.has_tiles()) {
            const i32 current = item - items.step();
            const BlockWork next = next_work(params_, items, item);
            run_item(work, current, next);
            work = next;
        }
    }

private:
    // A box's pairs of columns as a lane of four finds them. Coded: 16 bytes of a lane are 16 columns, a word of them the
    // lane's share of a step. Not coded: a lane has 16 bytes of each half of the box, two words of them for a step.
    struct Columns {
        static MLA_DEVICE u32 coded(u32, u32 chunk, u32 lane) { return lane * 8 + chunk; }
        static MLA_DEVICE u32 uncoded(u32 chunk, u32 lane) { return chunk / 4 * 16 + lane * 4 + chunk % 4; }
    };
    using Query = QueryLoad<Columns>;
    using Softmax = NarrowSoftmax<Smem, Codec::kHasScales>;
    static_assert(Codec::kUncoded <= kBoxColumns, "there is one box at most that is not coded");
    static constexpr u32 kLaneColumns = 16;  // of a box; four in each k16 step

    // What this thread needs of its two tokens besides their values.
    template <class C>
    struct Tokens {
        u32 rows[2];                     // addresses
        u32 scales[kLaneScales<C>];      // pairs of fp16, one of each token: the scale over the token's unit
        TokenUnits units;
        u32 valid;  // bits of the warp's tokens
    };

    MLA_DEVICE void run_item(const BlockWork& work, i32 item, const BlockWork& next) {
        fence_async_proxy();
        softmax_.barrier();  // Q and its scales are complete before any warp reads them
        float row_scale[kThreadRows];
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i)
            row_scale[i] = load_shared_f32(smem_ + Smem::row_scales + row_of_lane(lane_, i) * sizeof(f32));
        Softmax::Rows rows(work);
        for (i32 tile = work.tile_begin; tile < work.tile_end; ++tile) {
            if (kMixesCodecs && is_extra_tile(work, tile))
                run_tile<ExtraCodec>(work, tile, row_scale, rows);
            else
                run_tile<Codec>(work, tile, row_scale, rows);
        }
        // By request the work is read again, as no register is left to keep all of it in.
        if (next.has_tiles()) {
            Query query;
            query.read(params_, next, thread_);
            softmax_.finish(kByRequest ? load_block_work(params_, item) : work, rows, cache_scale(params_));
            query.write<Smem>(smem_, thread_, params_.scale_log2 * cache_scale(params_));
        } else {
            softmax_.finish(kByRequest ? load_block_work(params_, item) : work, rows, cache_scale(params_));
        }
    }

    template <class C>
    MLA_DEVICE Tokens<C> open_tile() const {
        mbarrier_wait(raw_full_barrier(smem_, ring_.index), ring_.parity);
        Tokens<C> tokens;
        tokens.valid = load_shared_u32(valid_word(smem_, ring_.index));
        f32 scales[2][kLaneScales<C>];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            tokens.rows[half] = slab_address(smem_, ring_.index) + (row_place(lane_ / 4) + half * 8) * kRowPitch;
            C::load_scales(C::kPageEndBytes > 0 ? page_end_place(smem_, ring_.index, lane_ / 4 + half * 8) : tokens.rows[half],
                           lane_ % kQuadLanes, scales[half]);
        }
        ScaleRange ranges[2];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            ranges[half] = range_of(scales[half]);
            if constexpr (kUncodedIsValue) widen_by_share(tokens, half, ranges[half]);
        }
        if constexpr (kUncodedIsValue || C::kScales > kLaneScales<C>) agree(ranges);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const f32 inverse = take_unit(ranges[half], tokens.units.of[half]);
#pragma unroll
            for (u32 i = 0; i < kLaneScales<C>; ++i) scales[half][i] *= inverse;
        }
#pragma unroll
        for (u32 i = 0; i < kLaneScales<C>; ++i) tokens.scales[i] = pack2<Fp16>(scales[0][i], scales[1][i]);
        return tokens;
    }

    // By a token's uncoded values that this lane has.
    template <class C>
    MLA_DEVICE void widen_by_share(const Tokens<C>& tokens, u32 half, ScaleRange& range) const {
        u32 words[2][4];
        load_uncoded(tokens, half, words);
        u32 largest = 0;  // magnitudes as numbers of 16 bits, in which order a bf16 has them, too
#pragma unroll
        for (u32 i = 0; i < 8; ++i) largest = max_u16_pairs(largest, words[i / 4][i % 4] & 0x7FFF7FFFu);
        f32 first, second;
        unpack2<Bf16>(largest, first, second);
        widen_by_uncoded(range, fmaxf(first, second));
    }

    template <class C>
    MLA_DEVICE void run_tile(const BlockWork& work, i32 tile, const float (&row_scale)[kThreadRows], Softmax::Rows& rows) {
        const Tokens<C> tokens = open_tile<C>();
        float scores[kFragment];
        multiply(tokens, scores);
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                float& score = scores[row_element(i) + half * 2];
                score *= row_scale[i];
                if (Codec::kHasScales) score *= tokens.units.of[half];
            }
        }
        if constexpr (kByRequest)
            softmax_.hide_unseen(work, tile, scores);
        else if (tokens.valid != kAllValid)
            softmax_.hide(tokens.valid, scores);
        softmax_.add_tile<Operand>(tile == work.tile_begin, scores, rows, tokens.units);
        values_parity_ ^= 1;
        ring_.advance();
    }

    // S^T of the tile, over the tokens' units, and its V. A box at a time: while it is multiplied, the next one is made.
    template <class C>
    MLA_DEVICE void multiply(const Tokens<C>& tokens, float (&scores)[kFragment]) const {
        const u64 query = descriptor_at(kBoxKMajor, smem_ + Smem::query);
        u32 raw[2][2][C::kLaneWords];  // of two boxes and the two tokens
        u32 keys[2][kBoxSteps][4];
        wgmma_pin(scores);
        load_codes(tokens, 0, raw[0]);
        if constexpr (Codec::kUncoded > 0) multiply_uncoded(tokens, query, keys[1], scores);
#pragma unroll
        for (u32 box = 0; box < kCodedBoxes; ++box) {
            if (box + 1 < kCodedBoxes) load_codes(tokens, box + 1, raw[(box + 1) % 2]);
            if (box >= 2) wgmma_wait<1>();
            u32(&key)[kBoxSteps][4] = keys[box % 2];
            const u32(&codes)[2][C::kLaneWords] = raw[box % 2];
#pragma unroll
            for (u32 step = 0; step < kBoxSteps; ++step) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const u32 scale = pair_of_half(tokens.scales[box / kScaleBoxes<C>], half);
                    u32 pairs[2];
                    C::pairs(codes[half], step, pairs);
                    key[step][half] = scaled(pairs[0], scale);
                    key[step][2 + half] = scaled(pairs[1], scale);
                }
            }
            if (box < kLatentBoxes) store_values(box, key);
            wgmma_fence();
#pragma unroll
            for (u32 step = 0; step < kBoxSteps; ++step)
                multiply_step<Operand>(box, step, key, query, Codec::kUncoded > 0 || box > 0, scores);
            wgmma_commit();
        }
        if constexpr (kUncodedIsValue) store_uncoded(tokens);
        mbarrier_arrive(raw_empty_barrier(smem_, ring_.index));
        wgmma_wait<0>();
        wgmma_pin(scores);
    }

    static MLA_DEVICE u32 scaled(u32 pair, u32 scale) {
        return Codec::kHasScales ? multiply_fp16_pairs(pair, scale) : pair;
    }

    template <class T>
    static MLA_DEVICE void multiply_step(u32 box, u32 step, const u32 (&key)[kBoxSteps][4], u64 query, bool accumulate,
                                         float (&scores)[kFragment]) {
        wgmma_rs<T, 0>(scores, key[step][0], key[step][1], key[step][2], key[step][3],
                       query + descriptor_offset(box * kRowBoxBytes + step * kStepBytes), accumulate || step > 0);
    }

    template <class C>
    MLA_DEVICE void load_codes(const Tokens<C>& tokens, u32 box, u32 (&codes)[2][C::kLaneWords]) const {
        constexpr u32 kLaneBytes = C::kLaneWords * sizeof(u32);
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            load_shared_words(tokens.rows[half] + (box * kQuadLanes + lane_ % kQuadLanes) * kLaneBytes, codes[half]);
    }

    // The box that is stored in bf16: a lane takes 16 bytes of each half, two words of which are its share of a step. A token's
    // unit is taken out here too.
    template <class C>
    MLA_DEVICE void multiply_uncoded(const Tokens<C>& tokens, u64 query, u32 (&key)[kBoxSteps][4],
                                     float (&scores)[kFragment]) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u32 words[2][4];
            load_uncoded(tokens, half, words);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) key[i / 2][i % 2 * 2 + half] = words[i / 4][i % 4];
        }
        if (!tokens.units.are_one()) {
#pragma unroll
            for (u32 step = 0; step < kBoxSteps; ++step) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    f32 first, second;
                    unpack2<Bf16>(key[step][i], first, second);
                    const f32 unit = tokens.units.of[i % 2];
                    key[step][i] = pack2<Bf16>(first / unit, second / unit);
                }
            }
        }
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < kBoxSteps; ++step) multiply_step<Bf16>(kCodedBoxes, step, key, query, false, scores);
        wgmma_commit();
    }

    // This lane's share of a token's uncoded values: 16 bytes of each half of the box.
    template <class C>
    MLA_DEVICE void load_uncoded(const Tokens<C>& tokens, u32 half, u32 (&words)[2][4]) const {
#pragma unroll
        for (u32 chunk = 0; chunk < 2; ++chunk)
            load_shared_words(tokens.rows[half] + Codec::kUncodedOffset + chunk * 64 + lane_ % 4 * 16, words[chunk]);
    }

    // The same as V, whose last box they are, in fp16. Behind the coded boxes: it is the last of a group that PV frees.
    template <class C>
    MLA_DEVICE void store_uncoded(const Tokens<C>& tokens) const {
        static_assert(!kUncodedIsValue || kCodedBoxes + 1 == kLatentBoxes, "they are one box");
        if (kCodedBoxes % kFreedBoxes == 0) mbarrier_wait(values_empty_barrier(smem_, kCodedBoxes / kFreedBoxes), values_parity_ ^ 1);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u32 words[2][4];
            load_uncoded(tokens, half, words);
            const f32 inverse = 1.0f / tokens.units.of[half];
#pragma unroll
            for (u32 chunk = 0; chunk < 2; ++chunk) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    f32 first, second;
                    unpack2<Bf16>(words[chunk][i], first, second);
                    words[chunk][i] = pack2<Fp16>(first * inverse, second * inverse);
                }
                const u32 moved = (lane_ % 4 * 2) ^ (chunk * 4 + lane_ % 4);  // from values_' chunk to this one
                store_shared_16b((values_ ^ moved * 16) + kCodedBoxes * kBoxBytes + half * kSwizzleAtomBytes,
                                 uint4{words[chunk][0], words[chunk][1], words[chunk][2], words[chunk][3]});
            }
        }
    }

    // Once PV of the tile before has read what is there. 32 bytes of two tokens.
    MLA_DEVICE void store_values(u32 box, const u32 (&key)[kBoxSteps][4]) const {
        if (box % kFreedBoxes == 0) mbarrier_wait(values_empty_barrier(smem_, box / kFreedBoxes), values_parity_ ^ 1);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
#pragma unroll
            for (u32 chunk = 0; chunk < 2; ++chunk)
                store_shared_16b((values_ ^ chunk * 16) + box * kBoxBytes + half * kSwizzleAtomBytes,
                                 uint4{key[chunk * 2][half], key[chunk * 2][2 + half], key[chunk * 2 + 1][half],
                                       key[chunk * 2 + 1][2 + half]});
        }
    }

    const GatherParams& params_;
    u32 smem_, thread_, lane_;
    u32 values_;             // where this thread's first chunk of V lies in a box
    u32 values_parity_ = 0;  // of the tile at hand
    Softmax softmax_;
    SlabRing ring_;
};

}  // namespace mla
