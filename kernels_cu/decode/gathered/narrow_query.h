// Queries of the narrow kernels for 16-bit gathered tokens: on their way to shared memory, and multiplied by a tile.
#pragma once
#include "decode/gathered/narrow_smem.h"
#include "decode/rows.h"
#include "ptx/copy_async.h"

namespace mla {

// Eight values of a row of Q from each 64 columns, asked for. A row that does not exist is zeros.
MLA_DEVICE void copy_query_chunks(const GatherParams& params, const BlockWork& work, u32 smem, u32 row_in_block, u32 chunk) {
    const QueryRow row = query_row(params, work, row_in_block, chunk * kChunkColumns);
    const u32 destination = smem + Smem::query + box_chunk_offset(row_in_block, chunk);
    const u32 bytes = row.exists ? 16 : 0;
#pragma unroll
    for (u32 box = 0; box < kTileBoxes; ++box)
        copy_async_16b<false>(destination + box * kRowBoxBytes,
                              box < kLatentBoxes ? row.latent + box * kBoxColumns
                                                 : row.rope + (box - kLatentBoxes) * kBoxColumns,
                              bytes);
}

// S^T of the tile at `ring`, group by group as they land.
MLA_DEVICE void multiply_tile(u32 smem, GroupRing ring, float (&scores)[kFragment]) {
    const u64 query = descriptor_at(kBoxKMajor, smem + Smem::query);
    wgmma_pin(scores);
#pragma unroll
    for (u32 group = 0; group < kTileGroups; ++group) {
        const GroupRing::Place place = ring.place(group);
        mbarrier_wait(full_barrier(smem, place.index), place.parity);
        fence_async_proxy();  // cp.async writes as ordinary stores do, of Q too
        wgmma_fence();
#pragma unroll
        for (u32 box = group * kGroupBoxes; box < (group + 1) * kGroupBoxes; ++box)
            multiply_box(box, box_address(smem, ring, box), query, scores);
    }
    wgmma_commit();
}

}  // namespace mla
