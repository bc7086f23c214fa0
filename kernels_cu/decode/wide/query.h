// Q of the scores warpgroup: A fragments in registers, and the k16 steps that do not fit there in shared memory.
#pragma once
#include "core/quad.h"
#include "decode/rows.h"
#include "decode/wide/row_places.h"
#include "decode/wide/schedule.h"
#include "decode/wide/tile.h"
#include "ptx/warp.h"

namespace mla {

// One k16 step of Q for 64 rows in shared memory: 32 bytes a row, 32-byte swizzle.
constexpr u32 kQStepRowBytes = 32;
constexpr u32 kQStepBytes = kRows * kQStepRowBytes;
constexpr u64 kQStepKMajor = encode_descriptor(16, 8 * kQStepRowBytes, kSwizzle32B);
MLA_DEVICE u32 q_step_chunk_offset(u32 row, u32 chunk) {
    return row * kQStepRowBytes + ((chunk ^ ((row >> 2) & 1)) << 4);
}

// For a thread whose fragment rows are at `row` and row + 8 of the matrices: 16-byte loads of 8 columns a lane, transposed within
// the quad to the fragment's column pairs. Steps past kRegisterSteps go to shared memory at `shared_steps`.
template <class Params>
MLA_DEVICE void load_query(const Params& params, const BlockWork& work, u32 row, u32 lane_in_quad, u32 shared_steps,
                           u32 (&q)[kRegisterSteps][4]) {
    QueryRow rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[half] = query_row(params, work, row_at(work, row + half * 8), lane_in_quad * 8);
#pragma unroll
    for (int block = static_cast<int>(kSteps / 2) - 1; block >= 0; --block) {  // two k16 steps, 32 columns
        u32 words[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 column = block * 32;
            const uint4 loaded = column < kLatent ? rows[half].load_latent(column) : rows[half].load_rope(column - kLatent);
            const u32 step = block * 2 + lane_in_quad / 2;
            if (block * 2 + 1 >= static_cast<int>(kRegisterSteps) && step >= kRegisterSteps)
                store_shared_16b(shared_steps + (step - kRegisterSteps) * kQStepBytes +
                                     q_step_chunk_offset(row + half * 8, lane_in_quad % 2),
                                 loaded);
            words[half][0] = loaded.x;
            words[half][1] = loaded.y;
            words[half][2] = loaded.z;
            words[half][3] = loaded.w;
            if (block * 2 < static_cast<int>(kRegisterSteps)) quad_transpose(words[half], lane_in_quad);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (block * 2 + s < static_cast<int>(kRegisterSteps)) {
                q[block * 2 + s][0] = words[0][s * 2];
                q[block * 2 + s][1] = words[1][s * 2];
                q[block * 2 + s][2] = words[0][s * 2 + 1];
                q[block * 2 + s][3] = words[1][s * 2 + 1];
            }
        }
    }
}

// The same from rows that lie in a stage like the tokens of a tile, by the whole scores warpgroup. Each warp reads and stores
// its own 16 rows.
MLA_DEVICE void load_staged_query(u32 stage, u32 shared_steps, u32 (&q)[kRegisterSteps][4]) {
    const u32 warp = threadIdx.x / kWarpThreads;
    const u32 lane = threadIdx.x % kWarpThreads;
    const u32 row = warp * 16 + lane % 16;  // that this lane gives the address of, as of the chunk
    const u32 chunk = lane / 16;
    const u32 in_group = row % kAtomRows;
#pragma unroll
    for (u32 step = 0; step < kSteps; ++step) {
        constexpr u32 kBoxSteps = kBoxRowBytes / kStepBytes;
        const u32 box = step / kBoxSteps;
        const u32 box_row = box < kLatentBoxes ? latent_row(row, box) : kStageRope + row * kBoxRowBytes;
        const u32 address = stage + box_row + ((step % kBoxSteps * 2 + chunk ^ in_group) << 4);
        if (step < kRegisterSteps) {
            load_matrix_x4(address, q[step]);
        } else {
            u32 words[4];
            load_matrix_x4(address, words);
            store_matrix_x4(shared_steps + (step - kRegisterSteps) * kQStepBytes + q_step_chunk_offset(row, chunk), words[0],
                            words[1], words[2], words[3]);
        }
    }
}

}  // namespace mla
