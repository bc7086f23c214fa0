// Lengths to a work list, on the device: one CTA, no host synchronisation, so that a captured graph follows lengths
// that change.
#include "plan/planner.h"

// grid 1, block kPlanThreads. Dynamic shared memory: PlanScratch, then the job table if params.table_in_shared.
extern "C" __global__ void __launch_bounds__(mla::kPlanThreads, 1)
mla_plan(const int* cache_seqlens /* [batch / requests_per_length], or null: all are the longest */, const int* cu_seqlens_q /* [batch + 1] or null */,
         const int* extra_lengths /* [batch / requests_per_extra_length], or null: all are the longest, or there is one list */,
         int* plan /* core/plan_format.h */, const __grid_constant__ mla::PlanParams params) {
    using namespace mla;
    extern __shared__ __align__(16) u8 shared[];
    PlanScratch& scratch = *reinterpret_cast<PlanScratch*>(shared);
    i32* const table = params.table_in_shared ? reinterpret_cast<i32*>(shared + sizeof(PlanScratch))
                                              : plan + params.workspace_offset;
    Planner{params,
            PlanInputs{cache_seqlens, cu_seqlens_q, extra_lengths},
            JobTable(table, params.max_jobs),
            scratch,
            plan,
            static_cast<i32>(threadIdx.x)}
        .run();
}
