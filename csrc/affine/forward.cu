// Softmax attention with an affine epilogue: an online softmax over tiles of keys, the last one first.
//
// Two warp groups have 64 queries each. While the weights of one tile are multiplied with its values, a group turns the
// products of the next keys into weights, and rescales the sum behind it. One thread of a third group copies tiles ahead.
// Blocks take one span of 128 queries after the other (spans.cuh).
#include "affine/forward.h"

#include <cstdint>

#include "common/fragments.cuh"
#include "common/pairs.cuh"
#include "common/pairs_launch.cuh"
#include "common/pipeline.cuh"
#include "common/spans_launch.cuh"
#include "common/tensor.cuh"

namespace nearfar {
namespace {

template <typename Number_, int kWidth_>
struct Traits {
    using Number = Number_;
    static constexpr int kWidth = kWidth_, kPanels = kWidth / 64;
    static constexpr int kGroups = 2, kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
    static constexpr int kTile = 128, kStages = 256 / kWidth;  // keys per tile
    static constexpr int kRegisters = 240, kProducerRegisters = 24;
    static constexpr int kPanel = 128 * kTile, kTileBytes = kPanels * kPanel;
    static_assert(kTile == kAffineChunk);
    static_assert(kRows == kTile, "queries, keys and values have tiles of one size");
    // Bytes from the start of shared memory: queries, slots of keys and of values, and barriers.
    static constexpr int kKeys = kTileBytes, kValues = kKeys + kStages * kTileBytes, kBarriers = kValues + kStages * kTileBytes;
    static constexpr int kOwnRows = kBarriers + 2 * Pipeline<kStages>::kBytes;
    static constexpr int kNext = kOwnRows + OwnRows<kGroups>::kBytes, kBytes = kNext + NextSpan::kBytes;
};

template <typename Number>
struct Arguments {
    CUtensorMap q, k, v;
    const float *alpha, *beta, *sink, *sums;
    Tensor<Number> o;
    Number* u;
    float* lse;
    int* counter;  // of spans that were taken
    Band band;
    Spans spans;
    int heads, group;
    float factor;  // of products, in the exponent of 2
};

// Where things are in a block's shared memory. Steps of all of its spans use the slots of keys, and those of values, in turn.
template <typename Traits>
struct Places {
    uint32_t base;
    Pipeline<Traits::kStages> keys, values;
    OwnRows<Traits::kGroups> queries;
    NextSpan next;

    __device__ explicit Places(void* memory)
        : base(shared_address(memory)), keys{base + Traits::kBarriers}, values{keys.barriers + keys.kBytes},
          queries{base + Traits::kOwnRows}, next(memory, Traits::kNext) {
        if (threadIdx.x == 0) {
            keys.init(4 * Traits::kGroups);
            values.init(4 * Traits::kGroups);
            queries.init();
            next.init();
            publish_barriers();
        }
        __syncthreads();
    }

    __device__ uint32_t key_tile(int step) const { return base + Traits::kKeys + step % Traits::kStages * Traits::kTileBytes; }
    __device__ uint32_t value_tile(int step) const {
        return base + Traits::kValues + step % Traits::kStages * Traits::kTileBytes;
    }
};

// Some queries of a head, and the tiles of keys that they need: all from `tiles` - 1 down to 0, and for the bias the values of
// those from `cut` on once more, which some of the queries do not see to the end. Those before `cut` are seen by all, and have
// running sums.
template <typename Traits>
struct Span {
    int index, batch, head, kv_head, first_row, tiles, cut;

