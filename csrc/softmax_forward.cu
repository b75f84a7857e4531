// Softmax attention with an affine epilogue: an online softmax over tiles of keys, the last one first.
//
// Two warp groups have 64 queries each. While the weights of one tile are multiplied with its values, a group turns the
// products of the next keys into weights, and rescales the sum behind it. One thread of a third group copies tiles ahead.
// Blocks take one span of 128 queries after the other (spans.cuh).
#include "softmax_forward.h"

#include <cstdint>

#include "common/fragments.cuh"
#include "common/spans_launch.cuh"
#include "common/stream.cuh"
#include "common/stream_launch.cuh"
#include "common/tensor.cuh"

namespace nearfar {
namespace {

template <typename Number_, int kWidth_>
struct Shape {
    using Number = Number_;
    static constexpr int kWidth = kWidth_, kPanels = kWidth / 64;
    static constexpr int kGroups = 2, kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
    static constexpr int kTile = 128, kStages = 256 / kWidth;  // keys at once
    static constexpr int kRegisters = 240, kProducerRegisters = 24;
    static constexpr int kPanel = 128 * kTile, kTileBytes = kPanels * kPanel;
    static_assert(kTile == kSoftmaxChunk);
    static_assert(kRows == kTile, "queries, keys and values have tiles of one size");
    // Bytes from the start of shared memory: queries, slots of keys and of values, and barriers.
    static constexpr int kKeys = kTileBytes, kValues = kKeys + kStages * kTileBytes, kBarriers = kValues + kStages * kTileBytes;
    static constexpr int kNext = kBarriers + 8 * (4 * kStages + 2 * kGroups), kBytes = kNext + NextSpan::kBytes;
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

// Addresses of a block's barriers. Steps of all of its spans use the slots of keys and those of values in turn.
template <typename Shape>
struct Barriers {
    uint32_t base;
    enum Kind { kKeysFull, kKeysEmpty, kValuesFull, kValuesEmpty };

    __device__ uint32_t at(Kind kind, int step) const {
        return base + Shape::kBarriers + 8 * (kind * Shape::kStages + step % Shape::kStages);
    }
    __device__ uint32_t queries_full(int group) const { return base + Shape::kBarriers + 8 * (4 * Shape::kStages + group); }
    __device__ uint32_t queries_empty(int group) const { return queries_full(Shape::kGroups + group); }

    __device__ void make() const {
        for (int slot = 0; slot < Shape::kStages; ++slot) {
            for (const auto full : {kKeysFull, kValuesFull}) make_barrier(at(full, slot), 1);
            for (const auto empty : {kKeysEmpty, kValuesEmpty}) make_barrier(at(empty, slot), 4 * Shape::kGroups);
        }
        for (int group = 0; group < Shape::kGroups; ++group) {
            make_barrier(queries_full(group), 1);
            make_barrier(queries_empty(group), 4);
        }
    }

    // Of step `step`, the use of its slot before it has ended, or its own copies have come.
    __device__ void wait_empty(Kind kind, int step) const {
        if (step >= Shape::kStages) wait_for_barrier(at(kind, step), (step / Shape::kStages - 1) % 2);
    }
    __device__ void wait_full(Kind kind, int step) const { wait_for_barrier(at(kind, step), step / Shape::kStages % 2); }
};

// Some queries of a head, and the tiles of keys that they need: all from `tiles` - 1 down to 0, and for the bias the values of
// those from `cut` on once more, which some of the queries do not see to the end. Those before `cut` are seen by all, and have
// running sums.
template <typename Shape>
struct Span {
    int index, batch, head, kv_head, first_row, tiles, cut;

