// Shared by both directions of synchronization/synchronization.cu: traits, arguments, shared memory, and the copying warps.
#pragma once

#include <cstdint>

#include "common/pairs.cuh"
#include "common/pipeline.cuh"
#include "common/spans.cuh"
#include "common/tensor.cuh"
#include "synchronization/synchronization.h"

namespace nearfar {
namespace {

constexpr int kCell = 64, kWidth = kSynchronizationWidth;
constexpr int kPanel = 128 * kCell;  // bytes of a cell of one tensor
constexpr float kNever = -1e30f;     // log2 J^2 of absent tokens
constexpr float kEps = 1e-8f, kLargestC = 1e24f;
constexpr float kRounding = 0x1p-20f;  // accuracy of squared distances and sums of pulls, relative to |w|^2 and |w|

// kOwn, kOthers: number of tensors of the block's rows, and of the cells; kOwnNumbers, kNumbers: numbers per token of each.
template <typename Number_, int kOwn_, int kOthers_, int kOwnNumbers_, int kNumbers_, int kGroups_, int kStages_>
struct Traits {
    using Number = Number_;
    static constexpr int kOwn = kOwn_, kOthers = kOthers_, kOwnNumbers = kOwnNumbers_, kNumbers = kNumbers_;
    static constexpr int kGroups = kGroups_, kStages = kStages_, kRows = kCell * kGroups, kThreads = 128 * (kGroups + 1);
    static constexpr int kRegisters = kGroups == 2 ? 240 : 160, kCopyingRegisters = kGroups == 2 ? 24 : 32;
    static constexpr int kCopying = 2;  // warps that copy cells
    // Bytes from the start of shared memory: the block's rows of two spans, slots of cells, their numbers (an even count), and
    // barriers.
    static constexpr int kOwnBytes = kOwn * kGroups * kPanel, kOwnNumberBytes = 4 * (kOwnNumbers * kRows + 4);
    static constexpr int kSlotBytes = kOthers * kPanel, kNumberBytes = 4 * (kNumbers * kCell + 2);
    static constexpr int kSlots = 2 * kOwnBytes, kOwnNumbersAt = kSlots + kStages * kSlotBytes;
    static constexpr int kNumbersAt = kOwnNumbersAt + 2 * kOwnNumberBytes, kBarriers = kNumbersAt + kStages * kNumberBytes;
    static constexpr int kOwnBarriers = kBarriers + Pipeline<kStages>::kBytes, kNext = kOwnBarriers + Pipeline<2>::kBytes;
    static constexpr int kBytes = kNext + NextSpan::kBytes;
    static_assert((kGroups == 2 || kGroups == 3) && kStages % kCopying == 0 && kBytes <= 227 * 1024);
};

template <int kTensors, int kNumbers>
struct Tokens {
    CUtensorMap tensor[kTensors];
    const float* number[kNumbers];  // of each token; the first are |w|^2
    const float *c, *bandwidth;
    const int32_t *lists, *counts;
    int* counter;  // of spans that were taken
    Spans spans;
    int heads, num_tokens, cells, bandwidth_stride;
};

// A tile of rows of a head.
struct Span {
    int index, batch, head, tile;  // index: of the head among all

    // The last rows first: with causality they see most.
    template <typename Tokens>
    __device__ Span(const Tokens& tokens, int number) {
        tokens.spans.locate(number, index, tile);
        tile = tokens.spans.tiles - 1 - tile;
        batch = index / tokens.heads, head = index % tokens.heads;
    }
};

// What the rows of a span have in common.
struct Common {
    float decay, c;  // log2 J^2 of a squared distance of 1; of the head's first token
    int count;       // of the cells in the list
};

// Addresses in shared memory. The steps of all spans use the slots in turn; spans alternate between the two buffers of rows.
template <typename Traits, typename Tokens>
struct Block {
    const Tokens& tokens;
    uint32_t base;
    char* memory;
    Pipeline<Traits::kStages> pipeline;
    Pipeline<2> own_pipeline;
    NextSpan next;

    __device__ Block(const Tokens& tokens, void* shared)
        : tokens(tokens), base(shared_address(shared)), memory(static_cast<char*>(shared)), pipeline{base + Traits::kBarriers},
          own_pipeline{base + Traits::kOwnBarriers}, next(shared, Traits::kNext) {}

    __device__ void init_barriers() const {
        if (threadIdx.x == 0) {
            pipeline.init(4 * Traits::kGroups, 2);
            own_pipeline.init(4 * Traits::kGroups + Traits::kCopying, 2);
            next.init();
            publish_barriers();
        }
        __syncthreads();
    }

    __device__ uint32_t own(int nth, int tensor, int group) const {
        return base + nth % 2 * Traits::kOwnBytes + (tensor * Traits::kGroups + group) * kPanel;
    }
    __device__ float* own_numbers(int nth, int which) const {
        return reinterpret_cast<float*>(memory + Traits::kOwnNumbersAt + nth % 2 * Traits::kOwnNumberBytes) +
               which * Traits::kRows;
    }
    __device__ Common& common(int nth) const { return reinterpret_cast<Common&>(*own_numbers(nth, Traits::kOwnNumbers)); }
    __device__ uint32_t others(int step, int tensor) const {
        return base + Traits::kSlots + step % Traits::kStages * Traits::kSlotBytes + tensor * kPanel;
    }
    __device__ float* numbers(int step, int which) const {
        return reinterpret_cast<float*>(memory + Traits::kNumbersAt + step % Traits::kStages * Traits::kNumberBytes) +
               which * kCell;
    }
    __device__ int& entry(int step) const { return reinterpret_cast<int&>(*numbers(step, Traits::kNumbers)); }

