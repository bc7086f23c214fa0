// A query token that a cluster of CTAs shares, each with some of its tiles (MLA_CLUSTERED): what they leave in their shared memory
// for each other, and its merge. Results of a CTA are those of a part of a job: normalised, without sinks.
#pragma once
#include "combine/merge_octets.h"
#include "decode/gathered/work.h"
#include "ptx/cluster.h"
#include "ptx/launch.h"

namespace mla {

// Rows of the output, float32, where tiles were: they begin with shared memory. Neighbouring ones lie in other banks.
constexpr u32 kSharedRowFloats = kLatent + 8;
constexpr u32 kSharedRowsBytes = kRows * kSharedRowFloats * sizeof(f32);

MLA_DEVICE u8* shared_begin() {
    extern __shared__ __align__(1024) u8 shared[];
    return shared;
}

MLA_DEVICE u32 shared_output(u32 smem, u32 row, u32 column) {
    return smem + (row * kSharedRowFloats + column) * static_cast<u32>(sizeof(f32));
}

// Those of the CTAs of a cluster, as merge_octets.h takes them: addresses are of this CTA's own.
struct ClusterStates : SinkStates<RowStates> {
    MLA_DEVICE const u8* out_of(i32 rank) const { return in_cta(outs, rank); }
    MLA_DEVICE f32 lse_of(i32 rank) const { return *in_cta(lses, rank); }
};

// By the kWarps warps that have stored the output, once all of the cluster have: each CTA merges every so many-th row.
template <i32 kWarps>
MLA_DEVICE void merge_cluster(const GatherParams& params, i32 warp, i32 lane) {
    BlockWork work = load_block_work(params, blockIdx.y);
    work.slot = kWholeJob;
    const i32 ctas = cluster_size(), first = cluster_rank();
    const i32 block_rows = min_i32(work.num_rows - work.first_row, static_cast<i32>(kRows));
    const i32 rows = ceil_div(max_i32(block_rows - first, 0), ctas);
    const RowChunks chunks(rows, kLatent, kWarps, kSectorOctets<Fp32>);
    for (i32 task = warp; task < rows * chunks.chunks_of_row; task += kWarps) {
        const i32 chunk = task % chunks.chunks_of_row;
        const i32 row = first + task / chunks.chunks_of_row * ctas;
        const RowPlace place = locate_row(params, work, row);
        const f32 sink = params.attn_sink == nullptr ? minus_infinity() : __ldg(params.attn_sink + place.head);
        const u8* const outs = shared_begin() + row * kSharedRowFloats * sizeof(f32);
        const ClusterStates states{{{outs, 0, row_value(kLseOfRow, row), 0, ctas, true}, sink}};
        merge_chunk<Fp32, Output>(states, chunks, chunk, kLatent, lane, [&] {
            u16* const out = output_row(params, work, row);
            return RowTarget{reinterpret_cast<u8*>(out), lse_row(params, work, row), true, params.empty_lse};
        });
        if (params.max_logits == nullptr || chunk != 0 || lane != 0) continue;
        f32 largest = minus_infinity();
        for (i32 rank = 0; rank < ctas; ++rank) largest = fmaxf(largest, *in_cta(row_value(kLargestOfRow, row), rank));
        *max_logit(params, work, row) = largest;
    }
}

// All threads of a CTA, at its end: no CTA leaves before the others have read what it has.
MLA_DEVICE void leave_cluster() {
    cluster_sync();
    pdl_wait();  // whoever waits for this kernel waits for the one before it, too
}

}  // namespace mla
