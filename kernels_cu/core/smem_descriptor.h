// wgmma's matrix descriptors and the swizzles they name.
// PTX ISA, "Shared Memory Matrix Layout" and "Matrix Descriptor Format". Addresses and offsets are in units of 16 bytes.
#pragma once
#include "core/types.h"

namespace mla {

constexpr u32 kSwizzle128B = 1;
constexpr u32 kSwizzle64B = 2;
constexpr u32 kSwizzle32B = 3;

// A *box* is 64 rows of 64 16-bit values with the 128-byte swizzle: what one TMA box of a KV tile looks like.
constexpr u32 kBoxColumns = 64;
constexpr u32 kBoxRowBytes = kBoxColumns * 2;
constexpr u32 kBoxBytes = 64 * kBoxRowBytes;
constexpr u32 kAtomRows = 8;  // the 128-byte swizzle repeats every 8 rows
constexpr u32 kSwizzleAtomBytes = kAtomRows * kBoxRowBytes;

constexpr MLA_DEVICE u64 encode_descriptor(u32 leading_bytes, u32 stride_bytes, u32 swizzle) {
    return (static_cast<u64>(leading_bytes >> 4) << 16) | (static_cast<u64>(stride_bytes >> 4) << 32) |
           (static_cast<u64>(swizzle) << 62);
}

// K-major operand in boxes: one k16 step is 32 bytes further, one box of 64 columns kBoxBytes further. The leading
// offset is not used by a swizzled K-major operand.
constexpr u64 kBoxKMajor = encode_descriptor(16, kSwizzleAtomBytes, kSwizzle128B);

constexpr u32 kStepBytes = 16 * 2;  // one k16 step along a K-major row

// Descriptor arithmetic: the start address field takes an added byte offset without overflow within shared memory.
MLA_DEVICE u64 descriptor_at(u64 layout, u32 address) { return layout | static_cast<u64>((address & 0x3FFFF) >> 4); }
constexpr MLA_DEVICE u64 descriptor_offset(u32 bytes) { return bytes >> 4; }

// Byte offset of 16-byte chunk `chunk` (of 8) of row `row` in a box.
MLA_DEVICE u32 box_chunk_offset(u32 row, u32 chunk) { return row * kBoxRowBytes + ((chunk ^ (row & 7)) << 4); }

}  // namespace mla
