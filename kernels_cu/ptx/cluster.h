// Clusters: CTAs that run at the same time and can read each other's shared memory.
// PTX ISA, "Special Registers: %cluster_ctarank, %cluster_nctarank, %clusterid"; "barrier.cluster"; "mapa".
#pragma once
#include "core/types.h"

namespace mla {

MLA_DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
    return rank;
}

// CTAs of a cluster.
MLA_DEVICE u32 cluster_size() {
    u32 size;
    asm volatile("mov.u32 %0, %cluster_nctarank;" : "=r"(size));
    return size;
}

// Which cluster of the grid along x.
MLA_DEVICE u32 cluster_index() {
    u32 index;
    asm volatile("mov.u32 %0, %clusterid.x;" : "=r"(index));
    return index;
}

// All threads of all CTAs of the cluster, whole warps. What they have written is then visible to all of them.
MLA_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of the CTA of that rank.
template <class T>
MLA_DEVICE const T* in_cta(const T* shared, u32 rank) {
    u64 address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
    return reinterpret_cast<const T*>(address);
}

}  // namespace mla
