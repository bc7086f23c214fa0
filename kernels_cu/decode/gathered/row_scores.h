// The scores warpgroup of the prefill kernel whose query rows lie along M: S = Q K^T with all of Q in registers, softmax, P. A warp
// has eight rows; the eight others of its 16 along M are zeros. So all that a row's softmax needs is in one quad. A tile's softmax is
// made in steps between the products of the next.
#pragma once
#include "core/quad.h"
#include "core/softmax.h"
#include "decode/gathered/narrow_load.h"
#include "decode/gathered/narrow_rows.h"
#include "ptx/convert.h"
#include "ptx/mbarrier.h"
#include "ptx/warp.h"
#include "ptx/wgmma.h"

namespace mla {

class ScoresRole {
    static_assert(kRowsAlongM, "Q must fit into the registers");
    static constexpr u32 kWarpRows = 8;
    static_assert(kRows == kWarpgroupWarps * kWarpRows, "every warp has as many");
    static constexpr u32 kSteps = kTileBoxes * kBoxSteps;
    static constexpr u32 kPairs = 8;  // of a thread's scores of its row: two neighbouring tokens of each eight
    static constexpr u32 kThreadScores = 4 * kPairs;
    static constexpr i32 kPairElements = 4;  // after the two of the row come two of a row of zeros

public:
    MLA_DEVICE ScoresRole(const GatherParams& params, u32 smem, u32 thread)
        : params_(params), smem_(smem), warp_(thread / kWarpThreads), lane_(thread % kWarpThreads) {}

    // Items that have tiles.
    MLA_DEVICE void run(const Items& items) {
        i32 item = items.first();
        for (BlockWork work = next_work(params_, items, item); work.has_tiles(); work = next_work(params_, items, item))
            run_item(work);
    }

private:
    // Of this thread's row; the sum is over its own tokens.
    struct Row {
        float maximum = minus_infinity(), sum = 0.0f, largest = minus_infinity();
    };

    // Of a tile's softmax, from step to step: what is taken from its scores; by what O is multiplied, and whether that is 1 for all of
    // the warp's rows.
    struct TileRow {
        float shift, factor;
        bool moves;
    };

    MLA_DEVICE void run_item(const BlockWork& work) {
        u32 q[kSteps][4];
        read_query(q);
        Row row;
        float even[kThreadScores], odd[kThreadScores];
        issue(q, ring_, even);
        look_for_absent();
        await(even);
        i32 left = work.tile_end - work.tile_begin;
        for (; left > 2; left -= 2) {
            take_tiles(q, even, odd, row);
            take_tiles(q, odd, even, row);
        }
        if (left == 2) {
            take_tiles(q, even, odd, row);
            finish_tile(odd, row);
        } else {
            finish_tile(even, row);
        }
        finish(work, row);
    }

    MLA_DEVICE GroupRing next_tile() const {
        GroupRing next = ring_;
        next.advance();
        return next;
    }

    // The softmax of the tile at ring_, and products of the next: these do not run far ahead of the warps that ask for them, so the two
    // take turns. Where the next tile is late, that waits for it: to make P first is slower.
    MLA_DEVICE void take_tiles(const u32 (&q)[kSteps][4], float (&scores)[kThreadScores], float (&next)[kThreadScores], Row& row) {
        const GroupRing ahead = next_tile();
        TileRow of_tile;
        hide_absent(scores);
        if (!kTakesTurnsWithin) make_probabilities(scores, row, of_tile);
        bool has_come = false;
        wgmma_pin(next);
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) {
            if (kTakesTurnsWithin && box == kHandOverBox) hand_over(scores, of_tile);
            issue_box(q, ahead, box, has_come, next);
            // Without a branch: past one, wgmma has to be told of its registers again, which costs more than what it saves.
            if (kTakesTurnsWithin && box <= kParts) soften_step(box, scores, row, of_tile);
        }
        wgmma_commit();
        if (!kTakesTurnsWithin || kHandOverBox >= kTileBoxes) hand_over(scores, of_tile);
        leave_tile();
        look_for_absent();
        await(next);
    }

    MLA_DEVICE void finish_tile(float (&scores)[kThreadScores], Row& row) {
        TileRow of_tile;
        hide_absent(scores);
        make_probabilities(scores, row, of_tile);
        hand_over(scores, of_tile);
        leave_tile();
    }

    MLA_DEVICE void leave_tile() {
        ring_.advance();
        buffers_.advance();
    }

    // Token i of this thread's 16 among its scores.
    static constexpr MLA_DEVICE u32 element(u32 i) { return i / 2 * kPairElements + i % 2; }

    MLA_DEVICE u32 row() const { return warp_ * kWarpRows + lane_ / kQuadLanes; }

