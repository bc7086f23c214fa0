// The merge of attention states: lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) * out_i.
// One warp merges some columns of one row, without shared memory. Its lanes form groups, a power of two of them; group g
// reads states g, g + groups, ... and each lane of a group eight columns (an octet), or twice eight where rows are many.
// Groups meet in a butterfly at the end.
// The order of every sum follows from the number of states alone: results depend neither on the grid nor on the batch. What is
// rounded by itself and what in an fma is said here, too: left to the compiler, it differed between one and two octets a lane.
#pragma once
#include "core/hopper.h"
#include "core/quad.h"
#include "core/softmax.h"
#include "ptx/convert.h"
#include "ptx/warp.h"

namespace mla {

constexpr i32 kOctet = 8;
constexpr i32 kWarpThreadsLog2 = 5;
static_assert(1 << kWarpThreadsLog2 == kWarpThreads, "divisions by it are shifts");
constexpr i32 kSectorBytes = 32;  // the least that a read of memory moves
template <typename T>
constexpr i32 kSectorOctets = kSectorBytes / (kOctet * T::kBytes);
constexpr i32 kLaneBytes = 128;  // that a lane loads at once: enough to hide the latency, and within 96 registers
template <typename T>
constexpr i32 kLaneOctets = kLaneBytes / (kOctet * T::kBytes);

// The groups of a warp. Numbers of lanes and groups are powers of two, so that all divisions are shifts: a merge is so
// short that real ones would be a good part of it.
struct LaneGroups {
    i32 log2;

    template <typename T>
    static MLA_DEVICE LaneGroups of(i32 num_states) {
        constexpr i32 kMaxGroups = kWarpThreads / kSectorOctets<T>;
        LaneGroups groups{0};
        // More groups only when a lane would have more states than it loads at once.
        while (groups.count() < kMaxGroups && groups.count() * kLaneOctets<T> < num_states) ++groups.log2;
        return groups;
    }

    MLA_DEVICE i32 count() const { return 1 << log2; }
    MLA_DEVICE i32 lanes() const { return kWarpThreads >> log2; }  // of a group
    MLA_DEVICE i32 group_of(i32 lane) const { return lane >> (kWarpThreadsLog2 - log2); }
    MLA_DEVICE i32 lane_in_group(i32 lane) const { return lane & (lanes() - 1); }
};

// Eight consecutive values as they lie in memory.
template <typename T>
struct Octet {
    static constexpr i32 kWords = kOctet * T::kBytes / 4;
    u32 words[kWords];

    // aligned: `address` is a multiple of 16, else only of the element size.
    MLA_DEVICE void load(const u8* address, bool aligned) {
        if (aligned) {
#pragma unroll
            for (i32 i = 0; i < kWords; i += 4) {
                const uint4 quad = *reinterpret_cast<const uint4*>(address + 4 * i);
                words[i] = quad.x, words[i + 1] = quad.y, words[i + 2] = quad.z, words[i + 3] = quad.w;
            }
        } else {
#pragma unroll
            for (i32 i = 0; i < kWords; ++i) {
                if (T::kBytes == 4) {
                    words[i] = *reinterpret_cast<const u32*>(address + 4 * i);
                } else {
                    const u16* const pair = reinterpret_cast<const u16*>(address + 4 * i);
                    words[i] = pair[0] | static_cast<u32>(pair[1]) << 16;
                }
            }
        }
    }

    MLA_DEVICE void store(u8* address, bool aligned) const {
        if (aligned) {
#pragma unroll
            for (i32 i = 0; i < kWords; i += 4) {
                *reinterpret_cast<uint4*>(address + 4 * i) = uint4{words[i], words[i + 1], words[i + 2], words[i + 3]};
            }
        } else {
#pragma unroll
            for (i32 i = 0; i < kWords; ++i) {
                if (T::kBytes == 4) {
                    *reinterpret_cast<u32*>(address + 4 * i) = words[i];
                } else {
                    u16* const pair = reinterpret_cast<u16*>(address + 4 * i);
                    pair[0] = static_cast<u16>(words[i]);
                    pair[1] = static_cast<u16>(words[i] >> 16);
                }
            }
        }
    }

    MLA_DEVICE void keep_if(bool condition) {
#pragma unroll
        for (i32 i = 0; i < kWords; ++i) words[i] = condition ? words[i] : 0;
    }

