// What the kernels that hand out and merge results are given.
#pragma once
#include "exchange/meetings.h"

namespace mla {

// Rows are [size0, size1, heads]: (batch, token, head), or of ragged queries (0, token, head). T is the kernel's type.
// Strides in elements. cupy_mla/kernels/structs.py mirrors it; a test compares the two.
struct PushMergeParams {
    const u8* outs;     // T [size0, size1, world * heads, d_v]: of all heads, over this rank's tokens. Null: they were stored
                        // with the ranks of their heads already, and lses are not looked at
    const f32* lses;    // [size0, world * heads, size1]
    i64 received_outs;  // bytes from the start of a rank's memory: T [places, world, rows, d_v], by the rank that sent it
    i64 received_lses;  // f32 [places, world, rows]
    u8* out;            // T [size0, size1, heads, d_v]
    i64 out_stride0, out_stride1, out_stride2;
    f32* lse;  // [size0, size1, heads]
    i64 lse_stride0, lse_stride1, lse_stride2;
    // Bytes from the start of a rank's memory: [places, world, rows, packets of a row], by the rank that sent them. 0: none.
    i64 packets;
    i32 size0, size1, heads;
    i32 d_v;      // a multiple of 8
    i32 places;   // that calls take in turn
    i32 aligned;  // 1: every row of out begins at a multiple of 16 bytes
    Meetings meetings;

    MLA_DEVICE i64 rows() const { return static_cast<i64>(size0) * size1 * heads; }

    // What a rank finds in its memory of a row of another's: so many packets, the lse's last.
    MLA_DEVICE Packet* packets_of(i32 in, i32 of, u32 place, i64 row, i32 parts) const {
        const i64 row_of_all = (static_cast<i64>(place) * meetings.world + of) * rows() + row;
        return reinterpret_cast<Packet*>(meetings.memory_of(in) + packets) + row_of_all * parts;
    }
};

static_assert(sizeof(PushMergeParams) == 13 * sizeof(i64) + 6 * sizeof(i32) + sizeof(Meetings), "no padding");

}  // namespace mla
