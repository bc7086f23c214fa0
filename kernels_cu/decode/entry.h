// How every decode kernel begins: barriers, the wait for the plan, the part that this CTA takes.
#pragma once
#include "decode/claim.h"
#include "decode/work_item.h"
#include "ptx/launch.h"

namespace mla {

// Returns where the number of this CTA's first item lies; that of the first item past its own follows. All threads call
// this, once; the first one runs `prepare`, which initialises the kernel's barriers. kClaimBytes of shared memory at
// `claim_slot` are its own. kLaunches: also lets the next kernel start, as soon as may be; else the caller does.
template <bool kLaunches = true, class Params, class Prepare>
MLA_DEVICE const i32* enter(const Params& params, u8* claim_slot, Prepare prepare) {
    if (threadIdx.x == 0) prepare();
    __syncthreads();
    // Work may be read while the kernel ahead still runs, unless that is the planner.
    if (!params.plan_is_settled) pdl_wait();
    const i32 part = take_part(params, claim_slot);
    if (kLaunches) pdl_launch_dependents();
    return plan_part_begin(params.plan) + part;
}

// The numbers of a part's first item (side 0) and of the one past its last (1), read again each time: kept, they would cost
// registers that roles do not have. The number of the part lies in the word that a claim leaves unused. All threads make this, once.
class PartBounds {
public:
    MLA_DEVICE PartBounds(const i32* plan, const i32* part_begin, u8* claim_slot)
        : plan_(plan), part_(reinterpret_cast<volatile i32*>(claim_slot) + 1) {
        if (threadIdx.x == 0) *part_ = static_cast<i32>(part_begin - plan_part_begin(plan));
        __syncthreads();
    }

    MLA_DEVICE i32 operator()(i32 side) const { return plan_part_begin(plan_)[*part_ + side]; }

private:
    const i32* plan_;
    volatile i32* part_;
};

// A role's walk over the items of a part, from the one with the number bound(0) to that before bound(1). run(item) calls pdl_wait()
// itself, before it reads or writes what other kernels may still be at: what it finds out of an item and of the plan until then is
// not waited for.
template <class Bound, class Run>
MLA_DEVICE void for_each_item(Bound bound, Run run) {
    for (i32 item = bound(0); item < bound(1); ++item) run(item);
    pdl_wait();  // whoever waits for this kernel waits for those before it, too
}

}  // namespace mla
