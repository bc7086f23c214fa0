// The planner's steps, each done by all threads of one CTA and ended by a barrier:
// job table -> smallest budget that needs no more than num_parts parts -> pieces counted -> lists written.
// Only the walks over all jobs are unrolled, so that loads run ahead; unrolling the rest doubles the compile time.
#pragma once
#include "plan/search.h"

namespace mla {

// cupy_mla/schedule/make.py says why 48.
constexpr i32 kClaimTiles = 48;  // CTAs claim their parts if the fullest has so many

// A piece as it waits in the plan for the WorkItem that takes its place.
struct alignas(16) PackedPiece {
    i32 job, index;  // of the job's pieces
    i32 tile_begin, tile_end;
};
static_assert(sizeof(PackedPiece) <= sizeof(WorkItem), "it lies where the item will");

struct Planner {
    const PlanParams& params;
    const PlanInputs inputs;
    const JobTable table;
    PlanScratch& scratch;
    i32* const plan;
    const i32 thread;

    MLA_DEVICE void run() const {
        const Load load = inputs.cu_seqlens_q == nullptr ? make_uniform_jobs() : make_ragged_jobs();
        const BudgetSearch budgets{params, table, scratch, thread};
        const Rule rule = budgets.run(load);
        if (rule.cutting == Cutting::kPacked) {
            write_packed(rule, load.jobs, budgets.free_ranks());
        } else if (thread == 0) {
            assign_parts(rule, load.jobs);
        }
        __syncthreads();
        const Counts totals = number_pieces(rule, load.jobs);
#pragma unroll 1
        for (i32 item = thread; item < totals.items; item += kPlanThreads) {
            if (rule.cutting == Cutting::kPacked) {
                write_packed_item(item);
            } else {
                write_item(rule, load.jobs, item, totals.items);
            }
        }
#pragma unroll 1
        for (i32 part = scratch.parts_used + thread; part <= params.num_parts; part += kPlanThreads) {
            plan[kPlanPartBeginOffset + part] = totals.items;
        }
        if (thread == 0) {
            *reinterpret_cast<PlanHeader*>(plan) =
                PlanHeader{totals.items, totals.merges, totals.slots, rule.budget, load.jobs, claimed_parts(rule), 0,
                           params.shard};
        }
    }

    MLA_DEVICE Load job_load(i32 tiles) const {
        const i32 fixed_tiles = params.fixed_split_tiles;
        if (fixed_tiles == 0 || tiles <= fixed_tiles) {
            const i32 cost = tiles * kTileCost + params.piece_overhead;
            return {cost, cost, 1};
        }
        const i64 overhead = static_cast<i64>(ceil_div(tiles, fixed_tiles)) * params.split_overhead;
        return {static_cast<i64>(tiles) * kTileCost + overhead, fixed_tiles * kTileCost + params.split_overhead, 1};
    }

    // Every request has as many jobs as the next: one thread per job.
    MLA_DEVICE Load make_uniform_jobs() const {
        const i32 jobs_of_request = jobs_of_head(params, params.seqlen_q) * params.num_heads_kv;
        Load mine{0, 0, 0};
        for (i32 job = thread; job < params.batch * jobs_of_request; job += kPlanThreads) {
            const i32 index = job / jobs_of_request;
            const Request request = load_request(params, inputs, index);
            mine = mine.then(job_load(write_job(params, table, request, index, job - index * jobs_of_request, job)));
        }
        return scan_threads(scratch.loads, mine, thread)[kPlanThreads - 1];
    }

    // One thread per request, which first has to learn how many jobs come before its own.
    MLA_DEVICE Load make_ragged_jobs() const {
        const Share share(params.batch, thread);
        i32 jobs = 0;
#pragma unroll 1
        for (i32 index = share.begin; index < share.end; ++index) {
            const i32 of_request = jobs_of_head(params, load_request(params, inputs, index).seqlen_q) * params.num_heads_kv;
            jobs = min_i32(jobs + of_request, params.max_jobs);
        }
        i32 job = scan_threads(scratch.jobs_until, jobs, thread)[thread] - jobs;
        Load mine{0, 0, 0};
#pragma unroll 1
        for (i32 index = share.begin; index < share.end; ++index) {
            const Request request = load_request(params, inputs, index);
            const i32 jobs_of_request = jobs_of_head(params, request.seqlen_q) * params.num_heads_kv;
            // Offsets that do not rise can ask for more jobs than total_q has room for: those are left out.
            for (i32 i = 0; i < jobs_of_request && job < params.max_jobs; ++i, ++job) {
                mine = mine.then(job_load(write_job(params, table, request, index, i, job)));
            }
        }
        return scan_threads(scratch.loads, mine, thread)[kPlanThreads - 1];
    }

    // The pieces in the order of the parts, and how many each job has, in place of the part that it would meet.
    MLA_DEVICE void write_packed(const Rule& rule, i32 num_jobs, const FreeRanks& free) const {
#pragma unroll 1
        for (i32 job = thread; job < num_jobs; job += kPlanThreads) table.part[job] = 0;
        __syncthreads();
        if (thread > 0) return;
        i32 item = 0;
        i32 open_part = -1;
        scratch.parts_used = pack_jobs(rule, scratch.sorted, num_jobs, free, params.num_parts,
                                       [&](i32 part, i32 rank, i32 tile_begin, i32 tile_end) {
                                           const i32 job = scratch.sorted.jobs[rank];
                                           if (part != open_part) plan[kPlanPartBeginOffset + part] = item;
                                           open_part = part;
                                           *packed_piece(item++) = {job, table.part[job]++, tile_begin, tile_end};
                                       });
    }

