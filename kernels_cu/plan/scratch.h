// What the planner's threads share, and how they add up.
#pragma once
#include "plan/packing.h"

namespace mla {

// Each tries a budget of the search range, or two: it holds 153, 225 or 321 with the costs of 16, 32 or 64 rows.
constexpr i32 kPlanThreads = 256;
constexpr i32 kMaxInt = 0x7fffffff;

// What all jobs cost, cut only where a fixed split asks for it.
struct Load {
    i64 total;
    i32 largest;  // of what may not be cut further
    i32 jobs;

    MLA_DEVICE Load then(const Load& next) const {
        return {total + next.total, max_i32(largest, next.largest), jobs + next.jobs};
    }
};

struct Counts {
    i32 items, slots, merges;

    MLA_DEVICE Counts then(const Counts& next) const {
        return {items + next.items, slots + next.slots, merges + next.merges};
    }
};

// Shared memory besides the job table.
struct PlanScratch {
    // While budgets are searched, nobody needs the sums.
    union {
        Load loads[2][kPlanThreads];
        u32 free_ranks[kMaxPackedJobs / FreeRanks::kWordBits][kPlanThreads];
    };
    union {
        Counts counts[2][kPlanThreads];
        SortedJobs sorted;
    };
    i32 jobs_until[2][kPlanThreads];
    i32 best_whole;  // smallest feasible budgets found: jobs left whole, or cut only at fixed places
    i32 best_cut;    // jobs cut where budgets end
    i32 parts_used;
    i32 padding;
};
static_assert(sizeof(PlanScratch) == 16400, "cupy_mla/kernels/planner.py adds the job table to it");

// Saturates: offsets that do not rise can ask for more jobs than an int counts.
MLA_DEVICE i32 join(i32 a, i32 b) { return a > kMaxInt - b ? kMaxInt : a + b; }
MLA_DEVICE Load join(const Load& a, const Load& b) { return a.then(b); }
MLA_DEVICE Counts join(const Counts& a, const Counts& b) { return a.then(b); }

// Inclusive prefix over the CTA's threads; returns the buffer that holds it.
template <typename T>
MLA_DEVICE const T* scan_threads(T (&buffers)[2][kPlanThreads], const T& mine, i32 thread) {
    T* from = buffers[0];
    T* to = buffers[1];
    from[thread] = mine;
    __syncthreads();
#pragma unroll 1
    for (i32 distance = 1; distance < kPlanThreads; distance *= 2) {
        to[thread] = thread < distance ? from[thread] : join(from[thread - distance], from[thread]);
        __syncthreads();
        T* const written = to;
        to = from;
        from = written;
    }
    return from;
}

// Contiguous share of `count` elements for a thread.
struct Share {
    i32 begin, end;

    MLA_DEVICE Share(i32 count, i32 thread) {
        const i32 each = ceil_div(count, kPlanThreads);
        begin = min_i32(thread * each, count);
        end = min_i32(begin + each, count);
    }
};

}  // namespace mla
