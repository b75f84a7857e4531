// Reads the state of Hadamard linear attention with two factors, of 64 x 64 features, for all rows.
//
// A warp group has two tiles of 64 rows, whose inner features stay in registers as left operands. For each outer feature a slab
// of the state arrives, 64 inner features times all values: a group multiplies the operands of one tile by that feature of its
// rows while the products of the other run. The norms of the state arrive before the slabs, for a product with the unscaled
// operands. Blocks take one span of 256 rows after the other (spans.cuh).
#include <cstdint>
#include <string>

#include "common/features.cuh"
#include "common/fragments.cuh"
#include "common/halves.cuh"
#include "common/pairs.cuh"
#include "common/pairs_launch.cuh"
#include "common/pipeline.cuh"
#include "common/scaled.cuh"
#include "common/spans_launch.cuh"
#include "common/tensor.cuh"
#include "hadamard/bidirectional.h"

namespace nearfar {
namespace {

using Number = __nv_bfloat16;

constexpr int kSplitThreads = 128;

template <int kWidth_>
struct Traits {
    static constexpr int kWidth = kWidth_, kPanels = kWidth / 64;
    static constexpr int kGroups = 2, kGroupRows = 128, kRows = kGroups * kGroupRows, kThreads = 128 * (kGroups + 1);
    static constexpr int kStages = 8;
    static constexpr int kRegisters = 240, kProducerRegisters = 24;
    // Bytes of the factors of a group's rows and of a slab; from the start of shared memory: rows, slots of slabs, barriers.
    // The norms of a state take a slot or two ahead of its slabs: a panel, and one with what rounding has left.
    static constexpr int kFactorBytes = 128 * kGroupRows, kOwnBytes = 2 * kFactorBytes;
    static constexpr int kPanel = 64 * 128, kSlabBytes = kPanels * kPanel;
    static constexpr int kNormSlots = 2 / kPanels, kSlabs = kGroups * kOwnBytes, kBarriers = kSlabs + kStages * kSlabBytes;
    static constexpr int kOwnRows = kBarriers + Pipeline<kStages>::kBytes, kNext = kOwnRows + OwnRows<kGroups>::kBytes;
    static constexpr int kBytes = kNext + NextSpan::kBytes;
    static_assert(kBidirectionalWidth > kStages, "all groups have come to a span before its last slab is copied");
};

struct Arguments {
    CUtensorMap outer, inner, states;
    const Number* norms;  // tiles of all states, by split_norms
    Tensor<Number> out;
    float* inverse;
    int* counter;
    Spans spans;
    int heads, group, num_tokens;
    float eps;
};

template <typename Traits>
struct Places {
    uint32_t base;
    Pipeline<Traits::kStages> slabs;
    OwnRows<Traits::kGroups> rows;
    NextSpan next;

    __device__ explicit Places(void* memory)
        : base(shared_address(memory)), slabs{base + Traits::kBarriers}, rows{base + Traits::kOwnRows},
          next(memory, Traits::kNext) {
        if (threadIdx.x == 0) {
            slabs.init(4 * Traits::kGroups);
            rows.init();
            next.init();
            publish_barriers();
        }
        __syncthreads();
    }
    __device__ uint32_t slab(int step) const { return base + Traits::kSlabs + step % Traits::kStages * Traits::kSlabBytes; }
};

// 256 rows of a head.
template <typename Traits>
struct Span {
    int index, batch, head, state_head, first_row;