    MLA_DEVICE PackedPiece* packed_piece(i32 item) const {
        return reinterpret_cast<PackedPiece*>(plan + plan_items_offset(params.num_parts) + item * kWorkItemInts);
    }

    MLA_DEVICE void write_packed_item(i32 item) const {
        const PackedPiece piece = *packed_piece(item);
        put_item(item, piece.job, piece.index, piece.tile_begin, piece.tile_end);
    }

    MLA_DEVICE void put_item(i32 item, i32 job, i32 index, i32 tile_begin, i32 tile_end) const {
        const Request request = load_request(params, inputs, table.request[job]);
        const i32 slot = table.slot_begin[job] == kWholeJob ? kWholeJob : table.slot_begin[job] + index;
        reinterpret_cast<WorkItem*>(plan + plan_items_offset(params.num_parts))[item] =
            WorkItem{table.request[job], table.head_block[job], tile_begin, tile_end,
                     params.shard == kWholeKeys ? request.seqlen_k : request.total_k, request.seqlen_q,
                     request.q_begin + request.first_list,  // one of them is 0
                     slot};
    }

    // One thread: each job's fill depends on the one before.
    MLA_DEVICE void assign_parts(const Rule& rule, i32 num_jobs) const {
        Fill fill{0, rule.budget};
        for (i32 job = 0; job < num_jobs; ++job) {
            table.part[job] = fill.part;
            table.left[job] = fill.left;
            fill = place_job(rule, fill, table.tiles[job]);
        }
        scratch.parts_used = num_jobs > 0 ? fill.part + 1 : 0;
    }

    MLA_DEVICE Counts count_job(const Rule& rule, i32 job) const {
        const i32 pieces = rule.cutting == Cutting::kPacked
                               ? table.part[job]
                               : count_pieces(rule, Fill{table.part[job], table.left[job]}, table.tiles[job]);
        return pieces > 1 ? Counts{pieces, pieces, 1} : Counts{1, 0, 0};
    }

    // Where each job's items and slots begin. Writes the merge list; returns the totals.
    MLA_DEVICE Counts number_pieces(const Rule& rule, i32 num_jobs) const {
        const Share share(num_jobs, thread);
        Counts mine{0, 0, 0};
#pragma unroll 1
        for (i32 job = share.begin; job < share.end; ++job) mine = mine.then(count_job(rule, job));
        const Counts* const until = scan_threads(scratch.counts, mine, thread);
        Counts before = thread == 0 ? Counts{0, 0, 0} : until[thread - 1];
#pragma unroll 1
        for (i32 job = share.begin; job < share.end; ++job) {
            const Counts of_job = count_job(rule, job);
            table.item_begin[job] = before.items;
            table.slot_begin[job] = of_job.merges > 0 ? before.slots : kWholeJob;
            if (of_job.merges > 0) write_merge(job, before.merges, before.slots, of_job.slots);
            before = before.then(of_job);
        }
        __syncthreads();
        return until[kPlanThreads - 1];
    }

    MLA_DEVICE void write_merge(i32 job, i32 merge, i32 slot_begin, i32 slot_count) const {
        const Request request = load_request(params, inputs, table.request[job]);
        reinterpret_cast<MergeItem*>(plan + params.merges_offset)[merge] =
            MergeItem{table.request[job], table.head_block[job], request.seqlen_q, request.q_begin,
                      slot_begin,         slot_count,            {0, 0}};
    }

    // Parts that have work, if there are others and it is long.
    MLA_DEVICE i32 claimed_parts(const Rule& rule) const {
        const bool claims = params.blocks_per_job == 1 && scratch.parts_used < params.num_parts &&
                            rule.budget >= kClaimTiles * kTileCost;
        return claims ? scratch.parts_used : 0;
    }

    // The last job that begins at or before this item.
    MLA_DEVICE i32 job_of_item(i32 num_jobs, i32 item) const {
        i32 first = 0;
        i32 end = num_jobs;
#pragma unroll 1
        while (end - first > 1) {
            const i32 middle = (first + end) / 2;
            (table.item_begin[middle] <= item ? first : end) = middle;
        }
        return first;
    }

    MLA_DEVICE void write_item(const Rule& rule, i32 num_jobs, i32 item, i32 num_items) const {
        const i32 job = job_of_item(num_jobs, item);
        const i32 begin = table.item_begin[job];
        const i32 index = item - begin;
        const i32 count = (job + 1 < num_jobs ? table.item_begin[job + 1] : num_items) - begin;
        const i32 tiles = table.tiles[job];
        const Fill fill{table.part[job], table.left[job]};
        const Piece piece = piece_at(rule, fill, tiles, count, index);
        // Nothing costs nothing, so only the very first job meets a part that is empty.
        const bool opens_part = index > 0 ? piece.part != piece_at(rule, fill, tiles, count, index - 1).part
                                          : piece.part != fill.part || job == 0;
        if (opens_part) plan[kPlanPartBeginOffset + piece.part] = item;
        put_item(item, job, index, piece.tile_begin, piece.tile_end);
    }
};

}  // namespace mla