    // The last queries, which see the most keys, come first.
    __device__ Span(const Arguments<typename Traits::Number>& arguments, int number) {
        const Band& band = arguments.band;
        int tile;
        arguments.spans.locate(number, index, tile);
        batch = index / arguments.heads, head = index % arguments.heads, kv_head = head / arguments.group;
        first_row = (arguments.spans.tiles - 1 - tile) * Traits::kRows;
        cut = tiles = (max(0, band.end(first_row + Traits::kRows - 1)) + Traits::kTile - 1) / Traits::kTile;
        const int seen_by_all = max(0, band.end(first_row));
        if (arguments.beta != nullptr && seen_by_all < band.num_others) cut = min(tiles, seen_by_all / Traits::kTile);
    }
};

// Producer thread: takes spans, one ahead of the consumers, and starts all copies in the order of their use.
template <typename Traits>
__device__ void copy_tiles(const Arguments<typename Traits::Number>& arguments, const Places<Traits>& places) {
    int keys = 0, values = 0, number = blockIdx.x;  // steps
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Span<Traits> span(arguments, number);
        const auto copy_keys = [&](int tile) {
            places.keys.wait_empty(keys);
            arrive_expecting(places.keys.full(keys), Traits::kTileBytes);
            copy_panels<Traits::kPanels>(arguments.k, places.key_tile(keys), Traits::kPanel, tile * Traits::kTile, span.kv_head,
                                         span.batch, places.keys.full(keys));
            ++keys;
        };
        const auto copy_values = [&](int tile) {
            places.values.wait_empty(values);
            arrive_expecting(places.values.full(values), Traits::kTileBytes);
            copy_panels<Traits::kPanels>(arguments.v, places.value_tile(values), Traits::kPanel, tile * Traits::kTile,
                                         span.kv_head, span.batch, places.values.full(values));
            ++values;
        };
        for (int group = 0; group < Traits::kGroups; ++group) {
            places.queries.wait_empty(group, nth);
            arrive_expecting(places.queries.full(group), Traits::kTileBytes / Traits::kGroups);
            copy_panels<Traits::kPanels>(arguments.q, places.base + 64 * 128 * group, Traits::kPanel,
                                         span.first_row + 64 * group, span.head, span.batch, places.queries.full(group));
        }
        number = places.next.take(nth, arguments.counter);
#pragma unroll 1
        for (int tile = span.tiles - 1; tile >= 0; --tile) {
            copy_keys(tile);
            copy_values(tile);
        }
        for (int tile = span.cut; tile < span.tiles; ++tile) copy_values(tile);
    }
}

// A row's running softmax: weights are relative to 2^highest, and a lane adds up those of its columns.
struct Softmax {
    float highest = -kInfinity, norm = 0;
};

// Turns products into weights, those of what a row does not see into zeros; decay is what earlier sums are to be multiplied by.
template <int Count>
__device__ __forceinline__ void weigh(float (&score)[Count], Softmax (&softmax)[2], float (&decay)[2], const int (&end)[2],
                                      bool cut, float factor, int lane) {
    if (cut) {
#pragma unroll
        for (int i = 0; i < Count; ++i)
            if (product_column(lane, i) >= end[i / 2 % 2]) score[i] = -kInfinity;
    }
    float top[2][2] = {{-kInfinity, -kInfinity}, {-kInfinity, -kInfinity}}, sum[2][2] = {}, shift[2];
#pragma unroll
    for (int i = 0; i < Count; ++i) top[i / 2 % 2][i % 2] = fmaxf(top[i / 2 % 2][i % 2], score[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float highest = fmaxf(softmax[r].highest, quad_max(fmaxf(top[r][0], top[r][1])) * factor);
        shift[r] = highest == -kInfinity ? 0.0f : highest;  // rows that have seen no key yet
        decay[r] = exp2_approximate(softmax[r].highest - shift[r]);
        softmax[r].highest = highest;
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        score[i] = exp2_approximate(fmaf(score[i], factor, -shift[i / 2 % 2]));
        sum[i / 2 % 2][i % 2] += score[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax[r].norm = softmax[r].norm * decay[r] + (sum[r][0] + sum[r][1]);
}

// Divides the sums of weighted values of two rows, `row` and the one 8 further, by their norms, and stores the log-sum-exp.
template <typename Traits>
__device__ __forceinline__ void normalise(const Arguments<typename Traits::Number>& arguments, const Span<Traits>& span,
                                          int row, const Softmax (&softmax)[2], float (&sums)[Traits::kWidth / 2]) {
    const Band& band = arguments.band;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool sees_a_key = band.end(row + 8 * r) > 0;
        float top = sees_a_key ? softmax[r].highest : 0.0f, norm = quad_sum(softmax[r].norm), rescale = 1;
        if (arguments.sink != nullptr) {
            const float logit = arguments.sink[span.head] * kLog2E, highest = top;
            top = fmaxf(top, logit);
            rescale = exp2_approximate(highest - top);
            norm = norm * rescale + exp2_approximate(logit - top);
        }
        if (threadIdx.x % 4 == 0 && row + 8 * r < band.num_rows)
            arguments.lse[static_cast<int64_t>(span.index) * band.num_rows + row + 8 * r] =
                sees_a_key ? top + log2f(norm) : 0.0f;
        const float factor = sees_a_key ? rescale / norm : 0.0f;
#pragma unroll
        for (int i = 0; i < Traits::kWidth / 4; ++i) sums[i / 2 * 4 + 2 * r + i % 2] *= factor;
    }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) affine_forward_kernel(
    const __grid_constant__ Arguments<typename Traits::Number> arguments) {
    using Number = typename Traits::Number;
    constexpr int kWidth = Traits::kWidth, kTile = Traits::kTile, kSteps = kTile / 16;
    extern __shared__ __align__(1024) uint4 memory[];
    const Places<Traits> places(memory);
    const Band& band = arguments.band;

    const int group = __shfl_sync(kWholeWarp, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    if (group == Traits::kGroups) {
        release_registers<Traits::kProducerRegisters>();
        if (threadIdx.x % 128 == 0) copy_tiles<Traits>(arguments, places);
        return;
    }
    claim_registers<Traits::kRegisters>();

    float score[1][kTile / 2];
    uint32_t weight[kSteps][4];
    const auto start_scores = [&](int step) {
        start_tile_product<Number, kWidth, kTile>(score[0], places.base + 64 * 128 * group, Traits::kPanel,
                                                  places.key_tile(step), Traits::kPanel);
    };
    const auto start_values = [&](float(&sum)[kWidth / 2], int step) {
        start_weighted_sum<Number, kWidth, kTile>(sum, weight, places.value_tile(step), Traits::kPanel);
    };
    const auto round_weights = [&] { round_products<Number>(weight, score[0]); };

    int keys = 0, values = 0, number = blockIdx.x;  // steps
#pragma unroll 1
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Span<Traits> span(arguments, number);
        const int row = span.first_row + threadIdx.x / 32 * 16 + lane / 4;
        const int seen_by_all = band.end(span.first_row + 64 * group);
        const int64_t first_number = static_cast<int64_t>(span.index) * band.num_rows;
        float acc[1][kWidth / 2] = {}, decay[2], alpha[2], beta[2];
        for (int r = 0; r < 2; ++r) {
            const int64_t at = first_number + min(row + 8 * r, band.num_rows - 1);
            alpha[r] = arguments.alpha == nullptr ? 1.0f : arguments.alpha[at];
            beta[r] = arguments.beta == nullptr ? 0.0f : arguments.beta[at];
        }
        Softmax softmax[2];
        const auto weigh_tile = [&](int tile) {
            const int first = tile * kTile, end[2] = {band.end(row) - first, band.end(row + 8) - first};
            weigh(score[0], softmax, decay, end, first + kTile > seen_by_all, arguments.factor, lane);
        };

        places.queries.wait_full(group, nth);
        if (span.tiles > 0) {
            places.keys.wait_full(keys);
            begin_products();
            start_scores(keys);
            wait_for_products<0>(score);
            places.keys.release(keys++);
            weigh_tile(span.tiles - 1);
            round_weights();
#pragma unroll 1
            for (int tile = span.tiles - 2; tile >= 0; --tile) {
                places.keys.wait_full(keys);
                places.values.wait_full(values);
                begin_products();
                start_scores(keys);
                start_values(acc[0], values);
                wait_for_products<1>(score);
                places.keys.release(keys++);
                weigh_tile(tile);
                wait_for_products<0>(acc);
                places.values.release(values++);
#pragma unroll
                for (int i = 0; i < kWidth / 2; ++i) acc[0][i] *= decay[i / 2 % 2];
                round_weights();
            }
        }
        places.queries.release(group);
        float bias[1][kWidth / 2] = {};
        if (arguments.beta != nullptr && span.cut > 0) {  // on their way beside the last products
            const int64_t kv_index = static_cast<int64_t>(span.batch) * (arguments.heads / arguments.group) + span.kv_head;
            const int chunks = (band.num_others + kTile - 1) / kTile;
            const float* const sums = arguments.sums + (kv_index * chunks + span.cut - 1) * kWidth;
#pragma unroll
            for (int i = 0; i < kWidth / 2; ++i) bias[0][i] = sums[product_column(lane, i)];
        }
        if (span.tiles > 0) {
            places.values.wait_full(values);
            begin_products();
            start_values(acc[0], values);
            wait_for_products<0>(acc);
            places.values.release(values++);
        }
        for (int tile = span.cut; tile < span.tiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4 * kSteps; ++i) {
                const int key = tile * kTile + i / 4 * 16 + i % 4 / 2 * 8 + 2 * (lane % 4), end = band.end(row + i % 2 * 8);
                weight[i / 4][i % 4] = pack<Number>(key < end ? 1.0f : 0.0f, key + 1 < end ? 1.0f : 0.0f);
            }
            places.values.wait_full(values);
            begin_products();
            start_values(bias[0], values);
            wait_for_products<0>(bias);
            places.values.release(values++);
        }

        normalise<Traits>(arguments, span, row, softmax, acc[0]);
        const int rows_left = band.num_rows - (row - lane / 4);
        if (arguments.u != nullptr)
            store_rows<Number, kWidth>(tiles_of(acc[0]), 1.0f, lane, rows_left, kWidth,
                                       arguments.u + (first_number + row - lane / 4) * kWidth);
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i)
            acc[0][i] = alpha[i / 2 % 2] * acc[0][i] + beta[i / 2 % 2] * bias[0][i];
        store_rows<Number, kWidth>(tiles_of(acc[0]), 1.0f, lane, rows_left, arguments.o.row,
                                   arguments.o.at(span.batch, span.head) + (row - lane / 4) * arguments.o.row);
        number = places.next.wait(nth);
    }
}

template <typename Number, int Width>
void launch(const AffineForward& call, cudaStream_t stream) {
    using Traits = Traits<Number, Width>;
    const auto map = [&](const void* data, int64_t heads, int64_t rows, const std::array<int64_t, 3>& strides, int at_once) {
        return Rows{data, {call.batches, heads, rows, Width}, strides}.template map<Number>(at_once);
    };
    const int64_t group = call.heads / call.kv_heads;
    NEARFAR_CHECK(cudaMemsetAsync(call.counter, 0, sizeof(int), stream));
    Arguments<Number> arguments{
        map(call.q, call.heads, call.num_queries, call.q_strides, Traits::kRows / Traits::kGroups),
        map(call.k, call.kv_heads, call.num_keys, call.k_strides, Traits::kTile),
        map(call.v, call.kv_heads, call.num_keys, call.v_strides, Traits::kTile),
        call.alpha, call.beta, call.sink, call.sums, output_tensor<Number>(call.o, call.o_strides),
        static_cast<Number*>(call.u), call.lse, call.counter,
        Sight{call.num_queries, call.num_keys, -1, call.right}.of_queries(),
        make_spans(call.num_queries, Traits::kRows, call.batches * call.heads, group, 4 * Width * call.num_keys),
        static_cast<int>(call.heads), static_cast<int>(group), static_cast<float>(call.scale) * kLog2E};
    launch_spans<affine_forward_kernel<Traits>, Traits>(arguments, stream, "affine_forward launch");
}

}  // namespace

void affine_forward(const AffineForward& call, DType dtype, cudaStream_t stream) {
    dispatch_hopper(dtype, call.width,
                    [&](auto* type, auto width) { launch<std::remove_pointer_t<decltype(type)>, width>(call, stream); });
}

}  // namespace nearfar
