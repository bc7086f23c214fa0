// How jobs are cut into pieces and pieces put into parts: the arithmetic, for one job at a time and in closed form.
// cupy_mla/schedule/pieces.py says the same in words and steps; tests compare the two list by list.
#pragma once
#include "core/plan_format.h"
#include "plan/params.h"

namespace mla {

constexpr i32 kTileCost = 16;  // costs are integers in 1/16 tile, so that host and device agree to the bit
constexpr i32 kTileCostShift = 4;
static_assert(kTileCost == 1 << kTileCostShift, "one unit");

// cupy_mla/schedule/pieces.py says why.
constexpr i32 kMinHead = 4;
constexpr i32 kMinHeadShare = 4;

enum class Cutting {
    kNone,   // every job whole
    kBudget, // jobs in order; a job is cut where a part's budget ends
    kPacked, // jobs by length; packing.h
    kFixed,  // every job is cut every fixed_tiles tiles, wherever it lands
};

// The rule and its constants for one candidate budget.
struct Rule {
    Cutting cutting;
    i32 budget;          // of a part
    i32 piece_overhead;  // of a whole job
    i32 split_overhead;  // of a piece of a job; at least piece_overhead
    i32 fixed_tiles;
    i32 tiles_per_part;    // kBudget: tiles of one piece that fill a part
    i32 min_head;          // kBudget: fewer tiles are not cut off for the rest of a part
    i32 pieces_per_part;   // kFixed: pieces of fixed_tiles that fit a part

    MLA_DEVICE i32 whole_cost(i32 tiles) const { return tiles * kTileCost + piece_overhead; }
    MLA_DEVICE i32 split_cost(i32 tiles) const { return tiles * kTileCost + split_overhead; }
};

MLA_DEVICE Rule make_rule(Cutting cutting, const PlanParams& params, i32 budget) {
    Rule rule{cutting, budget, params.piece_overhead, params.split_overhead, params.fixed_split_tiles, 1, 0, 1};
    if (cutting == Cutting::kBudget || cutting == Cutting::kPacked) {
        rule.tiles_per_part = max_i32((budget - rule.split_overhead) >> kTileCostShift, 1);
        rule.min_head = min_i32(kMinHead, rule.tiles_per_part / kMinHeadShare);
    }
    if (cutting == Cutting::kFixed) rule.pieces_per_part = max_i32(budget / rule.split_cost(rule.fixed_tiles), 1);
    return rule;
}

// The part being filled, and what is left of its budget.
struct Fill {
    i32 part;
    i32 left;
};

// kBudget: tiles of the job that still go into the open part when the job does not fit it whole; 0 = none.
MLA_DEVICE i32 head_tiles(const Rule& rule, const Fill& fill) {
    const i32 tiles = max_i32((fill.left - rule.split_overhead) >> kTileCostShift, 0);
    return tiles < rule.min_head && fill.left < rule.budget ? 0 : tiles;
}

MLA_DEVICE Fill place_atom(const Rule& rule, Fill fill, i32 cost) {
    const bool fits = cost <= fill.left;
    return {fits ? fill.part : fill.part + 1, (fits ? fill.left : rule.budget) - cost};
}

// kFixed: the fill after `tiles` tiles of a longer job, in pieces of fixed_tiles and a shorter last one.
MLA_DEVICE Fill place_fixed(const Rule& rule, Fill fill, i32 tiles) {
    const i32 cost = rule.split_cost(rule.fixed_tiles);
    const i32 full = tiles / rule.fixed_tiles;
    const i32 head = min_i32(full, fill.left / cost);
    fill.left -= head * cost;
    if (full > head) {
        const i32 parts = ceil_div(full - head, rule.pieces_per_part);
        const i32 last = full - head - (parts - 1) * rule.pieces_per_part;
        fill = {fill.part + parts, rule.budget - last * cost};
    }
    const i32 rest = tiles - full * rule.fixed_tiles;
    return rest > 0 ? place_atom(rule, fill, rule.split_cost(rest)) : fill;
}

// The fill after a job of this many tiles.
MLA_DEVICE Fill place_job(const Rule& rule, const Fill& fill, i32 tiles) {
    const i32 whole = rule.whole_cost(tiles);
    if (rule.cutting == Cutting::kFixed && tiles > rule.fixed_tiles) return place_fixed(rule, fill, tiles);
    if (rule.cutting != Cutting::kBudget) return place_atom(rule, fill, whole);
    if (whole <= fill.left) return {fill.part, fill.left - whole};
    const i32 head = head_tiles(rule, fill);
    if (head == 0 && whole <= rule.budget) return {fill.part + 1, rule.budget - whole};
    const i32 rest = tiles - head;
    const i32 parts = rest <= rule.tiles_per_part ? 1 : ceil_div(rest, rule.tiles_per_part);
    const i32 last = rest - (parts - 1) * rule.tiles_per_part;
    return {fill.part + parts, rule.budget - rule.split_cost(last)};
}

// Pieces of a job that meets this fill.
MLA_DEVICE i32 count_pieces(const Rule& rule, const Fill& fill, i32 tiles) {
    if (rule.cutting == Cutting::kBudget) {
        const i32 whole = rule.whole_cost(tiles);
        if (whole <= fill.left) return 1;
        const i32 head = head_tiles(rule, fill);
        if (head == 0 && whole <= rule.budget) return 1;
        return (head > 0) + ceil_div(tiles - head, rule.tiles_per_part);
    }
    if (rule.cutting == Cutting::kFixed) return max_i32(ceil_div(tiles, rule.fixed_tiles), 1);
    return 1;
}

struct Piece {
    i32 tile_begin, tile_end;
    i32 part;
};

// Piece `index` of `count`.
MLA_DEVICE Piece piece_at(const Rule& rule, const Fill& fill, i32 tiles, i32 count, i32 index) {
    if (count == 1) return {0, tiles, fill.part + (rule.whole_cost(tiles) <= fill.left ? 0 : 1)};
    if (rule.cutting == Cutting::kBudget) {
        const i32 head = head_tiles(rule, fill);
        if (head > 0 && index == 0) return {0, head, fill.part};
        const i32 after_head = head > 0 ? index - 1 : index;
        const i32 begin = head + after_head * rule.tiles_per_part;
        return {begin, min_i32(begin + rule.tiles_per_part, tiles), fill.part + 1 + after_head};
    }
    const i32 begin = index * rule.fixed_tiles;
    const i32 end = min_i32(begin + rule.fixed_tiles, tiles);
    return {begin, end, place_fixed(rule, fill, end).part};
}

}  // namespace mla