    MLA_DEVICE void add_to(f32 (&sums)[kOctet], f32 weight) const {
#pragma unroll
        for (i32 i = 0; i < kOctet; i += 2) {
            f32 first, second;
            get_pair(i, first, second);
            sums[i] = fmaf(weight, first, sums[i]);
            sums[i + 1] = fmaf(weight, second, sums[i + 1]);
        }
    }

    MLA_DEVICE void get_pair(i32 i, f32& first, f32& second) const {
        if constexpr (T::kBytes == 4) {
            first = __uint_as_float(words[i]);
            second = __uint_as_float(words[i + 1]);
        } else {
            unpack2<T>(words[i / 2], first, second);
        }
    }

    MLA_DEVICE void set_pair(i32 i, f32 first, f32 second) {
        if constexpr (T::kBytes == 4) {
            words[i] = __float_as_uint(first);
            words[i + 1] = __float_as_uint(second);
        } else {
            words[i / 2] = pack2<T>(first, second);
        }
    }
};

// States of one row: state i has its lse at lses[i * lse_stride] and the caller's octet at outs + i * out_stride bytes, its
// second one, if it has two, `second` bytes further.
struct RowStates {
    const u8* outs;
    i64 out_stride;
    const f32* lses;
    i64 lse_stride;
    i32 count;
    bool aligned;
    i32 second = 0;
    static constexpr bool kHasSink = false;
    // Called ahead of the first read of them.
    static MLA_DEVICE void wait() {}
    MLA_DEVICE const u8* out_of(i32 state) const { return outs + state * out_stride; }
    MLA_DEVICE f32 lse_of(i32 state) const { return lses[state * lse_stride]; }
    // Which octets of the row the caller's first and second are.
    MLA_DEVICE void select(i32, i32) {}
    // What says what the values of a state of that lse are to be multiplied by, here by nothing; and that factor of an octet.
    MLA_DEVICE u32 scales_of(i32, f32) const { return 0; }
    MLA_DEVICE f32 scale_of(u32, i32) const { return 1.0f; }
    static constexpr f32 kFactor = 1.0f;               // of merged values
    static constexpr i32 kPairOctets = kWarpThreads;  // the most from a lane's first octet to its second: a power of two
};

// The row has a sink, natural logarithm: one state more in the denominator, without output and not in the lse.
template <class States>
struct SinkStates : States {
    f32 sink;
    static constexpr bool kHasSink = true;
};

// What a lane has of states first, first + step, ... (kBatch of them), all loads in flight at once. Past the end the last state is
// loaded again and not counted: a load without a condition leaves the compiler free to issue it early.
template <typename T, i32 kBatch, i32 kOctets>
struct LoadedStates {
    f32 lses[kBatch];
    Octet<T> octets[kBatch][kOctets];

    template <typename States>
    MLA_DEVICE void load(const States& states, i32 first, i32 step) {
#pragma unroll
        for (i32 i = 0; i < kBatch; ++i) {
            const i32 state = min_i32(first + i * step, states.count - 1);
            lses[i] = states.lse_of(state);
#pragma unroll
            for (i32 j = 0; j < kOctets; ++j)
                octets[i][j].load(states.out_of(state) + j * states.second, states.aligned);
        }
    }
};

// What a lane has merged so far of its octets: sums of exp(lse_i - largest) and of the same times out_i.
template <i32 kOctets>
struct PartialMerge {
    f32 largest;
    f32 weights;
    f32 sums[kOctets][kOctet];

    // A lane that has seen nothing keeps largest = -inf; its zeros must not meet inf - inf.
    static MLA_DEVICE f32 reference_of(f32 largest) { return largest == minus_infinity() ? 0.0f : largest; }

    MLA_DEVICE void rebase(f32 new_largest) {
        const f32 keep = fast_exp2((largest - reference_of(new_largest)) * kLog2e);
        weights = __fmul_rn(weights, keep);
#pragma unroll
        for (i32 j = 0; j < kOctets; ++j) {
#pragma unroll
            for (i32 i = 0; i < kOctet; ++i) sums[j][i] = __fmul_rn(sums[j][i], keep);
        }
        largest = new_largest;
    }

