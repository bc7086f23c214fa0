// S = Q K^T of 64 query rows and the tokens of a tile, both e4m3, with Q as high and low parts (query.h): on fp8 tensor cores,
// or exactly, on fp16 ones. In both a thread gets wgmma's accumulators of m64n64.
#pragma once
#include "decode/fp8/query.h"
#include "ptx/mma.h"
#include "ptx/warp.h"
#include "ptx/wgmma_fp8.h"

namespace mla {

constexpr u32 kScoresAccumulators = kRows / 2;

// k32 steps: of the latent columns, of all columns, of the low part of Q, and of a tile.
constexpr u32 kLatentSteps = kLatent / 32, kColumnSteps = (kLatent + kRope) / 32;
constexpr u32 kLowSteps = (kQueryParts - 1) * kColumnSteps, kSteps = kQueryParts * kColumnSteps;
// They are added up in groups: all of the low part, if there is one, and then some of the high part at a time.
constexpr u32 kFirstGroup = kLowSteps > 0 ? kLowSteps : kPromotionSteps;
constexpr MLA_DEVICE u32 group_end(u32 group) {
    const u32 end = kFirstGroup + group * kPromotionSteps;
    return end < kSteps ? end : kSteps;
}


// Two sets of accumulators take turns: while one is multiplied into, the other is added to the scores in float32. When only the
// last group is left, P of the tile before is released.
class SplitProduct {
public:
    MLA_DEVICE explicit SplitProduct(u32 smem) : smem_(smem) {}

    template <class Release>
    MLA_DEVICE void multiply(u32 stage, float (&scores)[kScoresAccumulators], Release release) const {
        u32 query = smem_ + Fp8Smem::query;
        pin_register(query);  // else the compiler keeps the descriptors of all steps
        const Operands operands(query, stage);
        float sums[2][kScoresAccumulators];
        wgmma_pin(sums[0]);
        wgmma_fence();
        issue<0, group_end(0)>(operands, sums[0]);
        wgmma_commit();
        add_groups<1>(operands, sums[1], sums[0], scores, release);
    }

private:
    struct Step {
        u32 part, column;  // 0: high, 1: low; which 32 columns
        MLA_DEVICE constexpr explicit Step(u32 index)
            : part(kQueryParts - 1 - index / kColumnSteps), column(index % kColumnSteps) {}
    };

    struct Operands {
        u64 q, q_rope, k, k_rope;
        MLA_DEVICE Operands(u32 query, u32 stage)
            : q(descriptor_at(kBoxKMajor, query)),
              q_rope(descriptor_at(kRopeKMajor, query + kByteBoxes * kSplitBoxBytes)),
              k(descriptor_at(kLatentKMajor, stage)),
              k_rope(descriptor_at(kRopeKMajor, stage + kStageRope)) {}
    };

    // `previous` is being multiplied into, `next` is free.
    template <u32 Group, class Release>
    MLA_DEVICE void add_groups(const Operands& operands, float (&next)[kScoresAccumulators],
                                  float (&previous)[kScoresAccumulators], float (&scores)[kScoresAccumulators],
                                  Release release) const {
        constexpr bool kIsLast = group_end(Group - 1) == kSteps;
        if constexpr (!kIsLast) {
            wgmma_pin(next);
            wgmma_fence();
            issue<group_end(Group - 1), group_end(Group)>(operands, next);
            wgmma_commit();
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        wgmma_pin(previous);
        constexpr f32 kScale = Group == 1 && kLowSteps > 0 ? 1.0f / kLowPart : 1.0f;
#pragma unroll
        for (u32 i = 0; i < kScoresAccumulators; ++i)
            scores[i] = Group == 1 ? previous[i] * kScale : scores[i] + previous[i];
        if constexpr (!kIsLast) {
            if (group_end(Group) == kSteps) release();
            add_groups<Group + 1>(operands, previous, next, scores, release);
        }
    }

    template <u32 Begin, u32 End>
    MLA_DEVICE void issue(const Operands& operands, float (&sums)[kScoresAccumulators]) const {
        constexpr u32 kBoxSteps = kByteBoxColumns / 32, kStepBytes = 32;
#pragma unroll
        for (u32 index = Begin; index < End; ++index) {
            const Step step(index);
            const bool is_latent = step.column < kLatentSteps;
            const u32 box = step.column / kBoxSteps, in_box = step.column % kBoxSteps * kStepBytes;
            const u64 k = is_latent ? operands.k + descriptor_offset(box_offset(box) + in_box)
                                    : operands.k_rope + descriptor_offset((step.column - kLatentSteps) * kStepBytes);
            const u64 q = is_latent ? operands.q + descriptor_offset(box * kSplitBoxBytes + step.part * kRows * kBoxRowBytes + in_box)
                                    : operands.q_rope + descriptor_offset(step.part * kRows * kRopeRowBytes +
                                                                          (step.column - kLatentSteps) * kStepBytes);
            wgmma_e4m3_ss(sums, q, k, index > Begin);
        }
    }

    u32 smem_;
};

// Four k16 steps at a time: a thread takes 16 stored bytes of a row of Q and of a token of K, word s of which is its share of
// step s, and converts them. So the columns of a step are not neighbours, but the same ones for both.
class ExactProduct {
public:
    MLA_DEVICE explicit ExactProduct(u32 smem) : smem_(smem) {}

