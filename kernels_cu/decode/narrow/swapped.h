// A tile's arithmetic with swapped operands: S^T = K Q^T and O^T += V^T P^T, tokens (or latent columns) along wgmma's M, query
// rows along N, so 16 rows cost 16 rows of arithmetic. By one warpgroup.
//
// In a fragment a thread holds, for each 8 query rows along N, two neighbouring ones at two places along M. The rows it
// holds are the same for S^T and every O^T: maximum, sum and rescale factors of a row stay in its registers. What must
// cross lanes and warps (a row's 64 tokens are spread over all of them) does so only when a maximum moves and at the end.
#pragma once
#include "core/quad.h"
#include "core/softmax.h"
#include "decode/work_item.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

constexpr u32 kTileBoxes = kLatentBoxes + kRopeBoxes;  // a KV tile: its latent boxes, then its rope boxes

// Q, P and the output lie as boxes of [kRows][64] values: kRows rows of 128 bytes, 128-byte swizzle.
constexpr u32 kRowBoxBytes = kRows * kBoxRowBytes;

constexpr u32 kFragment = kRows / 2;    // accumulators a thread holds of a 64 x kRows tile
constexpr u32 kThreadRows = kRows / 4;  // query rows among them
constexpr u32 kStepTokens = 16;         // k16 steps of PV run over tokens
constexpr u32 kWarpTokens = 16;         // rows along M of a warp's share
constexpr u32 kBoxSteps = kBoxRowBytes / kStepBytes;

// V^T as M-major A operand: one box is 64 latent columns, all of M, so the leading offset is not used.
constexpr u64 kValueBox = encode_descriptor(16, kSwizzleAtomBytes, kSwizzle128B);

// Where a thread's row `i` lies: its first accumulator (the one 8 further along M is 2 further), and its row in the block.
MLA_DEVICE constexpr u32 row_element(u32 i) { return i / 2 * 4 + i % 2; }
MLA_DEVICE u32 row_of_lane(u32 lane, u32 i) { return i / 2 * 8 + lane % 4 * 2 + i % 2; }

// S^T += K Q^T for one box of K; the tile's first overwrites. `query` is the descriptor of all of Q.
MLA_DEVICE void multiply_box(u32 box, u32 box_address, u64 query, float (&scores)[kFragment]) {
    const u64 k = descriptor_at(kBoxKMajor, box_address);
#pragma unroll
    for (u32 step = 0; step < kBoxSteps; ++step)
        wgmma_ss<Operand, 0, 0>(scores, k + descriptor_offset(step * kStepBytes),
                                query + descriptor_offset(box * kRowBoxBytes + step * kStepBytes), box + step > 0);
}

// One M block of O^T (+)= V^T P^T: that of the 64 columns of one box of V. `probabilities` is the descriptor of P.
MLA_DEVICE void accumulate_box(u32 box_address, u64 probabilities, bool accumulate, float (&output)[kFragment]) {
    const u64 v = descriptor_at(kValueBox, box_address);
#pragma unroll
    for (u32 step = 0; step < kTileTokens / kStepTokens; ++step)
        wgmma_ss<Operand, 1, 0>(output, v + descriptor_offset(step * kStepTokens * kBoxRowBytes),
                                probabilities + descriptor_offset(step * kStepBytes), accumulate || step > 0);
}

// Of the thread's rows: the same in all threads that hold the row.
struct RowMaxima {
    float maximum[kThreadRows];

    MLA_DEVICE RowMaxima() {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) maximum[i] = minus_infinity();
    }

    // Moves the maxima of the rows whose tile maximum is above the threshold; factor = 2^(old - new), 1 if it stays.
    MLA_DEVICE void raise(const float (&tile_maximum)[kThreadRows], float (&factor)[kThreadRows]) {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            factor[i] = 1.0f;
            if (tile_maximum[i] > maximum[i] + kRescaleThreshold) {
                factor[i] = fast_exp2(maximum[i] - tile_maximum[i]);
                maximum[i] = tile_maximum[i];
            }
        }
    }
};

// And sums, of the thread's tokens.
struct RowStatistics : RowMaxima {
    float sum[kThreadRows];

    MLA_DEVICE RowStatistics() {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) sum[i] = 0.0f;
    }
};

// Of this thread's scores of each of its rows.
MLA_DEVICE void column_maxima(const float (&scores)[kFragment], float (&maxima)[kThreadRows]) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) maxima[i] = fmaxf(scores[row_element(i)], scores[row_element(i) + 2]);
}

MLA_DEVICE void exponentiate(const float (&scores)[kFragment], const RowStatistics& rows, float (&probabilities)[kFragment]) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
        // A row that has seen no key: its scores are -inf, and -inf - -inf would be NaN.
        const float shift = rows.maximum[i] == minus_infinity() ? 0.0f : rows.maximum[i];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 element = row_element(i) + half * 2;
            probabilities[element] = fast_exp2(scores[element] - shift);
        }
    }
}

// Of a refined block (decode/work_item.h): the rows eight further are the next four of a thread's accumulators, and the next
// two of its rows.
constexpr i32 kRefinedAccumulators = kRefinedRows / 2;
constexpr i32 kRefinedThreadRows = kRefinedRows / 4;

MLA_DEVICE void share_factors(float (&factor)[kThreadRows]) {
#pragma unroll
    for (i32 i = 0; i < kRefinedThreadRows; ++i) factor[i + kRefinedThreadRows] = factor[i];
}

MLA_DEVICE void add_refinement(float (&output)[kLatentBoxes][kFragment]) {
#pragma unroll
    for (u32 box = 0; box < kLatentBoxes; ++box) {
#pragma unroll
        for (i32 i = 0; i < kRefinedAccumulators; ++i) output[box][i] += output[box][i + kRefinedAccumulators];
    }
}

// Reduces each row's value over all threads of the warpgroup that hold the row, in a fixed order, through kRows floats of each
// warp at `exchange`. One named barrier inside; another must follow before the next call, so that all have read.
template <class Reduce>
MLA_DEVICE void reduce_across_warps(u32 exchange, u32 warp, u32 lane, u32 barrier, float (&values)[kThreadRows],
                                    Reduce reduce) {
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (u32 distance = 4; distance < kWarpThreads; distance *= 2)
            values[i] = reduce(values[i], __shfl_xor_sync(kFullWarp, values[i], distance));
        if (lane < 4) store_shared_f32(exchange + (warp * kRows + row_of_lane(lane, i)) * sizeof(f32), values[i]);
    }
    named_barrier_sync(barrier, kWarpgroupThreads);  // every warp's value of every row is there
#pragma unroll
    for (u32 i = 0; i < kThreadRows; ++i) {
        const u32 address = exchange + row_of_lane(lane, i) * sizeof(f32);
        values[i] = load_shared_f32(address);
#pragma unroll
        for (u32 other = 1; other < kWarpgroupWarps; ++other)
            values[i] = reduce(values[i], load_shared_f32(address + other * kRows * sizeof(f32)));
    }
}

MLA_DEVICE void rescale(const float (&factor)[kThreadRows], float (&output)[kLatentBoxes][kFragment]) {
#pragma unroll
    for (u32 box = 0; box < kLatentBoxes; ++box) {
#pragma unroll
        for (u32 i = 0; i < kThreadRows; ++i) {
            output[box][row_element(i)] *= factor[i];
            output[box][row_element(i) + 2] *= factor[i];
        }
    }
}

}  // namespace mla
