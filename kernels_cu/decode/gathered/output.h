// How the kernels of gathered tokens store the output of 64 rows, and where rows' other results go in a cluster.
#pragma once
#include "decode/gathered/cluster.h"
#include "decode/wide/output.h"
#include "decode/wide/tile.h"

namespace mla {

constexpr u32 kResultsBarrier = 2;  // named barrier of scores and values warpgroups

MLA_DEVICE f32* row_value(u32 which, i32 row_in_block) {
    return reinterpret_cast<f32*>(shared_begin() + kSharedRowsBytes) + which * kRows + row_in_block;
}

static_assert(kSharedRowsBytes + kRowValues * kRows * sizeof(f32) <= 2 * kStageBytes, "results lie where stages were");

// Prefill streams what it stores, in favour of tokens that are read again.
class GatheredOutput : public WideOutput<GatherParams, !kIsPlanned> {
    using Whole = WideOutput<GatherParams, !kIsPlanned>;

public:
    // In a cluster: until nobody reads tiles or P any more, so that results may take their place.
    static MLA_DEVICE void wait_for_room() {
        if constexpr (kIsClustered) named_barrier_sync(kResultsBarrier, (1 + kValueWarpgroups) * kWarpgroupThreads);
    }

    static MLA_DEVICE void store(const GatherParams& params, i32 item, float (&output)[kAccumulators]) {
        if constexpr (!kIsClustered)
            Whole::store(params, item, output);
        else
            store_shared(load_block_work(params, item), output);
    }

private:
    static MLA_DEVICE void store_shared(const BlockWork& work, const float (&output)[kAccumulators]) {
        wait_for_room();
        const u32 smem = shared_address(shared_begin());
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const i32 row = row_at(work, Whole::warp() * 16 + Whole::lane() / 4 + half * 8);
            if (!row_exists(work, row)) continue;
            const u32 place = shared_output(smem, row, Whole::first_column() + Whole::lane() % 4 * 2);
#pragma unroll
            for (u32 i = 0; i < kAccumulators / 4; ++i)
                store_shared_8b(place + i * 8 * sizeof(f32), uint2{__float_as_uint(output[i * 4 + half * 2]),
                                                                   __float_as_uint(output[i * 4 + half * 2 + 1])});
        }
    }
};

// By the values warps: decode/gathered/cluster.h.
MLA_DEVICE void merge_outputs(const GatherParams& params) {
    cluster_sync();
    const u32 thread = threadIdx.x - kWarpgroupThreads;
    merge_cluster<kValueWarpgroups * kWarpgroupWarps>(params, thread / kWarpThreads, thread % kWarpThreads);
}

}  // namespace mla