    // It comes through the ring, ahead of the item's first tile.
    MLA_DEVICE void read_query(u32 (&q)[kSteps][4]) {
        constexpr u32 kPlaceBoxes = kGroupBytes / kRowBoxBytes;  // of Q
#pragma unroll
        for (u32 group = 0; group != kQueryGroups; ++group) {
            const GroupRing::Place place = ring_.place(group);
            mbarrier_wait(full_barrier(smem_, place.index), place.parity);
            // Lane l gives the address of row l % 8 of one of four matrices: rows, zeros, rows 8 columns further, zeros.
            const u32 row = warp_ * kWarpRows + lane_ % 8;
            const bool is_zero = lane_ / 8 % 2 != 0;
            const u32 first = smem_ + Smem::ring + place.index * kGroupBytes;
#pragma unroll
            for (u32 box = group * kPlaceBoxes; box < kTileBoxes && box < (group + 1) * kPlaceBoxes; ++box) {
#pragma unroll
                for (u32 step = 0; step < kBoxSteps; ++step) {
                    const u32 address = first + box % kPlaceBoxes * kRowBoxBytes + box_chunk_offset(row, step * 2 + lane_ / 16);
                    load_matrix_x4(is_zero ? smem_ + Smem::zeros : address, q[box * kBoxSteps + step]);
                }
            }
#pragma unroll
            for (u32 i = 0; i < kGroupFrees; ++i) mbarrier_arrive(empty_barrier(smem_, place.index, i));
        }
        ring_.skip_query();
    }

    // S of the tile at `ring`, group by group as they land.
    MLA_DEVICE void issue(const u32 (&q)[kSteps][4], const GroupRing& ring, float (&scores)[kThreadScores]) const {
        bool has_come = false;
        wgmma_pin(scores);
#pragma unroll
        for (u32 box = 0; box < kTileBoxes; ++box) issue_box(q, ring, box, has_come, scores);
        wgmma_commit();
    }

    // `has_come`: all of the tile has, and is visible to wgmma.
    MLA_DEVICE void issue_box(const u32 (&q)[kSteps][4], const GroupRing& ring, u32 box, bool& has_come,
                              float (&scores)[kThreadScores]) const {
        if (box % kGroupBoxes == 0 && (box == 0 || !has_come)) {
            const GroupRing::Place place = ring.place(box / kGroupBoxes);
            mbarrier_wait(full_barrier(smem_, place.index), place.parity);
            const GroupRing::Place last = ring.place(kTileGroups - 1);
            has_come = __all_sync(kFullWarp, mbarrier_test_wait(full_barrier(smem_, last.index), last.parity));
            fence_async_proxy();  // cp.async writes as ordinary stores do
        }
        // Past a barrier, and (by ptxas) past the last of the softmax's steps between products.
        if (box % kGroupBoxes == 0 || box == kParts || box == kParts + 1) wgmma_fence();
        const u64 k = descriptor_at(kBoxKMajor, box_address(smem_, ring, box));
#pragma unroll
        for (u32 in_box = 0; in_box < kBoxSteps; ++in_box) {
            const u32 step = box * kBoxSteps + in_box;
            wgmma_rs<Operand, 0>(scores, q[step][0], q[step][1], q[step][2], q[step][3],
                                 k + descriptor_offset(in_box * kStepBytes), step > 0);
        }
    }

    static MLA_DEVICE void await(float (&scores)[kThreadScores]) {
        wgmma_wait<0>();
        wgmma_pin(scores);
    }

    // Whether all of the tile at ring_ are tokens. Its first group has come.
    MLA_DEVICE void look_for_absent() {
        u32 words[kLoaderWarps];
        load_shared_words(valid_word(smem_, ring_, 0), words);
        has_absent_ = !__all_sync(kFullWarp, (words[0] & words[1] & words[2] & words[3]) == kAllValid);
    }

    // What is no token of the tile at ring_. Its values are zeros already.
    MLA_DEVICE void hide_absent(float (&scores)[kThreadScores]) const {
        if (!has_absent_) return;
        u32 words[kLoaderWarps];
        load_shared_words(valid_word(smem_, ring_, 0), words);
        const u32 first = lane_ % kQuadLanes * 2;  // of the two tokens of each eight
#pragma unroll
        for (u32 i = 0; i < 2 * kPairs; ++i) {
            const bool exists = words[i / 4] >> (first + i / 2 % 2 * 8 + i % 2) & 1;
            scores[element(i)] = exists ? scores[element(i)] : minus_infinity();
        }
    }

    // The softmax of the tile at ring_: its maximum, then its exponentials in parts, box by box of the next tile.
    static constexpr u32 kParts = 2;
    static constexpr bool kTakesTurnsWithin = kTileBoxes > kParts + 1;
    // P is handed over ahead of the first group behind half of the next tile, once it is made.
    static constexpr u32 kEarliest = (kTileBoxes + 1) / 2 > kParts ? (kTileBoxes + 1) / 2 : kParts + 1;
    static constexpr u32 kHandOverBox = (kEarliest + kGroupBoxes - 1) / kGroupBoxes * kGroupBoxes;

