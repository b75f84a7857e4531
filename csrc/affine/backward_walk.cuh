// What the two walks of affine/backward.cu share: traits, arguments, shared memory, and the thread that fills it.
#pragma once

#include <cstdint>

#include "affine/backward.h"
#include "common/pairs.cuh"
#include "common/pipeline.cuh"
#include "common/spans.cuh"
#include "common/tensor.cuh"

namespace nearfar {
namespace {

// kSums: what is added up for a row, dq for queries, dv and dk for keys. kScaled: with alpha or beta. kExact, of queries: m is
// wanted to the digits that u lost.
template <typename Number_, int kWidth_, int kSums_, int kTile_, int kStages_, bool kScaled_, bool kExact_ = false>
struct Traits {
    using Number = Number_;
    static constexpr int kWidth = kWidth_, kSums = kSums_, kPanels = kWidth / 64;
    static constexpr bool kOfKeys = kSums == 2, kScaled = kScaled_, kExact = kExact_;
    static constexpr int kGroups = 2, kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
    static constexpr int kTile = kTile_, kStages = kStages_;  // rows of a tile of the other side
    static constexpr int kRegisters = 240, kProducerRegisters = 24;
    static constexpr int kOwnPanel = 128 * kRows, kPanel = 128 * kTile;
    static constexpr int kOwnBytes = kPanels * kOwnPanel, kTileBytes = kPanels * kPanel;  // of one of two tensors
    static constexpr int kTerms = kScaled ? 4 : 2, kTermBytes = kOfKeys ? 4 * kTerms * kTile : 0;
    static constexpr int kSlotBytes = 2 * kTileBytes + kTermBytes;
    // Bytes from the start of shared memory: the block's rows of two tensors; slots of two tiles; slots of terms; barriers.
    static constexpr int kSlots = 2 * kOwnBytes, kTermSlots = kSlots + kStages * 2 * kTileBytes;
    static constexpr int kPipeline = kTermSlots + kStages * kTermBytes, kOwnRows = kPipeline + Pipeline<kStages>::kBytes;
    static constexpr int kNext = kOwnRows + OwnRows<kGroups>::kBytes, kBytes = kNext + NextSpan::kBytes;
    static_assert(kAffineTerms == kRows && kAffineTerms % kTile == 0 && kBytes <= 227 * 1024);
};

// Terms of each query that the keys' kernel reads, one array each: log-sum-exp in base 2, alpha m, alpha and beta.
enum Term { kLevel, kShift, kAlpha, kBeta };

template <typename Number>
struct Arguments {
    CUtensorMap own[2], others[2];  // q, dO and k, v, or k, v and q, dO
    Tensor<const Number> u;
    const float *lse, *alpha, *beta, *sums;
    float *m, *dbeta, *terms;
    int* counter;  // of spans that were taken
    Tensor<Number> results[2];  // dq, or dv and dk
    Band band;
    Spans spans;
    int heads, group, padded_queries;
    int64_t terms_apart;
    float factor, scale;  // of products, in the exponent of 2 and in their gradients
};

// Where things are in a block's shared memory. Steps of all of its spans use the slots in turn.
template <typename Traits>
struct Places {
    uint32_t base;
    Pipeline<Traits::kStages> pipeline;
    OwnRows<Traits::kGroups> own_rows;
    NextSpan next;

    __device__ explicit Places(void* memory)
        : base(shared_address(memory)), pipeline{base + Traits::kPipeline}, own_rows{base + Traits::kOwnRows},
          next(memory, Traits::kNext) {
        if (threadIdx.x == 0) {
            pipeline.init(4 * Traits::kGroups);
            own_rows.init();
            next.init();
            publish_barriers();
        }
        __syncthreads();
    }

    __device__ uint32_t own(int tensor, int group) const { return base + tensor * Traits::kOwnBytes + 64 * 128 * group; }
    __device__ uint32_t tile(int step, int tensor) const {
        return base + Traits::kSlots + (step % Traits::kStages * 2 + tensor) * Traits::kTileBytes;
    }
    __device__ static int terms(int step) { return Traits::kTermSlots + step % Traits::kStages * Traits::kTermBytes; }
};

// Rows of a head, and the tiles that they visit: [begin, end) of each of `heads` heads from other_head on.
template <typename Traits>
struct Span {
    int batch, head, other_head, heads, first_row, begin, end;

    // The rows that visit the most tiles come first.
    __device__ Span(const Arguments<typename Traits::Number>& arguments, int number) {
        const Band& band = arguments.band;
        int index, tile;
        arguments.spans.locate(number, index, tile);
        const int group = arguments.group, own_heads = Traits::kOfKeys ? arguments.heads / group : arguments.heads;
        batch = index / own_heads, head = index % own_heads;
        other_head = Traits::kOfKeys ? head * group : head / group, heads = Traits::kOfKeys ? group : 1;
        first_row = (Traits::kOfKeys ? tile : arguments.spans.tiles - 1 - tile) * Traits::kRows;
        begin = max(0, band.begin(first_row)) / Traits::kTile;
        end = (max(0, band.end(first_row + Traits::kRows - 1)) + Traits::kTile - 1) / Traits::kTile;
    }
};

// Producer thread: takes spans, one ahead of the consumers, and starts all copies in the order of their use.
template <typename Traits>
__device__ void copy_tiles(const Arguments<typename Traits::Number>& arguments, const Places<Traits>& places) {
    int step = 0, number = blockIdx.x;
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Span<Traits> span(arguments, number);
        for (int group = 0; group < Traits::kGroups; ++group) {
            const uint32_t full = places.own_rows.full(group);
            places.own_rows.wait_empty(group, nth);
            arrive_expecting(full, 2 * Traits::kOwnBytes / Traits::kGroups);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                copy_panels<Traits::kPanels>(arguments.own[i], places.own(i, group), Traits::kOwnPanel,
                                             span.first_row + 64 * group, span.head, span.batch, full);
        }
        number = places.next.take(nth, arguments.counter);
        for (int head = span.other_head; head < span.other_head + span.heads; ++head) {
#pragma unroll 1
            for (int tile = span.begin; tile < span.end; ++tile, ++step) {
                const int first = tile * Traits::kTile;
                const uint32_t full = places.pipeline.full(step);
                places.pipeline.wait_empty(step);
                arrive_expecting(full, Traits::kSlotBytes);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    copy_panels<Traits::kPanels>(arguments.others[i], places.tile(step, i), Traits::kPanel, first, head,
                                                 span.batch, full);
                if constexpr (Traits::kOfKeys) {
                    const int64_t index = static_cast<int64_t>(span.batch) * arguments.heads + head;
                    const float* const terms = arguments.terms + index * arguments.padded_queries + first;
#pragma unroll
                    for (int i = 0; i < Traits::kTerms; ++i)
                        copy_bytes(places.base + places.terms(step) + 4 * Traits::kTile * i, terms + i * arguments.terms_apart,
                                   4 * Traits::kTile, full);
                }
            }
        }
    }
}

}  // namespace
}  // namespace nearfar
