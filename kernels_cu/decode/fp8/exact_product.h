// S^T = K Q^T of a tile of an e4m3 cache on fp16 tensor cores, K made in registers: for the exact kernels.
#pragma once
#include "decode/fp8/schedule.h"
#include "decode/fp8/smem.h"
#include "ptx/convert_fp8.h"
#include "ptx/wgmma.h"

namespace mla {

// Boxes of 64 columns in the order in which they are multiplied.
MLA_DEVICE constexpr u32 box_in_turn(u32 turn) { return kRopeApart ? (turn + kLatentBoxes) % kTileBoxes : turn; }

// Four k16 steps at a time: 16 bytes of two tokens a thread. Apart, the rope columns come first: their sums are done, and multiplied,
// when the next step's K is made. `load_keys` reads a box's codes; `ahead` is called before those of a turn's next box are read, and
// `meanwhile` while the last steps are multiplied.
template <class LoadKeys, class Ahead, class Meanwhile>
MLA_DEVICE void multiply_keys(u32 smem, float rope_ratio, float (&scores)[kFragment], LoadKeys load_keys, Ahead ahead,
                              Meanwhile meanwhile) {
    const u64 q = descriptor_at(kBoxKMajor, smem + Fp8Smem::query);
    u32 raw[2][2][4];
    u32 a[2][kBoxSteps][4];
    wgmma_pin(scores);
    load_keys(box_in_turn(0), raw[0]);
#pragma unroll
    for (u32 turn = 0; turn < kTileBoxes; ++turn) {
        const u32 box = box_in_turn(turn);
        ahead(turn);
        if (turn + 1 < kTileBoxes) load_keys(box_in_turn(turn + 1), raw[(turn + 1) % 2]);
        if (turn >= 2) wgmma_wait<1>();
        const u32(&words)[2][4] = raw[turn % 2];
        u32(&fragment)[kBoxSteps][4] = a[turn % 2];
#pragma unroll
        for (u32 step = 0; step < kBoxSteps; ++step) {
            fragment[step][0] = e4m3_pair_low(words[0][step]);
            fragment[step][1] = e4m3_pair_low(words[1][step]);
            fragment[step][2] = e4m3_pair_high(words[0][step]);
            fragment[step][3] = e4m3_pair_high(words[1][step]);
        }
        if (kRopeApart && turn == kRopeBoxes) {
            wgmma_wait<0>();
            wgmma_pin(scores);
#pragma unroll
            for (u32 i = 0; i < kFragment; ++i) scores[i] *= rope_ratio;
            wgmma_pin(scores);
        }
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < kBoxSteps; ++step)
            wgmma_rs<Operand, 0>(scores, fragment[step][0], fragment[step][1], fragment[step][2], fragment[step][3],
                                 q + descriptor_offset(box * kRowBoxBytes + step * kStepBytes), turn + step > 0);
        wgmma_commit();
    }
    meanwhile();
    wgmma_wait<0>();
    wgmma_pin(scores);
}

}  // namespace mla
