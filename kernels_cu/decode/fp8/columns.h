// The columns of V^T of the values warps of kernels that read e4m3 codes: which a thread has, how their bytes become an A operand,
// and where they go in the result.
//
// A warp has 64 columns (32 of a latent part of 256), of which lanes with lane / 4 = g have a run of eight (four). M block
// 2 j + i holds columns 4 j + 2 i (accumulator rows g) and 4 j + 2 i + 1 (rows g + 8) of each run: a thread ends up with
// neighbouring columns of each of its query rows. kValueWarpgroups is the kernel's own.
#pragma once
#include "decode/narrow/store.h"
#include "ptx/convert_fp8.h"

namespace mla {

constexpr u32 kValueColumns = kLatent / kValueWarpgroups;
constexpr u32 kWarpColumns = kValueColumns / kWarpgroupWarps;
constexpr u32 kMBlocks = kValueColumns / 64;
constexpr u32 kLaneColumns = kWarpColumns / 8;  // neighbouring columns of a thread
constexpr u32 kLaneWords = kLaneColumns / 4;    // of four e4m3 values
static_assert(kMBlocks == 2 * kLaneWords, "a word of four columns makes two M blocks");

// The first column of a thread, counted from the warpgroup ahead of those for values.
MLA_DEVICE u32 first_column(u32 thread) {
    return (thread / kWarpgroupThreads - 1) * kValueColumns + thread % kWarpgroupThreads / kWarpThreads * kWarpColumns +
           thread % kWarpThreads / 4 * kLaneColumns;
}

// Two columns of the four tokens to the A registers of an M block.
MLA_DEVICE void transpose_codes(const u32 (&raw)[4][kLaneWords], u32 block, u32 (&unit)[4]) {
    constexpr u32 kFrontBytes = 0x5140, kBackBytes = 0x7362;  // bytes 0, 1 (2, 3) of two words in turn
#pragma unroll
    for (u32 pair = 0; pair < 2; ++pair) {
        const u32 first = raw[pair * 2][block / 2], second = raw[pair * 2 + 1][block / 2];
        const u32 columns = __byte_perm(first, second, block % 2 ? kBackBytes : kFrontBytes);
        unit[pair * 2] = e4m3_pair_low(columns);
        unit[pair * 2 + 1] = e4m3_pair_high(columns);
    }
}

// Where a row of the result begins; 0: it does not exist. kIsFloat: of a float32 partial result, added.
constexpr u64 kIsFloat = 1;
template <class Params>
MLA_DEVICE u64 result_address(const Params& params, const BlockWork& work, u32 row) {
    if (!row_exists(work, row)) return 0;
    return kPartialIsFloat && work.is_partial() ? reinterpret_cast<u64>(partial_row<f32>(params, work, row)) + kIsFloat
                                                : reinterpret_cast<u64>(output_row(params, work, row));
}

// A thread's columns of a row, if the row exists. column() is the first.
template <class Column>
MLA_DEVICE void store_columns(u64 address, const float (&columns)[kLaneColumns], Column column) {
    if (address == 0) return;
    if (kPartialIsFloat && (address & kIsFloat) != 0) {
        f32* const destination = reinterpret_cast<f32*>(address - kIsFloat) + column();
#pragma unroll
        for (u32 c = 0; c < kLaneColumns; c += 4)
            *reinterpret_cast<float4*>(destination + c) = float4{columns[c], columns[c + 1], columns[c + 2], columns[c + 3]};
        return;
    }
    u32 words[kLaneColumns / 2];
#pragma unroll
    for (u32 i = 0; i < kLaneColumns / 2; ++i) words[i] = pack2<Output>(columns[2 * i], columns[2 * i + 1]);
    u16* const destination = reinterpret_cast<u16*>(address) + column();
    if constexpr (kLaneColumns == 8)
        *reinterpret_cast<uint4*>(destination) = uint4{words[0], words[1], words[2], words[3]};
    else
        *reinterpret_cast<uint2*>(destination) = uint2{words[0], words[1]};
}

}  // namespace mla