    __device__ Span(const Arguments& arguments, int number) {
        int tile;
        arguments.spans.locate(number, index, tile);
        batch = index / arguments.heads, head = index % arguments.heads, state_head = head / arguments.group;
        first_row = tile * Traits::kRows;
    }
};

// One thread takes spans and copies the slabs of one after those of the other.
template <typename Traits>
__device__ void copy_slabs(const Arguments& arguments, const Places<Traits>& places) {
    int step = 0, number = blockIdx.x;
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Span<Traits> span(arguments, number);
        number = places.next.take(nth, arguments.counter);  // safe: all threads have read the slabs of the previous span
        const auto claim = [&] {
            places.slabs.wait_empty(step);
            arrive_expecting(places.slabs.full(step), Traits::kSlabBytes);
        };
        if (arguments.inverse != nullptr) {
            const int64_t state = static_cast<int64_t>(span.batch) * (arguments.heads / arguments.group) + span.state_head;
            const Number* const norms = arguments.norms + state * 2 * kBidirectionalWidth * kBidirectionalWidth;
            for (int slot = 0; slot < Traits::kNormSlots; ++slot, ++step) {
                claim();
                copy_bytes(places.slab(step), norms + slot * (Traits::kSlabBytes / 2), Traits::kSlabBytes,
                           places.slabs.full(step));
            }
        }
#pragma unroll 1
        for (int outer = 0; outer < kBidirectionalWidth; ++outer, ++step) {
            claim();
            copy_panels<Traits::kPanels>(arguments.states, places.slab(step), Traits::kPanel, outer * kBidirectionalWidth,
                                         span.state_head, span.batch, places.slabs.full(step));
        }
    }
}

// Another one copies the rows of each group, as soon as the group is done with those of the span before.
template <typename Traits>
__device__ void copy_own_rows(const Arguments& arguments, const Places<Traits>& places, int group) {
    int number = blockIdx.x;
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Span<Traits> span(arguments, number);
        const int row = span.first_row + group * Traits::kGroupRows;
        const uint32_t to = places.base + group * Traits::kOwnBytes, full = places.rows.full(group);
        places.rows.wait_empty(group, nth);
        arrive_expecting(full, Traits::kOwnBytes);
        copy_box(to, arguments.outer, 0, row, span.head, span.batch, full);
        copy_box(to + Traits::kFactorBytes, arguments.inner, 0, row, span.head, span.batch, full);
        number = places.next.wait(nth);
    }
}

// The norms of states, z, as tiles with a row for each inner feature: rounded, and what rounding has left.
__global__ void __launch_bounds__(kSplitThreads) split_norms_kernel(const float* norms, Number* tiles) {
    constexpr int kNumbers = kBidirectionalWidth * kBidirectionalWidth, kChunks = Tile<kBidirectionalWidth>::kChunks;
    const float* const z = norms + static_cast<int64_t>(blockIdx.x) * kNumbers;
    char* const high = reinterpret_cast<char*>(tiles + static_cast<int64_t>(blockIdx.x) * 2 * kNumbers);
    for (int item = threadIdx.x; item < kBidirectionalWidth * kChunks; item += kSplitThreads) {
        const int inner = item % kBidirectionalWidth, chunk = item / kBidirectionalWidth;
        uint32_t rounded[4], left[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int outer = 8 * chunk + 2 * i;
            const float first = z[outer * kBidirectionalWidth + inner], second = z[(outer + 1) * kBidirectionalWidth + inner];
            rounded[i] = pack<Number>(first, second);
            const float2 x = unpack<Number>(rounded[i]);
            left[i] = pack<Number>(first - x.x, second - x.y);
        }
        char* const at = high + Tile<kBidirectionalWidth>::offset(inner, chunk);
        *reinterpret_cast<uint4*>(at) = {rounded[0], rounded[1], rounded[2], rounded[3]};
        *reinterpret_cast<uint4*>(at + 2 * kNumbers) = {left[0], left[1], left[2], left[3]};
    }
}

