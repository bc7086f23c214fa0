// Stands in for kernels_cu/ptx/copy_async.h on the CPU: what portable kernels use of it.
#pragma once
#include "core/types.h"

namespace mla {

inline void prefetch_to_l2(const void*) {}

}  // namespace mla
