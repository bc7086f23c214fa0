// The smallest budget with which the parts suffice, and how jobs are cut with it. All threads of the CTA call it alike.
#pragma once
#include "core/hopper.h"
#include "plan/jobs.h"
#include "plan/scratch.h"

namespace mla {

constexpr i32 kNoBudget = kMaxInt;
// cupy_mla/schedule/pieces.py says why 16.
constexpr i32 kWholeShare = 16;  // jobs are left whole if that costs at most this part of a budget more

struct BudgetSearch {
    const PlanParams& params;
    const JobTable table;
    PlanScratch& scratch;
    const i32 thread;

    MLA_DEVICE Rule run(const Load& load) const {
        return params.fixed_split_tiles > 0 ? search_fixed(load) : search(load);
    }

    // This thread's own.
    MLA_DEVICE FreeRanks free_ranks() const { return {&scratch.free_ranks[0][thread], kPlanThreads}; }

private:
    MLA_DEVICE i32 mean_load(const Load& load) const {
        return static_cast<i32>((load.total + params.num_parts - 1) / params.num_parts);
    }

    // The smallest feasible budget with cuts; then the smallest without, if it is hardly larger. Parts that are filled in
    // order have less than kMinHead tiles and an overhead unused, and a cut adds at most two overheads: the first lies
    // within `span` of the mean load. All are tried (packing: in steps), because a larger budget may move a cut and need
    // one part more.
    MLA_DEVICE Rule search(const Load& load) const {
        const i32 lowest_cut = max_i32(mean_load(load), kTileCost + params.split_overhead);
        const i32 span = kMinHead * kTileCost + 3 * params.split_overhead + params.merge_overhead;
        const Cutting cutting = is_packed(params, load.jobs) ? Cutting::kPacked : Cutting::kBudget;
        if (thread == 0) scratch.best_cut = kNoBudget;
        __syncthreads();
        if (cutting == Cutting::kPacked) {
            sort_jobs(load.jobs);
            try_packing(load.jobs, lowest_cut, span);
        } else {
            try_cutting(load.jobs, lowest_cut, span);
            __syncthreads();
        }
        const i32 best_cut = scratch.best_cut;
        const i32 lowest_whole = max_i32(mean_load(load), load.largest);
        const i32 highest_whole = best_cut + params.merge_overhead + best_cut / kWholeShare;
        const i32 best_whole = lowest_whole <= highest_whole
                                   ? smallest_whole(Cutting::kNone, load, lowest_whole, highest_whole)
                                   : kNoBudget;
        return best_whole != kNoBudget ? make_rule(Cutting::kNone, params, best_whole)
                                       : make_rule(cutting, params, best_cut);
    }

    MLA_DEVICE void try_cutting(i32 num_jobs, i32 lowest, i32 span) const {
#pragma unroll 1
        for (i32 above = thread; above <= span; above += kPlanThreads) {
            const Rule rule = make_rule(Cutting::kBudget, params, lowest + above);
            Fill fill{0, rule.budget};
#pragma unroll 4
            for (i32 job = 0; job < num_jobs; ++job) fill = place_job(rule, fill, table.tiles[job]);
            if (fill.part < params.num_parts) atomicMin(&scratch.best_cut, rule.budget);
        }
    }

    // Rounds of a few budgets, from the lowest up, dealt out to the warps in turn: threads of a warp that pack wait for
    // each other, and the smallest feasible budget is rarely far.
    MLA_DEVICE void try_packing(i32 num_jobs, i32 lowest, i32 span) const {
        constexpr i32 kWarps = kPlanThreads / kWarpThreads;
        constexpr i32 kRoundLanes = 4;
        const i32 lane = thread % kWarpThreads;
#pragma unroll 1
        for (i32 first = 0; first <= ceil_div(span, kPackedStep); first += kRoundLanes * kWarps) {
            if (lane < kRoundLanes) {
                const i32 step = first + lane * kWarps + thread / kWarpThreads;
                const Rule rule = make_rule(Cutting::kPacked, params, lowest + step * kPackedStep);
                const i32 parts = pack_jobs(rule, scratch.sorted, num_jobs, free_ranks(), params.num_parts,
                                            [](i32, i32, i32, i32) {});
                if (parts <= params.num_parts) atomicMin(&scratch.best_cut, rule.budget);
            }
            __syncthreads();
            const bool found = scratch.best_cut != kNoBudget;
            __syncthreads();  // all have read it before the next round lowers it
            if (found) return;
        }
    }

    MLA_DEVICE void sort_jobs(i32 num_jobs) const {
        SortedJobs& sorted = scratch.sorted;
#pragma unroll 1
        for (i32 job = thread; job < num_jobs; job += kPlanThreads) {
            const i32 tiles = table.tiles[job];
            i32 rank = 0;
#pragma unroll 4
            for (i32 other = 0; other < num_jobs; ++other) {
                rank += table.tiles[other] < tiles || (table.tiles[other] == tiles && other < job);
            }
            sorted.jobs[rank] = job;
            sorted.tiles[rank] = tiles;
        }
        __syncthreads();
#pragma unroll 1
        for (i32 tiles = thread; tiles < kTabledTiles; tiles += kPlanThreads) {
            sorted.up_to[tiles] = sorted.search_up_to(tiles, num_jobs);
        }
        __syncthreads();
    }

    // The smallest budget for pieces cut at fixed places. The highest is feasible: a part is closed only when it is
    // fuller than the mean.
    MLA_DEVICE Rule search_fixed(const Load& load) const {
        const i32 mean = mean_load(load);
        const i32 budget = smallest_whole(Cutting::kFixed, load, max_i32(mean, load.largest), mean + load.largest);
        return make_rule(Cutting::kFixed, params, budget);
    }

    // The smallest feasible budget from low to high for pieces that are not cut where budgets end; kNoBudget if there is
    // none. A larger budget never needs more parts here, so each round narrows the range kPlanThreads-fold.
    MLA_DEVICE i32 smallest_whole(Cutting cutting, const Load& load, i32 low, i32 high) const {
        if (thread == 0) scratch.best_whole = kNoBudget;
        __syncthreads();
        do {
            const i32 step = ceil_div(high - low, kPlanThreads - 1);
            const Rule rule = make_rule(cutting, params, min_i32(low + thread * step, high));
            Fill fill{0, rule.budget};
#pragma unroll 4
            for (i32 job = 0; job < load.jobs; ++job) fill = place_job(rule, fill, table.tiles[job]);
            if (fill.part < params.num_parts) atomicMin(&scratch.best_whole, rule.budget);
            __syncthreads();
            const i32 best = scratch.best_whole;
            __syncthreads();  // all have read it before the next round lowers it
            if (best == kNoBudget) return kNoBudget;
            high = best;
            low = max_i32(low, high - step + 1);
        } while (low < high);
        return high;
    }
};

}  // namespace mla