    MLA_DEVICE void make_probabilities(float (&scores)[kThreadScores], Row& row, TileRow& of_tile) const {
#pragma unroll
        for (u32 step = 0; step <= kParts; ++step) soften_step(step, scores, row, of_tile);
    }

    MLA_DEVICE void soften_step(u32 step, float (&scores)[kThreadScores], Row& row, TileRow& of_tile) const {
        if (step == 0)
            raise_maximum(scores, row, of_tile);
        else
            exponentiate_part(step - 1, of_tile.shift, scores, row);
    }

    MLA_DEVICE void raise_maximum(const float (&scores)[kThreadScores], Row& row, TileRow& of_tile) const {
        float pair[2] = {scores[element(0)], scores[element(1)]};
#pragma unroll
        for (u32 i = 2; i < 2 * kPairs; ++i) pair[i % 2] = fmaxf(pair[i % 2], scores[element(i)]);
        const float largest = quad_max(fmaxf(pair[0], pair[1])) * params_.scale_log2;
        row.largest = fmaxf(row.largest, largest);
        const bool moves = largest > row.maximum + kRescaleThreshold;
        of_tile.factor = moves ? fast_exp2(row.maximum - largest) : 1.0f;
        row.maximum = moves ? largest : row.maximum;
        row.sum *= of_tile.factor;
        of_tile.moves = __any_sync(kFullWarp, moves);
        // A row that has seen no key: its scores are -inf, and -inf - -inf would be NaN.
        of_tile.shift = row.maximum == minus_infinity() ? 0.0f : row.maximum;
    }

    MLA_DEVICE void exponentiate_part(u32 part, float shift, float (&scores)[kThreadScores], Row& row) const {
        constexpr u32 kPartTokens = 2 * kPairs / kParts;
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (u32 i = part * kPartTokens; i < (part + 1) * kPartTokens; ++i) {
            float& score = scores[element(i)];
            score = fast_exp2(fmaf(score, params_.scale_log2, -shift));
            sum[i % 2] += score;
        }
        row.sum += sum[0] + sum[1];
    }

    MLA_DEVICE void hand_over(const float (&probabilities)[kThreadScores], const TileRow& of_tile) const {
        mbarrier_wait(probabilities_empty_barrier(smem_, buffers_.index), buffers_.parity ^ 1);
        store_probabilities(probabilities);
        store_factors(of_tile);
        fence_async_proxy();
        mbarrier_arrive(probabilities_full_barrier(smem_, buffers_.index));
    }

    MLA_DEVICE void store_probabilities(const float (&probabilities)[kThreadScores]) const {
        constexpr u32 kStoredChunks = 4;  // of eight tokens each
        const u32 box = smem_ + Smem::probabilities + buffers_.index * kRowBoxBytes;
#pragma unroll
        for (u32 first = 0; first < kPairs; first += kStoredChunks) {
            const u32 chunk = first + lane_ / 8;
            u32 words[kStoredChunks];
#pragma unroll
            for (u32 j = 0; j < kStoredChunks; ++j) {
                const float* p = probabilities + (first + j) * kPairElements;
                words[j] = pack2<Operand>(p[0], p[1]);
            }
            store_matrix_x4(box + box_chunk_offset(warp_ * kWarpRows + lane_ % 8, chunk), words[0], words[1], words[2], words[3]);
        }
    }

    // Each warp says whether any of its rows' factors is not 1.
    MLA_DEVICE void store_factors(const TileRow& of_tile) const {
        if (lane_ == 0) store_shared_u32(rescales(smem_, buffers_.index) + warp_ * static_cast<u32>(sizeof(u32)), of_tile.moves);
        if (lane_ % kQuadLanes == 0) store_shared_f32(of_row(Smem::factors, buffers_.index, row()), of_tile.factor);
    }

    MLA_DEVICE u32 of_row(u32 place, u32 buffer, u32 row) const {
        return smem_ + place + (buffer * kRows + row) * static_cast<u32>(sizeof(f32));
    }

    // After an item's last tile: what O is multiplied by (the sum's inverse) to the values warpgroup, then lse and largest score.
    MLA_DEVICE void finish(const BlockWork& work, Row& row) const {
        row.sum = quad_sum(row.sum);
        if (lane_ % kQuadLanes != 0) return;
        const u32 last = buffers_.index ^ 1;
        const i32 index = this->row();
        const float inverse = row.sum == 0.0f ? 0.0f : 1.0f / with_sink(params_, work, index, row.maximum, row.sum);
        store_shared_f32(of_row(Smem::inverse_sums, last, index), inverse);
        mbarrier_arrive(sums_full_barrier(smem_, last));
        store_lse(params_, work, index, lse_of(params_, work, row.maximum, row.sum));
        store_max_logit(params_, work, index, row.largest * kLn2);
    }

    const GatherParams& params_;
    u32 smem_, warp_, lane_;
    Buffers buffers_;
    GroupRing ring_;
    bool has_absent_ = false;  // of the tile at ring_
};

}  // namespace mla
