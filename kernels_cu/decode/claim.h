// Which part a CTA takes.
//
// Half of the SMs reach memory through one half of the chip, half through the other, and each half carries half of what HBM
// gives. Where a plan leaves CTAs without work (128 whole requests on 132 SMs), the busy ones must be as many in one half
// as in the other; else the fuller half ends last: 278 against 270 us at 128 x 8192 tokens x 16 heads. Which SM a CTA runs
// on is known only when it does. So CTAs claim: each counts itself among those of its half, and the count tells its part.
// The last ones of a half go without.
#pragma once
#include "core/claimed_part.h"
#include "decode/params.h"
#include "ptx/sm.h"

namespace mla {

constexpr u32 kClaimBytes = 8;  // of shared memory, for the part that is claimed: one word, and one unused

// Counts this CTA and returns its part. One thread of every CTA calls this once, before it lets the next kernel start:
// when that one claims, all of this launch have, and the count is back at 0.
template <class Params>
MLA_DEVICE i32 claim_part(const Params& params, i32 parts) {
    constexpr u32 kHalfShift = 16;
    const u32 sm = current_sm();
    const bool second = sm < kMaxSms && (params.second_half[sm / 32] >> (sm % 32) & 1);
    u32* const claims = &reinterpret_cast<PlanHeader*>(params.plan)->claims;
    const u32 before = atomicAdd(claims, second ? 1u << kHalfShift : 1u);
    const i32 second_before = before >> kHalfShift;
    const i32 first_before = before & ((1u << kHalfShift) - 1);
    if (first_before + second_before == params.num_parts - 1) {
        atomicExch(claims, 0);
        __threadfence();
    }
    const i32 second_parts = parts * params.second_half_share >> kHalfShareShift;
    const i32 half_parts = second ? second_parts : parts - second_parts;
    return claimed_part(second, half_parts, parts - half_parts, params.num_parts - parts,
                        second ? second_before : first_before, second ? first_before : second_before);
}

// The part of this CTA. All threads call this; kClaimBytes of shared memory at `slot` are its own.
template <class Params>
MLA_DEVICE i32 take_part(const Params& params, u8* slot) {
    i32 part = blockIdx.y;
    if (params.second_half_share > 0) {
        const i32 parts = plan_header(params.plan)->claimed_parts;
        if (parts > 0) {
            volatile i32* const claimed = reinterpret_cast<volatile i32*>(slot);
            if (threadIdx.x == 0) *claimed = claim_part(params, parts);
            __syncthreads();
            part = *claimed;
        }
    }
    return part;
}

}  // namespace mla
