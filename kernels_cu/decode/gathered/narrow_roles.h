// What a CTA of a narrow kernel for gathered tokens does, whatever brings the tokens: the roles of its warpgroups (scores,
// values, loaders), which the headers before this one have, with their registers.
#pragma once
#include "decode/gathered/cluster.h"
#include "decode/gathered/params.h"
#include "ptx/warp.h"

namespace mla {

template <int Registers>
MLA_DEVICE void take_registers() {
    if constexpr (Registers > kEntryRegisters)
        registers_increase<Registers>();
    else
        registers_decrease<Registers>();
}

template <class Loader>
MLA_DEVICE void run_narrow_roles(const GatherParams& params, u8* shared) {
    const u32 smem = shared_address(shared);
    const Items items(params, shared + Smem::claim, [&] { initialise_barriers(smem); }, Loader::ahead(params));
    const u32 warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroupThreads, 0);
    const u32 thread = threadIdx.x % kWarpgroupThreads;

    if (warpgroup < kValuesWarpgroup) {
        take_registers<kScoresRegisters>();
        ScoresRole(params, smem, thread).run(items);
        if (kIsClustered) cluster_sync();
    } else if (warpgroup == kValuesWarpgroup) {
        take_registers<kValuesRegisters>();
        ValuesRole(params, smem, thread).run(items);
    } else {
        take_registers<kLoadersRegisters>();
        Loader(params, items, smem, thread).run();
        if (kIsClustered) cluster_sync();
    }
    if (kIsClustered) leave_cluster();
}

}  // namespace mla
