// Scales of the tokens that a converter warp has on their way, and the tokens' units, in the kernel for 64 rows of gathered FP8
// tokens. A lane below kWarpTokens has those of the token of its number.
#pragma once
#include "decode/gathered_fp8/token_unit.h"
#include "decode/gathered_fp8/wide_pieces.h"
#include "ptx/convert.h"
#include "ptx/load.h"
#include "source/gathered.h"

namespace mla {

class TokenScales {
public:
    MLA_DEVICE TokenScales(const GatherParams& params, u32 smem, u32 warp) : params_(params), smem_(smem), warp_(warp) {}

    // Asks for those of a token, if it exists.
    template <class C>
    MLA_DEVICE void load(i32 slot, bool exists, bool is_extra) {
        if constexpr (C::kPageEndBytes > 0) {
            load_global_8b(page_end_address(params_, slot, C::kRowBytes, C::kPageEndBytes, is_extra), exists, stored<C>(),
                           C::kNoScales);
        } else if constexpr (C::kHasScales) {
            const u8* const source = token_address(params_, slot, is_extra) + C::kScalesOffset;
#pragma unroll
            for (u32 i = 0; i < kStoredWords<C>; i += 4)
                load_global_16b(source + i * sizeof(u32), exists, reinterpret_cast<u32(&)[4]>(stored_[i]), C::kNoScales);
        }
    }

    // Takes the units of this warp's tokens, and puts what scales are over them in shared memory, as pairs of fp16. Whether any
    // unit is not 1; `unit` is that of the token `lane`. Uncoded values of V are there by now, and count.
    template <class C>
    MLA_DEVICE bool prepare(f32& unit) {
        unit = 1.0f;
        if constexpr (C::kHasScales) {
            __syncwarp();  // all have read those of the tile before
            u32 pairs[kScalePairs<C>];
            bool fits = C::fp16_scales(stored<C>(), pairs);
            store<C>(pairs);
            if constexpr (kUncodedIsValue) fits &= uncoded_fit();
            bool have_units = false;
            if constexpr (C::kNeedsUnits) {
                have_units = __any_sync(kFullWarp, !fits);
                if (have_units) take_units<C>(unit);
            }
            __syncwarp();
            return have_units;
        }
        return false;
    }

    // A lane's scales of so many pairs of tokens from `first` on: a word for each, of its two pieces.
    static constexpr u32 kAtOnce = 4;
    template <class C>
    MLA_DEVICE void read(u32 lane, u32 first, u32 (&words)[kAtOnce]) const {
        if constexpr (C::kHasScales)
            load_shared_words(words_of_pairs<C>(half_of(lane), first_column(lane) / kColumnsPerScale<C>) + first * sizeof(u32), words);
    }

private:
    template <class C>
    static constexpr u32 kStoredWords = C::kScaleBytes / sizeof(u32);
    static constexpr u32 kMostStoredWords =
        kStoredWords<Codec> > kStoredWords<ExtraCodec> ? kStoredWords<Codec> : kStoredWords<ExtraCodec>;

    template <class C>
    MLA_DEVICE u32 (&stored())[kStoredWords<C>] {
        return reinterpret_cast<u32(&)[kStoredWords<C>]>(stored_);
    }

    // Of the first or second token of each pair, the words of the scales `word` and `word` + kScalePairs. A warp's share is where
    // it is whatever the codec: another warp may still be in the tile before, of the other codec.
    template <class C>
    MLA_DEVICE u32 words_of_pairs(u32 half, u32 word) const {
        const u32 share = smem_ + Smem::scales + warp_ * kWarpTokens * Smem::scale_bytes;
        return share + (half * kScalePairs<C> + word) * kPairs * sizeof(u32);
    }

    template <class C>
    MLA_DEVICE void store(const u32 (&pairs)[kScalePairs<C>]) const {
        const u32 lane = this_lane();
        if (lane >= kWarpTokens) return;
#pragma unroll
        for (u32 i = 0; i < kScalePairs<C>; ++i)
            store_shared_u32(words_of_pairs<C>(lane % kPairTokens, i) + lane / kPairTokens * sizeof(u32), pairs[i]);
    }

    // The slow path: some token has one.
    template <class C>
    MLA_DEVICE void take_units(f32& unit) {
        ScaleRange range{true, 0.0f};
#pragma unroll
        for (u32 i = 0; i < C::kScales; ++i) widen(range, C::scale(stored<C>(), i));
        if constexpr (kUncodedIsValue) widen_by_uncoded(range, largest_uncoded());
        const f32 inverse = take_unit(range, unit);
        u32 pairs[kScalePairs<C>];
#pragma unroll
        for (u32 i = 0; i < kScalePairs<C>; ++i) {
            const u32 second = i + kScalePairs<C> < C::kScales ? i + kScalePairs<C> : i;
            pairs[i] = pack2<Fp16>(C::scale(stored<C>(), i) * inverse, C::scale(stored<C>(), second) * inverse);
        }
        store<C>(pairs);
    }

    // Magnitudes as numbers of 16 bits, in which order a bf16 has them, too: the largest of this lane's chunk of a pass.
    MLA_DEVICE u32 largest_of_chunk(u32 pass) const {
        u32 words[4], largest = 0;
        load_shared_words(staged_chunk(smem_, warp_, this_lane(), pass), words);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) largest = max_u16_pairs(largest, words[i] & 0x7FFF7FFFu);
        return largest;
    }

    // Whether fp16 holds what this lane has of uncoded values.
    MLA_DEVICE bool uncoded_fit() const {
        constexpr u32 kLargestFp16 = 0x477F;  // 65280, the largest bf16 that an fp16 holds
        u32 largest = 0;
#pragma unroll
        for (i32 pass = 0; pass < kStagedPasses; ++pass) largest = max_u16_pairs(largest, largest_of_chunk(pass));
        return both_at_most(largest, kLargestFp16);
    }

    // Of this lane's token.
    MLA_DEVICE f32 largest_uncoded() const {
        const u32 lane = this_lane();
        u32 its_largest = 0;
#pragma unroll
        for (i32 pass = 0; pass < kStagedPasses; ++pass) {
            u32 largest = largest_of_chunk(pass);
#pragma unroll
            for (u32 distance = 1; distance < kStagedLanes; distance *= 2)
                largest = max_u16_pairs(largest, __shfl_xor_sync(kFullWarp, largest, distance));
            largest = __shfl_sync(kFullWarp, largest, lane % kStagedTokens * kStagedLanes);
            if (lane / kStagedTokens == static_cast<u32>(pass)) its_largest = largest;
        }
        f32 first, second;
        unpack2<Bf16>(its_largest, first, second);
        return fmaxf(first, second);
    }

    const GatherParams& params_;
    u32 smem_, warp_;
    u32 stored_[kMostStoredWords > 0 ? kMostStoredWords : 1];
};

}  // namespace mla
