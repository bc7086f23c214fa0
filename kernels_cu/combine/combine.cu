// Merges the partial results of jobs that the plan cut into pieces. Leaves at once when it cut none.
#include "combine/jobs.h"

extern "C" __global__ void __maxnreg__(mla::kRegisters)
mla_combine(const __grid_constant__ mla::CombineParams params) {
    mla::merge_jobs(params);
}