    // The last queries, which see most, come first.
    __device__ Span(const Arguments<typename Shape::Number>& arguments, int number) {
        const Band& band = arguments.band;
        int tile;
        arguments.spans.locate(number, index, tile);
        batch = index / arguments.heads, head = index % arguments.heads, kv_head = head / arguments.group;
        first_row = (arguments.spans.tiles - 1 - tile) * Shape::kRows;
        cut = tiles = (max(0, band.end(first_row + Shape::kRows - 1)) + Shape::kTile - 1) / Shape::kTile;
        const int seen_by_all = max(0, band.end(first_row));
        if (arguments.beta != nullptr && seen_by_all < band.num_others) cut = min(tiles, seen_by_all / Shape::kTile);
    }
};

template <typename Shape>
__device__ void copy_rows_of(const CUtensorMap& tensor, uint32_t to, int rows, int row, int head, int batch, uint32_t full) {
    arrive_expecting(full, 2 * Shape::kWidth * rows);
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel)
        copy_box(to + panel * Shape::kPanel, tensor, 64 * panel, row, head, batch, full);
}

// What one thread does for the others: it takes spans, one ahead of them, and starts all copies in the order of their use.
template <typename Shape>
__device__ void copy_tiles(const Arguments<typename Shape::Number>& arguments, const Barriers<Shape>& barriers,
                           const NextSpan& next) {
    using B = Barriers<Shape>;
    int keys = 0, values = 0, number = blockIdx.x;  // steps
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Span<Shape> span(arguments, number);
        const auto copy = [&](auto full, auto empty, const CUtensorMap& tensor, int slots, int& step, int tile) {
            barriers.wait_empty(empty, step);
            copy_rows_of<Shape>(tensor, barriers.base + slots + step % Shape::kStages * Shape::kTileBytes, Shape::kTile,
                                tile * Shape::kTile, span.kv_head, span.batch, barriers.at(full, step));
            ++step;
        };
        for (int group = 0; group < Shape::kGroups; ++group) {
            if (nth > 0) wait_for_barrier(barriers.queries_empty(group), (nth - 1) % 2);
            copy_rows_of<Shape>(arguments.q, barriers.base + 64 * 128 * group, 64, span.first_row + 64 * group, span.head,
                                span.batch, barriers.queries_full(group));
        }
        number = next.take(nth, arguments.counter);
#pragma unroll 1
        for (int tile = span.tiles - 1; tile >= 0; --tile) {
            copy(B::kKeysFull, B::kKeysEmpty, arguments.k, Shape::kKeys, keys, tile);
            copy(B::kValuesFull, B::kValuesEmpty, arguments.v, Shape::kValues, values, tile);
        }
        for (int tile = span.cut; tile < span.tiles; ++tile)
            copy(B::kValuesFull, B::kValuesEmpty, arguments.v, Shape::kValues, values, tile);
    }
}

// Results by tiles of 8 columns, as store_rows takes them.
template <int Count>
__device__ __forceinline__ const float (&tiles_of(const float (&c)[Count]))[Count / 4][4] {
    return reinterpret_cast<const float(&)[Count / 4][4]>(c);
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

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) softmax_forward_kernel(
    const __grid_constant__ Arguments<typename Shape::Number> arguments) {
    using Number = typename Shape::Number;
    using B = Barriers<Shape>;
    constexpr int kWidth = Shape::kWidth, kTile = Shape::kTile, kSteps = kTile / 16;
    extern __shared__ __align__(1024) uint4 memory[];
    const B barriers{shared_address(memory)};
    const NextSpan next(memory, Shape::kNext);
    const Band& band = arguments.band;
    if (threadIdx.x == 0) {
        barriers.make();
        next.make();
        publish_barriers();
    }
    __syncthreads();

    const int group = __shfl_sync(kWholeWarp, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    if (group == Shape::kGroups) {
        release_registers<Shape::kProducerRegisters>();
        if (threadIdx.x % 128 == 0) copy_tiles<Shape>(arguments, barriers, next);
        return;
    }
    claim_registers<Shape::kRegisters>();

    float score[1][kTile / 2];
    uint32_t weight[kSteps][4];
    const auto start_scores = [&](int step) {
        const uint32_t queries = barriers.base + 64 * 128 * group;
        const uint32_t keys = barriers.base + Shape::kKeys + step % Shape::kStages * Shape::kTileBytes;
#pragma unroll
        for (int i = 0; i < kWidth / 16; ++i)
            start_product<Number, kTile>(score[0], panel_operand(queries + i / 4 * Shape::kPanel, i % 4 * 32),
                                         panel_operand(keys + i / 4 * Shape::kPanel, i % 4 * 32), i > 0);
        commit_products();
    };
    const auto start_values = [&](float(&sum)[kWidth / 2], int step) {
        const uint32_t values = barriers.base + Shape::kValues + step % Shape::kStages * Shape::kTileBytes;
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
            start_product_of_rows<Number, kWidth>(sum, weight[i], rows_operand(values + 16 * 128 * i, Shape::kPanel));
        commit_products();
    };
    const auto round_weights = [&] {
#pragma unroll
        for (int i = 0; i < 4 * kSteps; ++i) weight[i / 4][i % 4] = pack<Number>(score[0][2 * i], score[0][2 * i + 1]);
    };

    int keys = 0, values = 0, number = blockIdx.x;  // steps
#pragma unroll 1
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Span<Shape> span(arguments, number);
        const int row = span.first_row + threadIdx.x / 32 * 16 + lane / 4;
        const int seen_by_all = band.end(span.first_row + 64 * group);
        float acc[1][kWidth / 2] = {}, decay[2];
        Softmax softmax[2];
        const auto weigh_tile = [&](int tile) {
            const int first = tile * kTile, end[2] = {band.end(row) - first, band.end(row + 8) - first};
            weigh(score[0], softmax, decay, end, first + kTile > seen_by_all, arguments.factor, lane);
        };

        wait_for_barrier(barriers.queries_full(group), nth % 2);
        if (span.tiles > 0) {
            barriers.wait_full(B::kKeysFull, keys);
            begin_products();
            start_scores(keys);
            wait_for_products<0>(score);
            leave(barriers.at(B::kKeysEmpty, keys++));
            weigh_tile(span.tiles - 1);
            round_weights();
#pragma unroll 1
            for (int tile = span.tiles - 2; tile >= 0; --tile) {
                barriers.wait_full(B::kKeysFull, keys);
                barriers.wait_full(B::kValuesFull, values);
                begin_products();
                start_scores(keys);
                start_values(acc[0], values);
                wait_for_products<1>(score);
                leave(barriers.at(B::kKeysEmpty, keys++));
                weigh_tile(tile);
                wait_for_products<0>(acc);
                leave(barriers.at(B::kValuesEmpty, values++));
#pragma unroll
                for (int i = 0; i < kWidth / 2; ++i) acc[0][i] *= decay[i / 2 % 2];
                round_weights();
            }
            barriers.wait_full(B::kValuesFull, values);
            begin_products();
            start_values(acc[0], values);
            wait_for_products<0>(acc);
            leave(barriers.at(B::kValuesEmpty, values++));
        }
        leave(barriers.queries_empty(group));

        const int64_t numbers = static_cast<int64_t>(span.index) * band.num_rows;
        const int rows_left = band.num_rows - (row - lane / 4);
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
            if (lane % 4 == 0 && row + 8 * r < band.num_rows)
                arguments.lse[numbers + row + 8 * r] = sees_a_key ? top + log2f(norm) : 0.0f;
            const float factor = sees_a_key ? rescale / norm : 0.0f;
#pragma unroll
            for (int i = 0; i < kWidth / 4; ++i) acc[0][i / 2 * 4 + 2 * r + i % 2] *= factor;
        }
        if (arguments.u != nullptr)
            store_rows<Number, kWidth>(tiles_of(acc[0]), 1.0f, lane, rows_left, kWidth,
                                       arguments.u + (numbers + row - lane / 4) * kWidth);
        const auto of_rows = [&](const float* numbers_of_rows, float(&mine)[2]) {
            for (int r = 0; r < 2; ++r) mine[r] = numbers_of_rows[numbers + min(row + 8 * r, band.num_rows - 1)];
        };
        if (arguments.alpha != nullptr) {
            float alpha[2];
            of_rows(arguments.alpha, alpha);
#pragma unroll
            for (int i = 0; i < kWidth / 2; ++i) acc[0][i] *= alpha[i / 2 % 2];
        }
        if (arguments.beta != nullptr) {
            float bias[1][kWidth / 2] = {};
            for (int tile = span.cut; tile < span.tiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4 * kSteps; ++i) {
                    const int key = tile * kTile + i / 4 * 16 + i % 4 / 2 * 8 + 2 * (lane % 4), end = band.end(row + i % 2 * 8);
                    weight[i / 4][i % 4] = pack<Number>(key < end ? 1.0f : 0.0f, key + 1 < end ? 1.0f : 0.0f);
                }
                barriers.wait_full(B::kValuesFull, values);
                begin_products();
                start_values(bias[0], values);
                wait_for_products<0>(bias);
                leave(barriers.at(B::kValuesEmpty, values++));
            }
            if (span.cut > 0) {
                const int64_t kv_index = static_cast<int64_t>(span.batch) * (arguments.heads / arguments.group) + span.kv_head;
                const int chunks = (band.num_others + kTile - 1) / kTile;
                const float* const sums = arguments.sums + (kv_index * chunks + span.cut - 1) * kWidth;
#pragma unroll
                for (int i = 0; i < kWidth / 2; ++i) bias[0][i] += sums[product_column(lane, i)];
            }
            float beta[2];
            of_rows(arguments.beta, beta);
#pragma unroll
            for (int i = 0; i < kWidth / 2; ++i) acc[0][i] += beta[i / 2 % 2] * bias[0][i];
        }
        store_rows<Number, kWidth>(tiles_of(acc[0]), 1.0f, lane, rows_left, arguments.o.row,
                                   arguments.o.at(span.batch, span.head) + (row - lane / 4) * arguments.o.row);
        number = next.wait(nth);
    }
}