template <typename Traits, typename Map>
__global__ void __launch_bounds__(Traits::kThreads, 1) hadamard_bidirectional_read_kernel(
    const __grid_constant__ Arguments arguments) {
    constexpr int kSteps = kBidirectionalWidth / 16;
    extern __shared__ __align__(1024) uint4 memory[];
    const Places<Traits> places(memory);
    const int group = __shfl_sync(kWholeWarp, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    if (group == Traits::kGroups) {
        release_registers<Traits::kProducerRegisters>();
        const int warp = threadIdx.x / 32 % 4;
        if (lane == 0 && warp == 0) copy_slabs<Traits>(arguments, places);
        if (lane == 0 && warp > 0 && warp <= Traits::kGroups) copy_own_rows<Traits>(arguments, places, warp - 1);
        return;
    }
    claim_registers<Traits::kRegisters>();

    const int quad = lane / 4, pair = lane % 4, own_row = threadIdx.x % 128 / 32 * 16;  // of this warp, in each of two tiles
    const LaneOffsets<kBidirectionalWidth> offsets(lane);
    const uint32_t own = places.base + group * Traits::kOwnBytes;
    // Two outer features, from `outer` on, of a row of tile i, mapped.
    const char* const rows = reinterpret_cast<const char*>(memory) + group * Traits::kOwnBytes + 128 * (own_row + quad);
    const auto outer_word = [&](int i, int r, int outer) {
        const char* const at = rows + 128 * (64 * i + 8 * r) + 16 * (outer / 8 ^ quad) + 2 * (outer % 8);
        return map_word<Map>(*reinterpret_cast<const uint32_t*>(at));
    };

    int step = 0, number = blockIdx.x;
#pragma unroll 1
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        float norm[2][2] = {};
        uint32_t inner[2][kSteps][4], features[2][kSteps][4];
        places.rows.wait_full(group, nth);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_rows<kBidirectionalWidth>(inner[i], own + Traits::kFactorBytes + 128 * (64 * i + own_row), offsets);
#pragma unroll
            for (int k = 0; k < 4 * kSteps; ++k) inner[i][k / 4][k % 4] = map_word<Map>(inner[i][k / 4][k % 4]);
        }

        if (arguments.inverse != nullptr) {
#pragma unroll
            for (int slot = 0; slot < Traits::kNormSlots; ++slot) places.slabs.wait_full(step + slot);
            float products[2][kBidirectionalWidth / 2] = {};
            wait_for_products<0>(products);  // of which there are none: the zeros are to be there before the first product
            begin_products();
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int k = 0; k < 2 * kSteps; ++k) {  // both panels follow each other, in one slot or in two
                    const uint32_t panels = places.slab(step + k / kSteps / Traits::kPanels);
                    const uint32_t panel = panels + k / kSteps % Traits::kPanels * Traits::kPanel;
                    const auto rows = rows_operand(panel + k % kSteps * 16 * 128, Traits::kPanel);
                    start_product_of_rows<Number, kBidirectionalWidth>(products[i], inner[i][k % kSteps], rows);
                }
            }
            commit_products();
            wait_for_products<0>(products);
#pragma unroll
            for (int i = 0; i < kBidirectionalWidth; i += 2) {
                const int tile = 2 * i / kBidirectionalWidth, at = i % (kBidirectionalWidth / 2), r = i / 2 % 2;
                const float2 x = unpack<Number>(outer_word(tile, r, product_column(lane, at)));
                norm[tile][r] += x.x * products[tile][at] + x.y * products[tile][at + 1];
            }
#pragma unroll
            for (int slot = 0; slot < Traits::kNormSlots; ++slot) places.slabs.release(step++);
        }

        float acc[2][1][Traits::kWidth / 2] = {};
        const int first_step = step;
