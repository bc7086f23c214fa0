// Jobs packed into parts: the longest that is left first, then the longest that still fit, and what then remains of the part
// filled from one job that is cut. cupy_mla/schedule/pieces.py, _pack, says the same; tests compare the two list by list.
#pragma once
#include "plan/pieces.h"

namespace mla {

// cupy_mla/schedule/pieces.py says why.
constexpr i32 kMaxPackedJobs = 256;
constexpr i32 kPackedPartsPerJob = 2;
constexpr i32 kPackedStep = kTileCost / 4;
constexpr i32 kTabledTiles = 1024;

MLA_DEVICE bool is_packed(const PlanParams& params, i32 jobs) {
    return params.packs && jobs <= kMaxPackedJobs && jobs * kPackedPartsPerJob >= params.num_parts;
}

// Jobs by their tiles, and among equals by their number: the rank of a job is its place in this order.
struct SortedJobs {
    i32 jobs[kMaxPackedJobs];   // by rank
    i32 tiles[kMaxPackedJobs];  // by rank
    i32 up_to[kTabledTiles];    // how many jobs have at most so many tiles

    // How many jobs have at most so many tiles: they come first. Without the table: `search_up_to`.
    MLA_DEVICE i32 count_up_to(i32 most_tiles, i32 count) const {
        if (most_tiles < 0) return 0;
        return most_tiles < kTabledTiles ? up_to[most_tiles] : search_up_to(most_tiles, count);
    }

    MLA_DEVICE i32 search_up_to(i32 most_tiles, i32 count) const {
        i32 begin = 0;
        i32 end = count;
        while (begin < end) {
            const i32 middle = (begin + end) / 2;
            if (tiles[middle] <= most_tiles) {
                begin = middle + 1;
            } else {
                end = middle;
            }
        }
        return begin;
    }
};

// A bit for each rank whose job has no part yet. Words of several threads alternate in memory.
struct FreeRanks {
    u32* words;
    i32 stride;

    MLA_DEVICE void fill(i32 count) const {
        for (i32 word = 0; word * kWordBits < count; ++word) {
            const i32 bits = count - word * kWordBits;
            words[word * stride] = bits >= kWordBits ? ~0u : (1u << bits) - 1;
        }
    }

    MLA_DEVICE void take(i32 rank) const { words[word_of(rank) * stride] &= ~(1u << bit_of(rank)); }

    // The highest one below `end`, or -1.
    MLA_DEVICE i32 highest_below(i32 end) const {
        if (end <= 0) return -1;
        i32 word = word_of(end - 1);
        u32 bits = words[word * stride] & ~0u >> (kWordBits - 1 - bit_of(end - 1));
        while (bits == 0 && word > 0) bits = words[--word * stride];
        return bits == 0 ? -1 : word * kWordBits + kWordBits - 1 - __clz(bits);
    }

    static constexpr i32 kWordBits = 32;
    // Unsigned: one instruction each.
    static MLA_DEVICE i32 word_of(i32 rank) { return static_cast<u32>(rank) / kWordBits; }
    static MLA_DEVICE i32 bit_of(i32 rank) { return static_cast<u32>(rank) % kWordBits; }
};

// Packs all jobs into parts; calls put(part, rank, tile_begin, tile_end) for each piece, parts in order. Returns how many
// parts it took, or max_parts + 1 when these do not suffice.
template <class Put>
MLA_DEVICE i32 pack_jobs(const Rule& rule, const SortedJobs& jobs, i32 count, const FreeRanks& free, i32 max_parts,
                         Put put) {
    free.fill(count);
    i32 end = count;  // all ranks from here on have a part
    i32 open = -1;    // the rank of the job that is being cut, and how many of its tiles have a part
    i32 done = 0;
    const auto open_job = [&](i32 rank) {
        free.take(rank);
        open = rank;
        done = 0;
    };
    for (i32 part = 0;; ++part) {
        const i32 longest = free.highest_below(end);
        if (longest < 0 && open < 0) return part;
        end = longest + 1;
        if (part == max_parts) return max_parts + 1;
        i32 left = rule.budget;
        const auto put_whole = [&](i32 rank) {
            const i32 tiles = jobs.tiles[rank];
            free.take(rank);
            put(part, rank, 0, tiles);
            left -= rule.whole_cost(tiles);
        };
        const auto put_cut = [&](i32 most_tiles) {
            const i32 tiles = min_i32(most_tiles, jobs.tiles[open] - done);
            put(part, open, done, done + tiles);
            left -= rule.split_cost(tiles);
            done += tiles;
            if (done == jobs.tiles[open]) open = -1;
        };
        if (open < 0 && rule.whole_cost(jobs.tiles[longest]) > rule.budget) open_job(longest);
        if (open >= 0) {
            put_cut(rule.tiles_per_part);
        } else {
            put_whole(longest);
        }
        while (left >= rule.piece_overhead) {
            const i32 fitting = jobs.count_up_to((left - rule.piece_overhead) >> kTileCostShift, count);
            const i32 rank = free.highest_below(min_i32(fitting, end));
            if (rank < 0) break;
            put_whole(rank);
        }
        const i32 rest = (left - rule.split_overhead) >> kTileCostShift;
        if (rest < max_i32(rule.min_head, 1)) continue;
        if (open < 0) {
            const i32 rank = free.highest_below(end);
            if (rank >= 0) open_job(rank);
        }
        if (open >= 0) put_cut(rest);
    }
}

}  // namespace mla
