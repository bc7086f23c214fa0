// The merge of attention states: lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) * out_i.
// One warp merges some columns of one row, without shared memory. Its lanes form `groups` groups; group g reads states
// g, g + groups, ... and each lane of a group eight columns (an octet). Groups meet in a butterfly at the end.
// The order of every sum follows from the number of states alone: results depend neither on the grid nor on the batch.
#pragma once
#include "core/quad.h"
#include "core/softmax.h"
#include "ptx/convert.h"
#include "ptx/warp.h"

namespace mla {

constexpr i32 kOctet = 8;
constexpr i32 kWarpLanes = 32;
constexpr i32 kMaxGroups = 16;         // two lanes a group: 32 bytes of a state, one sector
constexpr i32 kStatesPerLane = 8;      // more groups only when a lane would read more states than this

MLA_DEVICE i32 state_groups(i32 num_states) {
    i32 groups = 1;
    while (groups < kMaxGroups && groups * kStatesPerLane < num_states) groups *= 2;
    return groups;
}

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

    MLA_DEVICE void add_to(f32 (&sums)[kOctet], f32 weight) const {
#pragma unroll
        for (i32 i = 0; i < kOctet; i += 2) {
            f32 first, second;
            get_pair(i, first, second);
            sums[i] += weight * first;
            sums[i + 1] += weight * second;
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

// States of one row: state i has its lse at lses[i * lse_stride] and the caller's octet at outs + i * out_stride bytes.
struct RowStates {
    const u8* outs;
    i64 out_stride;
    const f32* lses;
    i64 lse_stride;
    i32 count;
    bool aligned;
};

// What a lane has merged so far of its octet: sums of exp(lse_i - largest) and of the same times out_i.
struct PartialMerge {
    f32 largest;
    f32 weights;
    f32 sums[kOctet];

    // A lane that has seen nothing keeps largest = -inf; its zeros must not meet inf - inf.
    static MLA_DEVICE f32 reference_of(f32 largest) { return largest == minus_infinity() ? 0.0f : largest; }

    MLA_DEVICE void rebase(f32 new_largest) {
        const f32 keep = fast_exp2((largest - reference_of(new_largest)) * kLog2e);
        weights *= keep;
#pragma unroll
        for (i32 i = 0; i < kOctet; ++i) sums[i] *= keep;
        largest = new_largest;
    }

    // States first, first + step, ... (kBatch of them), all loads in flight at once. Past the end the last state is
    // loaded again and not counted: a load without a condition leaves the compiler free to issue it early.
    template <typename T, i32 kBatch>
    MLA_DEVICE void take(const RowStates& states, i32 first, i32 step) {
        f32 lses[kBatch];
        Octet<T> octets[kBatch];
#pragma unroll
        for (i32 i = 0; i < kBatch; ++i) {
            const i32 state = min_i32(first + i * step, states.count - 1);
            lses[i] = states.lses[state * states.lse_stride];
            octets[i].load(states.outs + state * states.out_stride, states.aligned);
        }
        f32 larger = largest;
#pragma unroll
        for (i32 i = 0; i < kBatch; ++i) {
            if (first + i * step >= states.count) lses[i] = minus_infinity();
            larger = fmaxf(larger, lses[i]);
        }
        rebase(larger);
        const f32 reference = reference_of(larger);
#pragma unroll
        for (i32 i = 0; i < kBatch; ++i) {
            if (lses[i] == minus_infinity()) continue;  // nothing seen: its octet may hold anything
            const f32 weight = fast_exp2((lses[i] - reference) * kLog2e);
            weights += weight;
            octets[i].add_to(sums, weight);
        }
    }

    // Merges lanes l, l + nearest, l + 2 * nearest, ...; all of them get the result. The two partners of a step add the
    // same two numbers, so they get the same bits.
    MLA_DEVICE void join_lanes(i32 nearest) {
        f32 larger = largest;
        for (i32 distance = nearest; distance < kWarpLanes; distance *= 2) {
            larger = fmaxf(larger, __shfl_xor_sync(kFullWarp, larger, distance));
        }
        rebase(larger);
        for (i32 distance = nearest; distance < kWarpLanes; distance *= 2) {
            weights += __shfl_xor_sync(kFullWarp, weights, distance);
#pragma unroll
            for (i32 i = 0; i < kOctet; ++i) sums[i] += __shfl_xor_sync(kFullWarp, sums[i], distance);
        }
    }
};

// All lanes of the warp call this with the same row; lanes with the same lane % (32 / groups) name the same octet.
// Every lane gets the merged octet of its columns and returns the row's lse.
template <typename T>
MLA_DEVICE f32 merge_octets(const RowStates& states, i32 lane, i32 groups, Octet<T>& merged) {
    // 128 bytes a lane in flight: enough to hide the latency, and within 96 registers.
    constexpr i32 kBatch = 16 / T::kBytes;
    const i32 group_lanes = kWarpLanes / groups;
    PartialMerge merge{minus_infinity(), 0.0f, {}};
    i32 done = 0;
    i32 batch = kBatch;
    for (; done < states.count; done += batch * groups) {
        const i32 first = done + lane / group_lanes;
        while (batch > 2 && states.count - done <= batch / 2 * groups) batch /= 2;
        if (batch == kBatch) {
            merge.take<T, kBatch>(states, first, groups);
        } else if (batch == 4) {
            merge.take<T, 4>(states, first, groups);
        } else {
            merge.take<T, 2>(states, first, groups);
        }
    }
    merge.join_lanes(group_lanes);
    const f32 scale = merge.weights == 0.0f ? 0.0f : 1.0f / merge.weights;
#pragma unroll
    for (i32 i = 0; i < kOctet; i += 2) merged.set_pair(i, merge.sums[i] * scale, merge.sums[i + 1] * scale);
    return merge.weights == 0.0f ? minus_infinity() : merge.largest + fast_log2(merge.weights) * kLn2;
}

// How rows are cut into chunks of columns, one warp each: as wide as keeps all CTAs busy.
struct RowChunks {
    i32 octets_of_chunk;  // a power of two
    i32 chunks_of_row;

    MLA_DEVICE RowChunks(i64 num_rows, i32 d_v) {
        constexpr i32 kMinOctets = 2;          // one 32-byte sector of 16-bit values
        constexpr i32 kEnoughWarpsOfCta = 8;   // that have work
        const i32 octets = d_v / kOctet;
        const i64 enough = static_cast<i64>(gridDim.x) * kEnoughWarpsOfCta;
        octets_of_chunk = kWarpLanes;
        while (octets_of_chunk > kMinOctets && num_rows * ceil_div(octets, octets_of_chunk) < enough) {
            octets_of_chunk /= 2;
        }
        chunks_of_row = ceil_div(octets, octets_of_chunk);
    }
};

// Where a merged row goes.
struct RowTarget {
    u8* out;
    f32* lse;
    bool aligned;
};

// Merges one chunk of a row and stores it; the row's first chunk stores the lse. `states.outs` points at the row's
// start. `target()` gives the RowTarget, asked for only when the loads are done: before, it would cost registers.
template <typename T, typename Target>
MLA_DEVICE void merge_chunk(RowStates states, const RowChunks& chunks, i32 chunk, i32 d_v, i32 lane, Target target) {
    constexpr i32 kOctetBytes = kOctet * T::kBytes;
    const i32 groups = state_groups(states.count);
    const i32 group_lanes = kWarpLanes / groups;
    const i32 end = min_i32((chunk + 1) * chunks.octets_of_chunk, d_v / kOctet);
    const u8* const row = states.outs;
    for (i32 first = chunk * chunks.octets_of_chunk; first < end; first += group_lanes) {
        const i32 octet = first + lane % group_lanes;
        states.outs = row + min_i32(octet, end - 1) * kOctetBytes;
        Octet<T> merged;
        const f32 merged_lse = merge_octets<T>(states, lane, groups, merged);
        if (octet >= end || lane >= group_lanes) continue;
        const RowTarget place = target();
        merged.store(place.out + octet * kOctetBytes, place.aligned);
        if (octet == 0) *place.lse = merged_lse;
    }
}

}  // namespace mla