    __device__ float load_decay(const Span& span) const {
        return -2.0f * kLog2E * tokens.bandwidth[span.head * tokens.bandwidth_stride];
    }
    __device__ const float* of_head(const float* numbers, const Span& span) const {
        return numbers + static_cast<int64_t>(span.index) * tokens.num_tokens;
    }
    // A number of a token.
    __device__ float load_number(const Span& span, float decay, int which, int token) const {
        if (token >= tokens.num_tokens) return which == 0 ? kNever : 0.0f;
        const float x = of_head(tokens.number[which], span)[token];
        return which == 0 ? decay * x : x;
    }
    __device__ int64_t place(const Span& span) const {
        return static_cast<int64_t>(span.index) * tokens.spans.tiles + span.tile;
    }
};

__device__ __forceinline__ int cell_of(int entry) { return entry & ((1 << kSynchronizationMembers) - 1); }

// Producer warp of rows: takes spans, up to two ahead of the groups, and copies their rows, the numbers of each row, and the
// numbers that the rows share.
template <typename Traits, typename Tokens>
__device__ void copy_rows(const Block<Traits, Tokens>& block) {
    const Tokens& tokens = block.tokens;
    const int lane = threadIdx.x % 32;
    int number = blockIdx.x;
    for (int nth = 0; number < tokens.spans.count(); ++nth) {
        const Span span(tokens, number);
        const uint32_t full = block.own_pipeline.full(nth);
        block.own_pipeline.wait_empty(nth);
        if (lane == 0) {
            arrive_expecting(full, Traits::kOwnBytes);
#pragma unroll 1
            for (int i = 0; i < Traits::kOwn * Traits::kGroups; ++i)
                copy_box(block.own(nth, 0, i), tokens.tensor[i / Traits::kGroups], 0,
                         span.tile * Traits::kRows + i % Traits::kGroups * kCell, span.head, span.batch, full);
            number = block.next.take(nth, tokens.counter);
        }
        number = __shfl_sync(kWholeWarp, number, 0);
        const float decay = block.load_decay(span);
#pragma unroll
        for (int which = 0; which < Traits::kOwnNumbers; ++which)
#pragma unroll 2
            for (int row = lane; row < Traits::kRows; row += 32)
                block.own_numbers(nth, which)[row] = block.load_number(span, decay, which, span.tile * Traits::kRows + row);
        if (lane == 0)
            block.common(nth) = {decay, block.of_head(tokens.c, span)[0], tokens.counts[block.place(span)]};
        __syncwarp();
        if (lane == 0) arrive(full);
    }
}

// Producer of cells, run by two warps. Each copies every second cell of the lists and loads the numbers of its tokens, so that
// loads for two cells are in flight. A slot is always filled by the same warp, because a barrier distinguishes only its last
// two phases, and the other warp may be further behind. If any square of a cell is not finite, all of its squares become NaN,
// so that testing one of them suffices.
template <typename Traits, typename Tokens>
__device__ void copy_cells(const Block<Traits, Tokens>& block, int warp) {
    const Tokens& tokens = block.tokens;
    const int lane = threadIdx.x % 32;
    int first_step = 0, number = blockIdx.x;
    for (int nth = 0; number < tokens.spans.count(); ++nth) {
        const Span span(tokens, number);
        const int32_t* const list = tokens.lists + block.place(span) * tokens.cells;
        const int count = tokens.counts[block.place(span)];
        const float decay = block.load_decay(span);
        int entries = 0;  // of this warp's next turns, one in each lane
        for (int turn = 0, place = (first_step + warp) % Traits::kCopying; place < count; ++turn, place += Traits::kCopying) {
            const int step = first_step + place;
            const int mine = place + lane * Traits::kCopying;
            if (turn % 32 == 0) entries = mine < count ? list[mine] : 0;
            const int entry = __shfl_sync(kWholeWarp, entries, turn % 32), first = cell_of(entry) * kCell;
            float number[Traits::kNumbers][2];
#pragma unroll
            for (int i = 0; i < 2 * Traits::kNumbers; ++i)
                number[i / 2][i % 2] = block.load_number(span, decay, i / 2, first + i % 2 * 32 + lane);
            block.pipeline.wait_empty(step);
            if (lane == 0) {
                arrive_expecting(block.pipeline.full(step), Traits::kSlotBytes);
#pragma unroll
                for (int i = 0; i < Traits::kOthers; ++i)
                    copy_box(block.others(step, i), tokens.tensor[i], 0, first, span.head, span.batch,
                             block.pipeline.full(step));
                block.entry(step) = entry;
            }
            const float sum = number[0][0] + number[0][1];
            if (__any_sync(kWholeWarp, !(fabsf(sum) < kInfinity))) number[0][0] = number[0][1] = NAN;
#pragma unroll
            for (int i = 0; i < 2 * Traits::kNumbers; ++i) block.numbers(step, i / 2)[i % 2 * 32 + lane] = number[i / 2][i % 2];
            __syncwarp();
            if (lane == 0) arrive(block.pipeline.full(step));
        }
        first_step += count;
        number = block.next.wait(nth);
        block.own_pipeline.release(nth);
    }
}

template <typename Traits, typename Tokens>
__device__ void copy(const Block<Traits, Tokens>& block) {
    const int warp = __shfl_sync(kWholeWarp, threadIdx.x % 128 / 32, 0);
    if (warp < Traits::kCopying) copy_cells(block, warp);
    else if (warp == Traits::kCopying) copy_rows(block);
}

}  // namespace
}  // namespace nearfar
