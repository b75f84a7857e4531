// The state of Hadamard linear attention with two factors: sums of f_j y_j^T, of 64 x 64 features f.
//
// A block takes four outer features of a piece of a sequence, a warp group two of them. In each chunk of tokens a group loads
// the inner features as left operands once, transposed, and multiplies them by the numbers of one outer feature while the
// products of the other run. The norms, sums of f_j w_j, have separate spans, taken last: products of all outer with all inner
// features.
#include <cstdint>

#include "common/fragments.cuh"
#include "common/pairs.cuh"
#include "common/pairs_launch.cuh"
#include "common/pipeline.cuh"
#include "common/scaled.cuh"
#include "common/spans_launch.cuh"
#include "hadamard/bidirectional.h"

namespace nearfar {
namespace {

using Number = __nv_bfloat16;

template <int kWidth_>
struct Traits {
    static constexpr int kWidth = kWidth_, kPanels = kWidth / 64, kChunk = kBidirectionalChunk;
    static constexpr int kGroups = 2, kOuter = 2, kThreads = 128 * (kGroups + 1);  // outer features of a group
    static constexpr int kTiles = kBidirectionalWidth / (kGroups * kOuter);
    static constexpr int kStages = kWidth == 64 ? 8 : 5;
    static constexpr int kRegisters = 232, kProducerRegisters = 40;
    // Bytes of a tile of features, and from the start of a slot: inner features, values, and rows of outer features. In spans
    // of norms all outer features are in the place of the values.
    static constexpr int kTileBytes = 64 * 128, kOuterBytes = 128 * kGroups * kOuter;
    static constexpr int kValues = kTileBytes, kValueBytes = kPanels * kTileBytes, kOuterRows = kValues + kValueBytes;
    static constexpr int kSlotBytes = kOuterRows + 1024;
    static constexpr int kBarriers = kStages * kSlotBytes, kNext = kBarriers + Pipeline<kStages>::kBytes;
    static constexpr int kBytes = kNext + NextSpan::kBytes;
};

struct Arguments {
    CUtensorMap y;
    const Number *outer, *weighted, *inner;
    float *partials, *partial_norms;
    int* counter;
    Spans spans;  // tiles of outer features, of pieces in the place of heads
    int state_heads, group, pieces, chunks, piece_chunks;

    __device__ int count() const { return spans.count() + spans.heads; }
};

// Four outer features of a piece, or its norms.
template <typename Traits>
struct Span {
    bool norms;
    int index, tile, batch, head, first_chunk, chunks;

    __device__ Span(const Arguments& arguments, int number) : norms(number >= arguments.spans.count()), index(0), tile(0) {
        if (norms) index = number - arguments.spans.count();
        else arguments.spans.locate(number, index, tile);
        const int state = index / arguments.pieces;
        batch = state / arguments.state_heads, head = state % arguments.state_heads;
        first_chunk = index % arguments.pieces * arguments.piece_chunks;
        chunks = min(arguments.piece_chunks, arguments.chunks - first_chunk);
    }
};

template <typename Traits>
struct Places {
    uint32_t base;
    Pipeline<Traits::kStages> pipeline;
    NextSpan next;

