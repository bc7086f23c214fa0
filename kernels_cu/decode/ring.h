// A ring of stages: every role walks the same sequence of tiles, each in the next stage.
#pragma once
#include "core/types.h"

namespace mla {

template <u32 kCount>
struct RingOf {
    u32 stage = 0;
    u32 parity = 0;  // of the lap, as barriers of the stage have it

    MLA_DEVICE void advance() {
        if constexpr (kCount == 2) {
            parity ^= stage;
            stage ^= 1;
        } else if (++stage == kCount) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace mla