    template <typename T, i32 kBatch, typename States>
    MLA_DEVICE void take(const States& states, i32 first, i32 step) {
        LoadedStates<T, kBatch, kOctets> loaded;
        states.wait();
        loaded.load(states, first, step);
        add(states, loaded, first, step);
    }

    template <typename T, i32 kBatch, typename States>
    MLA_DEVICE void add(const States& states, LoadedStates<T, kBatch, kOctets>& loaded, i32 first, i32 step) {
        auto& lses = loaded.lses;
        auto& octets = loaded.octets;
#pragma unroll
        for (i32 i = 0; i < kBatch; ++i) {
            if (first + i * step >= states.count) lses[i] = minus_infinity();
        }
        // In groups of one size, however many were loaded: the roundings must not depend on it.
        constexpr i32 kGroup = kLaneOctets<T> / 2;
#pragma unroll
        for (i32 begin = 0; begin < kBatch; begin += kGroup) {
            f32 larger = largest;
#pragma unroll
            for (i32 i = begin; i < begin + kGroup && i < kBatch; ++i) larger = fmaxf(larger, lses[i]);
            rebase(larger);
            const f32 reference = reference_of(larger);
#pragma unroll
            for (i32 i = begin; i < begin + kGroup && i < kBatch; ++i) {
                // A state that has seen nothing has weight 0, but may hold NaN. No branch: the loads behind it would start
                // only when lse is there.
                const bool seen = lses[i] != minus_infinity();
                const f32 weight = fast_exp2((lses[i] - reference) * kLog2e);
                weights += weight;
                const u32 scales = states.scales_of(first + i * step, lses[i]);
#pragma unroll
                for (i32 j = 0; j < kOctets; ++j) {
                    octets[i][j].keep_if(seen);
                    octets[i][j].add_to(sums[j], weight * states.scale_of(scales, j));
                }
            }
        }
    }

    // Merges lanes l, l + nearest, l + 2 * nearest, ...; all of them get the result. The two partners of a step add the
    // same two numbers, so they get the same bits.
    MLA_DEVICE void join_lanes(i32 nearest) {
        f32 larger = largest;
        for (i32 distance = nearest; distance < kWarpThreads; distance *= 2) {
            larger = fmaxf(larger, __shfl_xor_sync(kFullWarp, larger, distance));
        }
        rebase(larger);
        for (i32 distance = nearest; distance < kWarpThreads; distance *= 2) {
            weights += __shfl_xor_sync(kFullWarp, weights, distance);
#pragma unroll
            for (i32 j = 0; j < kOctets; ++j) {
#pragma unroll
                for (i32 i = 0; i < kOctet; ++i) sums[j][i] += __shfl_xor_sync(kFullWarp, sums[j][i], distance);
            }
        }
    }
};

// The octets of what all lanes of a row have merged, and the row's lse.
template <typename Out, i32 kOctets, typename States>
MLA_DEVICE f32 finish_merge(const States& states, const PartialMerge<kOctets>& merge, Octet<Out> (&merged)[kOctets]) {
    f32 denominator = merge.weights;
    if constexpr (States::kHasSink) denominator += fast_exp2((states.sink - merge.largest) * kLog2e);
    const f32 scale = merge.weights == 0.0f ? 0.0f : fast_reciprocal(denominator) * States::kFactor;
#pragma unroll
    for (i32 j = 0; j < kOctets; ++j) {
#pragma unroll
        for (i32 i = 0; i < kOctet; i += 2) merged[j].set_pair(i, merge.sums[j][i] * scale, merge.sums[j][i + 1] * scale);
    }
    return merge.weights == 0.0f ? minus_infinity() : fmaf(fast_log2(merge.weights), kLn2, merge.largest);
}

// All lanes of the warp call this with the same row; lanes with the same place in their groups name the same octets.
// Every lane gets the merged octets of its columns, in type Out, and returns the row's lse.
template <typename T, typename Out, i32 kOctets, typename States>
MLA_DEVICE f32 merge_octets(const States& states, i32 lane, LaneGroups groups, Octet<Out> (&merged)[kOctets]) {
    constexpr i32 kBatch = kLaneOctets<T> / kOctets;
    PartialMerge<kOctets> merge{minus_infinity(), 0.0f, {}};
    i32 done = 0;
    i32 batch = kBatch;
    for (; done < states.count; done += batch << groups.log2) {
        const i32 first = done + groups.group_of(lane);
        while (batch > 2 && states.count - done <= batch / 2 << groups.log2) batch /= 2;
        if (batch == kBatch) {
            merge.template take<T, kBatch>(states, first, groups.count());
        } else if (batch == 4) {
            merge.template take<T, 4>(states, first, groups.count());
        } else {
            merge.template take<T, 2>(states, first, groups.count());
        }
    }
    merge.join_lanes(groups.lanes());
    return finish_merge<Out>(states, merge, merged);
}

// How rows are cut into chunks of columns, one warp each: as narrow as lets every warp do with one chunk.
struct RowChunks {
    i32 octets_of_chunk;  // a power of two
    i32 chunks_of_row;

