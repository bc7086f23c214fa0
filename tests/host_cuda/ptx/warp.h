// Stands in for kernels_cu/ptx/warp.h on the CPU: what portable kernels use of it.
#pragma once
#include "core/types.h"

namespace mla {

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

}  // namespace mla
