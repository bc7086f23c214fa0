// Dense MLA decode over an e4m3 cache for 64 query rows a CTA, exactly, S^T = K Q^T; kernels_cu/DESIGN.md tells the schedule.
#include "decode/fp8/roles.h"
#include "decode/fp8/wide_exact_scores.h"

extern "C" __global__ void __launch_bounds__(mla::kThreads, 1)
mla_decode_fp8_wide_exact(const __grid_constant__ mla::TensorMap kv_latent, const __grid_constant__ mla::TensorMap kv_rope,
                          const __grid_constant__ mla::Fp8Params params) {
    extern __shared__ __align__(1024) mla::u8 shared[];
    mla::run_fp8_roles<mla::WideExactScoresRole>(&kv_latent, &kv_rope, params, shared);
}
