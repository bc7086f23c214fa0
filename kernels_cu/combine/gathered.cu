// The same as combine.cu after a kernel of gathered tokens: every query token is a request of its own, and there may be sinks.
#include "combine/jobs.h"

extern "C" __global__ void __maxnreg__(mla::kRegisters)
mla_combine_gathered(const __grid_constant__ mla::GatherCombineParams params) {
    mla::merge_jobs(params);
}
