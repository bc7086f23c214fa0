// Which shard of requests the cache has.
#pragma once
#include "core/plan_format.h"
#include "decode/fp8/params.h"
#include "ptx/warp.h"

namespace mla {

// As of every kernel (decode/work_item.h), but with the plan's address worked out anew each time: kept, it takes two registers
// that the kernel for 64 rows does not have.
MLA_DEVICE u32 shard_of(const Fp8Params& params) {
    i32 begin = 0;
    pin_register(begin);
    return plan_header(params.plan + begin)->shard;
}

}  // namespace mla
