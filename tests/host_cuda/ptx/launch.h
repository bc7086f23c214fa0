// Stands in for kernels_cu/ptx/launch.h on the CPU, where kernels run one after the other.
#pragma once
#include "core/types.h"

namespace mla {

inline void pdl_wait() {}
inline void pdl_launch_dependents() {}

}  // namespace mla
