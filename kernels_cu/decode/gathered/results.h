// What rows of gathered tokens are asked for besides their output and lse: a sink in the softmax's denominator, and the largest
// score.
#pragma once
#include "core/softmax.h"
#include "decode/gathered/work.h"
#include "decode/wide/row_places.h"
#include "ptx/warp.h"

namespace mla {

class SinkAndLargest {
public:
    // A tile's largest score of one of this thread's two rows, log2 units.
    MLA_DEVICE void see(int half, float tile_maximum) {
        if (!kIsPlanned) largest_[half] = fmaxf(largest_[half], tile_maximum);
    }

    // All lanes, where what was seen was a thread's own: the largest of a row is then known in all of its quad.
    MLA_DEVICE void finish() {
        if (kIsPlanned) return;
        largest_[0] = quad_max(largest_[0]);
        largest_[1] = quad_max(largest_[1]);
    }

    // Of this thread's two rows. A sink counts like one more score, of a key without value.
    struct Sinks {
        float of[2];

        // The factor of a row of so large a sum. An exact division would take more registers than there are.
        MLA_DEVICE float normalise(int half, float sum, float maximum) const {
            return fast_reciprocal(sum + fast_exp2(fmaf(of[half], kLog2e, -maximum)));
        }
    };

    // The sinks are wanted in the last tile only. Those of a cut job are the merge's business.
    static MLA_DEVICE Sinks load_sinks(const GatherParams& params, bool is_last, i32 item, u32 row) {
        Sinks sinks{minus_infinity(), minus_infinity()};
        if (!is_last || params.attn_sink == nullptr) return sinks;
        const BlockWork work = load_block_work(params, item);
        if (work.is_partial()) return sinks;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const RowPlace place = locate_row(params, work, row_at(work, row + half * 8));
            if (place.exists) sinks.of[half] = __ldg(params.attn_sink + place.head);
        }
        return sinks;
    }

    // Of a row that exists.
    MLA_DEVICE void store(const GatherParams& params, const BlockWork& work, i32 row_in_block, int half) const {
        if (kIsPlanned || params.max_logits == nullptr) return;
        *max_logit(params, work, row_in_block) = largest_[half] * kLn2;
    }

private:
    float largest_[2] = {minus_infinity(), minus_infinity()};
};

}  // namespace mla
