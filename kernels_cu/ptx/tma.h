// TMA, the tensor memory accelerator: loads from global to shared memory, of tiles through a tensor map or of plain bytes.
// PTX ISA, "cp.async.bulk.tensor", "cp.async.bulk".
#pragma once
#include "core/types.h"

namespace mla {

// CUtensorMap, opaque here: 128 bytes encoded by the host with cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
    u64 words[16];
};
static_assert(sizeof(TensorMap) == 128, "the driver's CUtensorMap has 128 bytes");

MLA_DEVICE void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Coordinates in elements of the map's dimensions, innermost first. Parts outside the tensor are filled with zeros and
// count as bytes written.
MLA_DEVICE void tma_load_5d(u32 destination, const TensorMap* map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// Addresses and size are multiples of 16 bytes. The bytes count at the barrier when they are there.
MLA_DEVICE void tma_load_bytes(u32 destination, const void* source, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
                 "l"(source), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The other way, from shared memory. Addresses and size are multiples of 16 bytes.
MLA_DEVICE void tma_store_bytes(void* destination, u32 source, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
                 : "memory");
}

// Until all that this thread has asked to store has been read from shared memory.
MLA_DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// A hint: brings to L2 what tma_load_bytes would load.
MLA_DEVICE void tma_prefetch_bytes(const void* source, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// A hint: brings to L2 what tma_load_5d would load.
MLA_DEVICE void tma_prefetch_5d(const TensorMap* map, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(c0), "r"(c1),
                 "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

}  // namespace mla
