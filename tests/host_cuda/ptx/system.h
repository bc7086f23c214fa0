// Stands in for kernels_cu/ptx/system.h on the CPU, where kernels run one after the other: nobody comes while one waits.
#pragma once
#include "core/types.h"

namespace mla {

inline void fence_system() {}
inline void store_release_system(u32* address, u32 value) { *address = value; }
inline u32 load_acquire_system(const u32* address) { return *address; }

}  // namespace mla