    MLA_DEVICE RowChunks(i32 octets_of_chunk, i32 d_v)
        : octets_of_chunk(octets_of_chunk), chunks_of_row(ceil_div(d_v / kOctet, octets_of_chunk)) {}

    MLA_DEVICE RowChunks(i64 num_rows, i32 d_v, i64 num_warps, i32 min_octets) {
        const i32 octets = d_v / kOctet;
        octets_of_chunk = 2 * kWarpThreads;
        while (octets_of_chunk > min_octets && num_rows * ceil_div(octets, octets_of_chunk / 2) <= num_warps) {
            octets_of_chunk /= 2;
        }
        chunks_of_row = ceil_div(octets, octets_of_chunk);
    }
};

// Where a merged row goes: its octets, and with each of them its lse.
struct RowTarget {
    u8* out;
    f32* lse;
    bool aligned;
    f32 empty_lse;  // instead of -inf

    template <typename Out>
    MLA_DEVICE void store(i32 octet, const Octet<Out>& values) const {
        values.store(out + octet * (kOctet * Out::kBytes), aligned);
    }

    MLA_DEVICE void store_lse(i32 octet, f32 value) const {
        if (octet == 0) *lse = value == minus_infinity() ? empty_lse : value;
    }
};

// Merges the octets first, first + 1, ... of a row (as many as kOctets times the lanes of a group; those from `end` on are
// left out) and stores them.
template <typename T, typename Out, i32 kOctets, typename States, typename Target>
MLA_DEVICE void merge_columns(States states, i32 first, i32 end, i32 lane, LaneGroups groups, Target& target) {
    constexpr i32 kOctetBytes = kOctet * T::kBytes;
    i32 octet = first + groups.lane_in_group(lane);
    i32 distance = groups.lanes();
    if constexpr (kOctets > 1 && States::kPairOctets < kWarpThreads) {
        octet += groups.lane_in_group(lane) & -States::kPairOctets;
        distance = min_i32(distance, States::kPairOctets);
    }
    const i32 loaded = min_i32(octet, end - 1);
    states.outs += loaded * kOctetBytes;
    const i32 second = min_i32(octet + distance, end - 1);
    states.second = (second - loaded) * kOctetBytes;
    states.select(loaded, second);
    Octet<Out> merged[kOctets];
    const f32 lse = merge_octets<T, Out, kOctets>(states, lane, groups, merged);
    if (octet >= end || lane >= groups.lanes()) return;
    const auto place = target();
    place.store(octet, merged[0]);
    if (kOctets > 1 && octet + distance < end) place.store(octet + distance, merged[kOctets - 1]);
    place.store_lse(octet, lse);
}

// Merges one chunk of a row of T and stores it as Out. `states.outs` points at the row's start. `target()` gives a RowTarget or
// what has the same members, asked for only when the loads are done: before, it would cost registers.
template <typename T, typename Out, typename States, typename Target>
MLA_DEVICE void merge_chunk(const States& states, const RowChunks& chunks, i32 chunk, i32 d_v, i32 lane, Target target) {
    const LaneGroups groups = LaneGroups::of<T>(states.count);
    const i32 end = min_i32((chunk + 1) * chunks.octets_of_chunk, d_v / kOctet);
    i32 first = chunk * chunks.octets_of_chunk;
    for (; end - first > groups.lanes(); first += 2 * groups.lanes())
        merge_columns<T, Out, 2>(states, first, end, lane, groups, target);
    if (first < end) merge_columns<T, Out, 1>(states, first, end, lane, groups, target);
}

}  // namespace mla