#pragma unroll 1
        for (int outer = 0; outer < kBidirectionalWidth; outer += 2) {
            uint32_t word[2][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) word[i / 2][i % 2] = outer_word(i / 2, i % 2, outer);
#pragma unroll
            for (int odd = 0; odd < 2; ++odd, ++step) {
                const auto start = [&](int i) {
                    uint32_t twice[2];
#pragma unroll
                    for (int r = 0; r < 2; ++r) twice[r] = odd ? upper_twice(word[i][r]) : lower_twice(word[i][r]);
                    scale_fragments(features[i], inner[i], [&](int, int k) { return twice[k % 2]; });
                    begin_products();
                    start_weighted_sum<Number, Traits::kWidth, kBidirectionalWidth>(acc[i][0], features[i], places.slab(step),
                                                                              Traits::kPanel);
                };
                places.slabs.wait_full(step);
                start(0);
                wait_for_products<1>(acc[1]);
                if (step > first_step) places.slabs.release(step - 1);
                start(1);
                wait_for_products<1>(acc[0]);
            }
        }
        wait_for_products<0>(acc[1]);
        places.slabs.release(step - 1);
        places.rows.release(group);

        const Span<Traits> span(arguments, number);
        const int first_row = span.first_row + group * Traits::kGroupRows + own_row;
        const int64_t first_number = static_cast<int64_t>(span.index) * arguments.num_tokens;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + 64 * i, rows_left = arguments.num_tokens - row;
            if (arguments.inverse != nullptr) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float sum = quad_sum(norm[i][r]) + arguments.eps, factor = inverse_of(sum);
                    if (pair == 0 && quad + 8 * r < rows_left) arguments.inverse[first_number + row + quad + 8 * r] = factor;
#pragma unroll
                    for (int k = 0; k < Traits::kWidth / 4; ++k) acc[i][0][k / 2 * 4 + 2 * r + k % 2] *= factor;
                }
            }
            store_rows<Number, Traits::kWidth>(tiles_of(acc[i][0]), 1.0f, lane, rows_left, arguments.out.row,
                                               arguments.out.at(span.batch, span.head) + row * arguments.out.row);
        }
        number = places.next.wait(nth);
    }
}

template <int Width, typename Map>
void launch(const HadamardBidirectionalRead& call, cudaStream_t stream) {
    using Traits = Traits<Width>;
    const int64_t group = call.heads / call.state_heads, state = kBidirectionalWidth * kBidirectionalWidth;
    const auto factor = [&](const void* data, const std::array<int64_t, 3>& strides) {
        const std::array<int64_t, 4> sizes{call.batches, call.heads, call.num_tokens, kBidirectionalWidth};
        return Rows{data, sizes, strides}.map<Number>(Traits::kGroupRows);
    };
    const std::array<int64_t, 3> state_strides{call.state_heads * state * Width, state * Width, Width};
    auto* norm_tiles = static_cast<Number*>(call.norm_tiles);
    if (call.inverse != nullptr) {
        const float* norms = call.norms;
        void* parameters[] = {&norms, &norm_tiles};
        const auto blocks = static_cast<unsigned>(call.batches * call.state_heads);
        check(cudaLaunchKernel(split_norms_kernel, dim3(blocks), dim3(kSplitThreads), parameters, 0, stream),
              "split_norms launch");
    }
    NEARFAR_CHECK(cudaMemsetAsync(call.counter, 0, sizeof(int), stream));
    Arguments arguments{
        factor(call.outer, call.outer_strides), factor(call.inner, call.inner_strides),
        Rows{call.states, {call.batches, call.state_heads, state, Width}, state_strides}.map<Number>(kBidirectionalWidth),
        norm_tiles, output_tensor<Number>(call.out, call.out_strides), call.inverse, call.counter,
        make_spans(call.num_tokens, Traits::kRows, call.batches * call.heads, group, 2 * state * Width),
        static_cast<int>(call.heads), static_cast<int>(group), static_cast<int>(call.num_tokens),
        static_cast<float>(call.eps)};
    launch_spans<hadamard_bidirectional_read_kernel<Traits, Map>, Traits>(arguments, stream,
                                                                           "hadamard_bidirectional_read launch");
}

}  // namespace

void hadamard_bidirectional_read(const HadamardBidirectionalRead& call, const std::string& feature_map, cudaStream_t stream) {
    dispatch_feature_map(feature_map, [&](auto map) {
        if (call.width == 64) launch<64, decltype(map)>(call, stream);
        else launch<128, decltype(map)>(call, stream);
    });
}

}  // namespace nearfar
