// Copies pages of a cache, within it or from another one, whatever their values mean: bytes move as they are.
#include "core/types.h"

namespace mla {

using Unit = MLA_UNIT;  // of 16, 8, 4, 2 or 1 bytes: what addresses and strides are multiples of

// Units a thread has in flight: all loads before all stores, as the compiler cannot know that the two sides do not overlap.
constexpr i32 kUnitsInFlight = 4;

// Strides in bytes.
struct PagesSide {
    u8* pages;           // [num_pages, page_size, num_heads_kv, bytes]
    const i32* numbers;  // [num_copies] page of each copy; null: 0, 1, 2, ...
    i64 page_stride;
    i64 token_stride;
    i64 head_stride;
    i32 num_pages;
    i32 reserved;
};

struct CopyPagesParams {
    PagesSide source;
    PagesSide target;
    i32 num_heads_kv;
    i32 row_units;   // of a head of a token; of a page without gaps on both sides all of them, as those of one row
    i32 page_units;
    i32 blocks_per_page;
};

// cupy_mla/kernels/structs.py mirrors it; a test compares the sizes.
static_assert(sizeof(CopyPagesParams) == 112, "CopyPagesParams is packed by the host");

// The page of a copy on one side; null for a number outside of it.
MLA_DEVICE u8* find_page(const PagesSide& side, i32 copy) {
    const i32 number = side.numbers == nullptr ? copy : side.numbers[copy];
    return number >= 0 && number < side.num_pages ? side.pages + number * side.page_stride : nullptr;
}

MLA_DEVICE i64 byte_of(const PagesSide& side, i32 token, i32 head, i32 in_row) {
    return token * side.token_stride + head * side.head_stride + static_cast<i64>(in_row) * static_cast<i64>(sizeof(Unit));
}

}  // namespace mla

// Grid: blocks_per_page for each copy.
extern "C" __global__ void mla_copy_pages(const __grid_constant__ mla::CopyPagesParams params) {
    using namespace mla;
    const i32 copy = static_cast<i32>(blockIdx.x) / params.blocks_per_page;
    const i32 block = static_cast<i32>(blockIdx.x) - copy * params.blocks_per_page;
    const u8* source = find_page(params.source, copy);
    u8* target = find_page(params.target, copy);
    if (source == nullptr || target == nullptr) return;

    const i32 first = block * static_cast<i32>(blockDim.x) * kUnitsInFlight + static_cast<i32>(threadIdx.x);
    const bool one_row = params.row_units == params.page_units;
    Unit values[kUnitsInFlight];
    i64 places[kUnitsInFlight];
#pragma unroll
    for (i32 i = 0; i < kUnitsInFlight; ++i) {
        const i32 unit = first + i * static_cast<i32>(blockDim.x);
        if (unit >= params.page_units) continue;
        const i32 row = one_row ? 0 : unit / params.row_units;
        const i32 token = one_row ? 0 : row / params.num_heads_kv;
        const i32 head = row - token * params.num_heads_kv;
        const i32 in_row = unit - row * params.row_units;
        values[i] = *reinterpret_cast<const Unit*>(source + byte_of(params.source, token, head, in_row));
        places[i] = byte_of(params.target, token, head, in_row);
    }
#pragma unroll
    for (i32 i = 0; i < kUnitsInFlight; ++i) {
        const i32 unit = first + i * static_cast<i32>(blockDim.x);
        if (unit < params.page_units) *reinterpret_cast<Unit*>(target + places[i]) = values[i];
    }
}
