// Token numbers of requests to slots of a paged cache, one thread each.
#include "cache/slots.h"

// grid: blocks_per_row for each row.
extern "C" __global__ void mla_slots(const __grid_constant__ mla::SlotsParams params) {
    using namespace mla;
    const i32 row = static_cast<i32>(blockIdx.x) / params.blocks_per_row;
    const i64 column = static_cast<i64>(static_cast<i32>(blockIdx.x) - row * params.blocks_per_row) * blockDim.x + threadIdx.x;
    if (column >= params.row_tokens) return;
    const i64 place = row * params.row_tokens + column;
    const i32 request = params.requests == nullptr ? row : params.requests[row];
    params.slots[place] = slot_of(params, request, params.tokens[place]);
}