    __device__ explicit Places(void* memory)
        : base(shared_address(memory)), pipeline{base + Traits::kBarriers}, next(memory, Traits::kNext) {
        if (threadIdx.x == 0) {
            pipeline.init(4 * Traits::kGroups);
            next.init();
            publish_barriers();
        }
        __syncthreads();
    }
    __device__ int slot(int step) const { return step % Traits::kStages * Traits::kSlotBytes; }
};

// Producer thread.
template <typename Traits>
__device__ void copy_chunks(const Arguments& arguments, const Places<Traits>& places) {
    int step = 0, number = blockIdx.x;
    for (int nth = 0; number < arguments.count(); ++nth) {
        const Span<Traits> span(arguments, number);
        const int first_step = step, heads = arguments.state_heads * arguments.group;
        for (int member = 0; member < arguments.group; ++member) {
            const int head = span.head * arguments.group + member;
            const int64_t first_tile = (static_cast<int64_t>(span.batch) * heads + head) * arguments.chunks;
#pragma unroll 1
            for (int i = 0; i < span.chunks; ++i, ++step) {
                const int chunk = span.first_chunk + i;
                const int64_t tile = (first_tile + chunk) * (Traits::kTileBytes / 2);
                const uint32_t slot = places.base + places.slot(step), full = places.pipeline.full(step);
                places.pipeline.wait_empty(step);
                if (span.norms) {
                    arrive_expecting(full, 2 * Traits::kTileBytes);
                    copy_bytes(slot + Traits::kValues, arguments.weighted + tile, Traits::kTileBytes, full);
                } else {
                    arrive_expecting(full, Traits::kTileBytes + Traits::kValueBytes + Traits::kOuterBytes);
                    copy_panels<Traits::kPanels>(arguments.y, slot + Traits::kValues, Traits::kTileBytes,
                                                 chunk * Traits::kChunk, head, span.batch, full);
                    copy_bytes(slot + Traits::kOuterRows, arguments.outer + tile + span.tile * (Traits::kOuterBytes / 2),
                               Traits::kOuterBytes, full);
                }
                copy_bytes(slot, arguments.inner + tile, Traits::kTileBytes, full);
            }
        }
        // All threads have reached this span and read its number.
        places.pipeline.wait_consumed(max(first_step, step - Traits::kStages));
        number = places.next.take(nth, arguments.counter);
    }
}

// The inner features of a chunk as left operands: a warp has 16 of them, the tokens are what is summed over.
template <typename Traits>
__device__ __forceinline__ void load_inner(uint32_t (&inner)[Traits::kChunk / 16][4], uint32_t tile,
                                           const LaneOffsets<kBidirectionalWidth>& lane) {
#pragma unroll
    for (int i = 0; i < Traits::kChunk / 16; ++i) load_matrices_transposed(inner[i], lane.across_at(tile + 16 * 128 * i, 0));
}

// The sums of two outer features of this group.
template <typename Traits>
__device__ __forceinline__ void sum_values(const Arguments& arguments, const Places<Traits>& places, const char* memory,
                                           const Span<Traits>& span, int& step) {
    constexpr int kSteps = Traits::kChunk / 16;
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, group = threadIdx.x / 128;
    const LaneOffsets<kBidirectionalWidth> columns(lane, warp);
    const int first_outer = span.tile * Traits::kGroups * Traits::kOuter, own = group * Traits::kOuter;
    float acc[2][1][Traits::kWidth / 2] = {};
    uint32_t inner[kSteps][4], features[2][kSteps][4];

    const auto start = [&](int i, int slot) {
        // The numbers of two tokens and of those 8 further, for each 16 tokens; rows are permuted by their place in their tile.
        const char* const row = memory + slot + Traits::kOuterRows + 128 * (own + i) + 4 * (lane % 4);
        const int turn = (first_outer + own + i) % 8;
        uint32_t outer[2 * kSteps];
#pragma unroll
        for (int k = 0; k < 2 * kSteps; ++k) outer[k] = *reinterpret_cast<const uint32_t*>(row + 16 * (k ^ turn));
        scale_fragments(features[i], inner, [&](int k, int word) { return outer[2 * k + word / 2]; });
        begin_products();
        start_weighted_sum<Number, Traits::kWidth, Traits::kChunk>(acc[i][0], features[i], places.base + slot + Traits::kValues,
                                                                 Traits::kTileBytes);
    };
    const int last = step + arguments.group * span.chunks;
#pragma unroll 1
    for (bool first = true; step < last; ++step, first = false) {
        const int slot = places.slot(step);
        places.pipeline.wait_full(step);
        load_inner<Traits>(inner, places.base + slot, columns);
        start(0, slot);
        wait_for_products<1>(acc[1]);
        if (!first) places.pipeline.release(step - 1);
        start(1, slot);
        wait_for_products<1>(acc[0]);
    }
    wait_for_products<0>(acc[1]);
    places.pipeline.release(step - 1);

    const int row = 16 * warp + lane / 4, column = 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t outer = static_cast<int64_t>(span.index) * kBidirectionalWidth + first_outer + own + i;
        const int64_t feature = outer * kBidirectionalWidth;
        float* const to = arguments.partials + (feature + row) * Traits::kWidth + column;
#pragma unroll
        for (int k = 0; k < Traits::kWidth / 2; k += 2)
            *reinterpret_cast<float2*>(to + k / 2 % 2 * 8 * Traits::kWidth + k / 4 * 8) = {acc[i][0][k], acc[i][0][k + 1]};
    }
}

// The norms of half of the outer features: a product of 16 inner ones of each warp with them.
template <typename Traits>
__device__ __forceinline__ void sum_norms(const Arguments& arguments, const Places<Traits>& places, const Span<Traits>& span,
                                          int& step) {
    const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, group = threadIdx.x / 128;
    const LaneOffsets<kBidirectionalWidth> columns(lane, warp), rows(lane);
    const int first_outer = 32 * group;
    float norms[2][2][4] = {};
    const int last = step + arguments.group * span.chunks;
#pragma unroll 1
    for (; step < last; ++step) {
        const uint32_t slot = places.base + places.slot(step);
        uint32_t inner[Traits::kChunk / 16][4];
        places.pipeline.wait_full(step);
        load_inner<Traits>(inner, slot, columns);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            multiply_transposed<Number, kBidirectionalWidth>(norms[i], inner, slot + Traits::kValues + 128 * first_outer,
                                                             16 * 128 * i, rows);
        places.pipeline.release(step);
    }
    float* const to = arguments.partial_norms + static_cast<int64_t>(span.index) * kBidirectionalWidth * kBidirectionalWidth;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int outer = first_outer + i / 4 * 8 + 2 * (lane % 4) + i % 2, inner = 16 * warp + lane / 4 + i / 2 % 2 * 8;
        to[outer * kBidirectionalWidth + inner] = norms[i / 8][i / 4 % 2][i % 4];
    }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) hadamard_bidirectional_accumulate_kernel(
    const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(1024) uint4 memory[];
    const Places<Traits> places(memory);
    if (__shfl_sync(kWholeWarp, threadIdx.x / 128, 0) == Traits::kGroups) {
        release_registers<Traits::kProducerRegisters>();
        if (threadIdx.x % 128 == 0) copy_chunks<Traits>(arguments, places);
        return;
    }
    claim_registers<Traits::kRegisters>();
    int step = 0, number = blockIdx.x;
#pragma unroll 1
    for (int nth = 0; number < arguments.count(); ++nth) {
        const Span<Traits> span(arguments, number);
        if (span.norms) sum_norms<Traits>(arguments, places, span, step);
        else sum_values<Traits>(arguments, places, reinterpret_cast<const char*>(memory), span, step);
        number = places.next.wait(nth);
    }
}

