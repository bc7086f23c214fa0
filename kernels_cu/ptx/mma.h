// mma.sync: D[16 x 8] += A[16 x 16] * B[16 x 8] by one warp, all in registers. PTX ISA, "mma".
#pragma once
#include "core/types.h"

namespace mla {

// fp16 operands, float32 sums. With g = lane / 4 and t = lane % 4: d is rows g and g + 8 of columns 2 t and 2 t + 1; a is pairs
// of columns 2 t of rows g and g + 8, then of columns 2 t + 8; b is pairs of rows 2 t and 2 t + 8 of column g.
MLA_DEVICE void mma_fp16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace mla
