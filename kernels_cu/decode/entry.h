// How every decode kernel begins: barriers, the wait for the plan, the part that this CTA takes.
#pragma once
#include "decode/claim.h"
#include "ptx/launch.h"

namespace mla {

// Returns where the number of this CTA's first item lies; that of the first item past its own follows. All threads call
// this, once; the first one runs `prepare`, which initialises the kernel's barriers. kClaimBytes of shared memory at
// `claim_slot` are its own. Also lets the next kernel start, as soon as may be.
template <class Params, class Prepare>
MLA_DEVICE const i32* enter(const Params& params, u8* claim_slot, Prepare prepare) {
    if (threadIdx.x == 0) prepare();
    __syncthreads();
    // Work may be read while the kernel ahead still runs, unless that is the planner.
    if (!params.plan_is_settled) pdl_wait();
    const i32 part = take_part(params, claim_slot);
    pdl_launch_dependents();
    return plan_part_begin(params.plan) + part;
}

}  // namespace mla