    template <class Release>
    MLA_DEVICE void multiply(u32 stage, float (&scores)[kScoresAccumulators], Release release) const {
        release();
        float sums[kTileTokens / 8][4] = {};
        u32 thread = threadIdx.x;
        pin_register(thread);  // else what comes of it is kept over all items
        const u32 lane = thread % kWarpThreads;
#pragma unroll 1
        for (u32 box = 0; box < kTileBoxes; ++box) {
            // Of 64 columns this thread has a chunk of 16, of tokens lane / 4 and every eighth from there.
            const bool is_latent = box < kLatentBoxes;
            const u32 chunk = is_latent ? lane % 4 * 2 + box % 2 : lane % 4;
            const u32 first = is_latent ? latent_chunk_offset(lane / 4, box / 2, chunk) : kStageRope + rope_chunk_offset(lane / 4, chunk);
            const u32 next = is_latent ? kLatentGroupBytes : kAtomRows * kRopeRowBytes;
            u32 a[kWords][4];
            load_query(box, chunk, a);
#pragma unroll
            for (u32 group = 0; group < kTileTokens / 8; ++group) {
                u32 keys[kWords];
                load_shared_words(stage + first + group * next, keys);
#pragma unroll
                for (u32 word = 0; word < kWords; ++word)
                    mma_fp16(sums[group], a[word], e4m3_pair_low(keys[word]), e4m3_pair_high(keys[word]));
            }
        }
#pragma unroll
        for (u32 i = 0; i < kScoresAccumulators; ++i) scores[i] = sums[i / 4][i % 4];
    }

private:
    static constexpr u32 kWords = 4;

    // A chunk of this thread's two rows, as operand A of four steps.
    MLA_DEVICE void load_query(u32 box, u32 chunk, u32 (&a)[kWords][4]) const {
        constexpr u32 kInverseLowPart = 0x2C002C00;  // 1 / 16, twice
        const u32 first_row = threadIdx.x / kWarpThreads * 16 + threadIdx.x % kWarpThreads / 4;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            u32 words[kWords];
            load_shared_words(query_address(first_row + half * 8, box, chunk), words);
#pragma unroll
            for (u32 word = 0; word < kWords; ++word) {
                a[word][half] = e4m3_pair_low(words[word]);
                a[word][2 + half] = e4m3_pair_high(words[word]);
            }
            if constexpr (kQueryParts == 2) {
                load_shared_words(query_address(kRows + first_row + half * 8, box, chunk), words);
#pragma unroll
                for (u32 word = 0; word < kWords; ++word) {
                    a[word][half] = fma_fp16_pairs(e4m3_pair_low(words[word]), kInverseLowPart, a[word][half]);
                    a[word][2 + half] = fma_fp16_pairs(e4m3_pair_high(words[word]), kInverseLowPart, a[word][2 + half]);
                }
            }
        }
    }

    MLA_DEVICE u32 query_address(u32 place, u32 box, u32 chunk) const {
        const u32 offset = box < kLatentBoxes ? box / 2 * kSplitBoxBytes + box_chunk_offset(place, chunk)
                                              : kByteBoxes * kSplitBoxBytes + rope_chunk_offset(place, chunk);
        return smem_ + Fp8Smem::query + offset;
    }

    u32 smem_;
};

}  // namespace mla