template <typename Number, int Width>
void launch(const SoftmaxForward& call, cudaStream_t stream) {
    using Shape = Shape<Number, Width>;
    const auto map = [&](const void* data, int64_t heads, int64_t rows, const std::array<int64_t, 3>& strides, int at_once) {
        return Rows{data, {call.batches, heads, rows, Width}, strides}.template map<Number>(at_once);
    };
    const int64_t group = call.heads / call.kv_heads;
    NEARFAR_CHECK(cudaMemsetAsync(call.counter, 0, sizeof(int), stream));
    Arguments<Number> arguments{
        map(call.q, call.heads, call.num_queries, call.q_strides, Shape::kRows / Shape::kGroups),
        map(call.k, call.kv_heads, call.num_keys, call.k_strides, Shape::kTile),
        map(call.v, call.kv_heads, call.num_keys, call.v_strides, Shape::kTile),
        call.alpha, call.beta, call.sink, call.sums, output_tensor<Number>(call.o, call.o_strides),
        static_cast<Number*>(call.u), call.lse, call.counter,
        Sight{call.num_queries, call.num_keys, -1, call.right}.of_queries(),
        make_spans(call.num_queries, Shape::kRows, call.batches * call.heads, group, 4 * Width * call.num_keys),
        static_cast<int>(call.heads), static_cast<int>(group), static_cast<float>(call.scale) * kLog2E};
    launch_spans<softmax_forward_kernel<Shape>, Shape>(arguments, stream, "softmax_forward launch");
}

}  // namespace

void softmax_forward(const SoftmaxForward& call, DType dtype, cudaStream_t stream) {
    dispatch_stream(dtype, call.width,
                    [&](auto* type, auto width) { launch<std::remove_pointer_t<decltype(type)>, width>(call, stream); });
}

}  // namespace nearfar
