// Dense MLA decode over an e4m3 cache for 16 or 32 query rows a CTA, S^T = K Q^T; kernels_cu/DESIGN.md tells the schedule.
#include "decode/fp8/roles.h"
#include "decode/fp8/scores.h"
#include "decode/fp8/turn_scores.h"

namespace mla {

template <bool kTurns>
struct ScoresOf {
    using Type = ScoresRole;
};
template <>
struct ScoresOf<true> {
    using Type = TurnScoresRole;
};

}  // namespace mla

extern "C" __global__ void __maxnreg__(mla::kEntryRegisters)
mla_decode_fp8(const __grid_constant__ mla::TensorMap kv_latent, const __grid_constant__ mla::TensorMap kv_rope,
               const __grid_constant__ mla::Fp8Params params) {
    extern __shared__ __align__(1024) mla::u8 shared[];
    mla::run_fp8_roles<mla::ScoresOf<mla::kTakesTurns>::Type>(&kv_latent, &kv_rope, params, shared);
}