template <int Width>
void launch(const HadamardBidirectionalAccumulate& call, cudaStream_t stream) {
    using Traits = Traits<Width>;
    NEARFAR_CHECK(cudaMemsetAsync(call.counter, 0, sizeof(int), stream));
    const void* const weighted_tiles = call.weighted_tiles == nullptr ? call.outer_tiles : call.weighted_tiles;
    const auto pieces = static_cast<int>(call.batches * call.state_heads * call.num_pieces);
    Arguments arguments{
        Rows{call.y, {call.batches, call.heads, call.num_tokens, Width}, call.y_strides}.map<Number>(Traits::kChunk),
        static_cast<const Number*>(call.outer_tiles), static_cast<const Number*>(weighted_tiles),
        static_cast<const Number*>(call.inner_tiles), call.partials, call.partial_norms, call.counter,
        Spans{Traits::kTiles, 1, pieces}, static_cast<int>(call.state_heads), static_cast<int>(call.heads / call.state_heads),
        static_cast<int>(call.num_pieces), static_cast<int>((call.num_tokens + Traits::kChunk - 1) / Traits::kChunk),
        static_cast<int>(call.piece_length / Traits::kChunk)};
    launch_spans<hadamard_bidirectional_accumulate_kernel<Traits>, Traits>(arguments, stream,
                                                                            "hadamard_bidirectional_accumulate launch");
}

}  // namespace

void hadamard_bidirectional_accumulate(const HadamardBidirectionalAccumulate& call, cudaStream_t stream) {
    if (call.width == 64) launch<64>(call, stream);
    else launch<128>(call, stream);
}

}  // namespace nearfar
