// Softmax attention with an affine epilogue: an online softmax over tiles of keys, the last one first.
//
// Two warp groups have 64 queries each. While the weights of one tile are multiplied with its values, a group turns the
// products of the next keys into weights, and rescales the sum behind it. One thread of a third group copies tiles ahead.
#include "softmax_forward.h"

#include <cstdint>

#include "common/fragments.cuh"
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
    static constexpr int kTile = 128, kStages = 2;  // keys at once
    static constexpr int kRegisters = 240, kProducerRegisters = 24;
    static constexpr int kPanel = 128 * kTile, kTileBytes = kPanels * kPanel;
    static_assert(kTile == kSoftmaxChunk);
    static_assert(kRows == kTile, "queries, keys and values have tiles of one size");
    // Bytes from the start of shared memory: queries, slots of keys and of values, and barriers.
    static constexpr int kKeys = kTileBytes, kValues = kKeys + kStages * kTileBytes, kBarriers = kValues + kStages * kTileBytes;
    static constexpr int kBytes = kBarriers + 8 * (4 * kStages + 1);
};

template <typename Number>
struct Arguments {
    CUtensorMap q, k, v;
    const float *alpha, *beta, *sink, *sums;
    Tensor<Number> o;
    Number* u;
    float* lse;
    Band band;
    int heads, group, tiles, together, total_heads;
    float factor;  // of products, in the exponent of 2
};

// Addresses of a block's barriers.
template <typename Shape>
struct Barriers {
    uint32_t base;
    enum Kind { kKeysFull, kKeysEmpty, kValuesFull, kValuesEmpty };

    __device__ uint32_t at(Kind kind, int step) const {
        return base + Shape::kBarriers + 8 * (kind * Shape::kStages + step % Shape::kStages);
    }
    __device__ uint32_t queries() const { return base + Shape::kBarriers + 8 * 4 * Shape::kStages; }

    __device__ void make() const {
        for (int slot = 0; slot < Shape::kStages; ++slot) {
            for (const auto full : {kKeysFull, kValuesFull}) make_barrier(at(full, slot), 1);
            for (const auto empty : {kKeysEmpty, kValuesEmpty}) make_barrier(at(empty, slot), 4 * Shape::kGroups);
        }
        make_barrier(queries(), 1);
        publish_barriers();
    }

    // Steps use slots in turn: of step `step`, the use before it has ended, or its own copies have come.
    __device__ void wait_empty(Kind kind, int step) const {
        if (step >= Shape::kStages) wait_for_barrier(at(kind, step), (step / Shape::kStages - 1) % 2);
    }
    __device__ void wait_full(Kind kind, int step) const { wait_for_barrier(at(kind, step), step / Shape::kStages % 2); }
};

// Results by tiles of 8 columns, as store_rows takes them.
template <int Count>
__device__ __forceinline__ const float (&tiles_of(const float (&c)[Count]))[Count / 4][4] {
    return reinterpret_cast<const float(&)[Count / 4][4]>(c);
}

// The tiles of keys that a block needs: all from `tiles` - 1 down to 0, and for the bias the values of those from `cut` on once
// more, which some of its queries do not see to the end. Those before `cut` are seen by all, and have running sums.
struct Extent {
    int tiles, cut;

    __device__ Extent(const Band& band, int first_row, int rows, int tile, bool biased)
        : tiles((max(0, band.end(first_row + rows - 1)) + tile - 1) / tile), cut(tiles) {
        const int seen_by_all = max(0, band.end(first_row));
        if (biased && seen_by_all < band.num_others) cut = min(tiles, seen_by_all / tile);
    }
};

template <typename Shape>
__device__ void copy_tile(const CUtensorMap& tensor, uint32_t to, int row, int head, int batch, uint32_t full) {
    arrive_expecting(full, Shape::kTileBytes);
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel)
        copy_box(to + panel * Shape::kPanel, tensor, 64 * panel, row, head, batch, full);
}

// What one thread does for the others: all copies, in the order of their use.
template <typename Shape>
__device__ void copy_tiles(const Arguments<typename Shape::Number>& arguments, const Barriers<Shape>& barriers,
                           const Extent& extent, int first_row, int batch, int head) {
    using B = Barriers<Shape>;
    const auto copy = [&](auto full, auto empty, const CUtensorMap& tensor, int slots, int step, int tile) {
        barriers.wait_empty(empty, step);
        copy_tile<Shape>(tensor, barriers.base + slots + step % Shape::kStages * Shape::kTileBytes, tile * Shape::kTile,
                         head / arguments.group, batch, barriers.at(full, step));
    };
    copy_tile<Shape>(arguments.q, barriers.base, first_row, head, batch, barriers.queries());
    int step = 0;
    for (; step < extent.tiles; ++step) {
        copy(B::kKeysFull, B::kKeysEmpty, arguments.k, Shape::kKeys, step, extent.tiles - 1 - step);
        copy(B::kValuesFull, B::kValuesEmpty, arguments.v, Shape::kValues, step, extent.tiles - 1 - step);
    }
    for (int tile = extent.cut; tile < extent.tiles; ++tile, ++step)
        copy(B::kValuesFull, B::kValuesEmpty, arguments.v, Shape::kValues, step, tile);
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
    const Band& band = arguments.band;

    // `together` heads side by side, so that L2 holds their keys and values; their last queries first, which see most.
    const int span = arguments.together * arguments.tiles, first_head = blockIdx.x / span * arguments.together;
    const int side_by_side = min(arguments.together, arguments.total_heads - first_head);
    const int index = first_head + blockIdx.x % span % side_by_side;
    const int batch = index / arguments.heads, head = index % arguments.heads, kv_head = head / arguments.group;
    const int first_row = (arguments.tiles - 1 - blockIdx.x % span / side_by_side) * Shape::kRows;
    const Extent extent(band, first_row, Shape::kRows, kTile, arguments.beta != nullptr);

    if (threadIdx.x == 0) barriers.make();
    __syncthreads();

    const int group = __shfl_sync(kWholeWarp, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    if (group == Shape::kGroups) {
        release_registers<Shape::kProducerRegisters>();
        if (threadIdx.x % 128 == 0) copy_tiles<Shape>(arguments, barriers, extent, first_row, batch, head);
        return;
    }
    claim_registers<Shape::kRegisters>();

    const int row = first_row + threadIdx.x / 32 * 16 + lane / 4;
    const int seen_by_all = band.end(first_row + 64 * group);
    const auto leave = [&](uint32_t barrier) {
        __syncwarp();
        if (lane == 0) arrive(barrier);
    };
    float score[1][kTile / 2], acc[1][kWidth / 2] = {}, decay[2];
    uint32_t weight[kSteps][4];
    Softmax softmax[2];
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
    const auto weigh_tile = [&](int tile) {
        const int first = tile * kTile, end[2] = {band.end(row) - first, band.end(row + 8) - first};
        weigh(score[0], softmax, decay, end, first + kTile > seen_by_all, arguments.factor, lane);
    };
    const auto round_weights = [&] {
#pragma unroll
        for (int i = 0; i < 4 * kSteps; ++i) weight[i / 4][i % 4] = pack<Number>(score[0][2 * i], score[0][2 * i + 1]);
    };

    wait_for_barrier(barriers.queries(), 0);
    if (extent.tiles > 0) {
        barriers.wait_full(B::kKeysFull, 0);
        begin_products();
        start_scores(0);
        wait_for_products<0>(score);
        leave(barriers.at(B::kKeysEmpty, 0));
        weigh_tile(extent.tiles - 1);
        round_weights();
#pragma unroll 1
        for (int step = 1; step < extent.tiles; ++step) {
            barriers.wait_full(B::kKeysFull, step);
            barriers.wait_full(B::kValuesFull, step - 1);
            begin_products();
            start_scores(step);
            start_values(acc[0], step - 1);
            wait_for_products<1>(score);
            leave(barriers.at(B::kKeysEmpty, step));
            weigh_tile(extent.tiles - 1 - step);
            wait_for_products<0>(acc);
            leave(barriers.at(B::kValuesEmpty, step - 1));
#pragma unroll
            for (int i = 0; i < kWidth / 2; ++i) acc[0][i] *= decay[i / 2 % 2];
            round_weights();
        }
        barriers.wait_full(B::kValuesFull, extent.tiles - 1);
        begin_products();
        start_values(acc[0], extent.tiles - 1);
        wait_for_products<0>(acc);
        leave(barriers.at(B::kValuesEmpty, extent.tiles - 1));
    }

    const int64_t numbers = static_cast<int64_t>(index) * band.num_rows;
    const int rows_left = band.num_rows - (row - lane / 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool sees_a_key = band.end(row + 8 * r) > 0;
        float top = sees_a_key ? softmax[r].highest : 0.0f, norm = quad_sum(softmax[r].norm), rescale = 1;
        if (arguments.sink != nullptr) {
            const float logit = arguments.sink[head] * kLog2E, highest = top;
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
        for (int tile = extent.cut, step = extent.tiles; tile < extent.tiles; ++tile, ++step) {
#pragma unroll
            for (int i = 0; i < 4 * kSteps; ++i) {
                const int key = tile * kTile + i / 4 * 16 + i % 4 / 2 * 8 + 2 * (lane % 4), end = band.end(row + i % 2 * 8);
                weight[i / 4][i % 4] = pack<Number>(key < end ? 1.0f : 0.0f, key + 1 < end ? 1.0f : 0.0f);
            }
            barriers.wait_full(B::kValuesFull, step);
            begin_products();
            start_values(bias[0], step);
            wait_for_products<0>(bias);
            leave(barriers.at(B::kValuesEmpty, step));
        }
        if (extent.cut > 0) {
            const int64_t kv_index = static_cast<int64_t>(batch) * (arguments.heads / arguments.group) + kv_head;
            const int chunks = (band.num_others + kTile - 1) / kTile;
            const float* const sums = arguments.sums + (kv_index * chunks + extent.cut - 1) * kWidth;
#pragma unroll
            for (int i = 0; i < kWidth / 2; ++i) bias[0][i] += sums[product_column(lane, i)];
        }
        float beta[2];
        of_rows(arguments.beta, beta);
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) acc[0][i] += beta[i / 2 % 2] * bias[0][i];
    }
    store_rows<Number, kWidth>(tiles_of(acc[0]), 1.0f, lane, rows_left, arguments.o.row,
                               arguments.o.at(batch, head) + (row - lane / 4) * arguments.o.row);
}

constexpr int64_t kShared = 1 << 24;  // bytes of keys and values side by side, a third of an H100's L2

template <typename Number, int Width>
void launch(const SoftmaxForward& call, cudaStream_t stream) {
    using Shape = Shape<Number, Width>;
    constexpr auto kKernel = softmax_forward_kernel<Shape>;
    const auto map = [&](const void* data, int64_t heads, int64_t rows, const std::array<int64_t, 3>& strides) {
        return Rows{data, {call.batches, heads, rows, Width}, strides}.template map<Number>(Shape::kTile);
    };
    const int64_t group = call.heads / call.kv_heads, heads = call.batches * call.heads;
    const int64_t tiles = (call.num_queries + Shape::kRows - 1) / Shape::kRows;
    const int64_t bytes = std::max<int64_t>(1, call.num_keys * 4 * Width);  // of the keys and values of a head
    const int64_t together = std::min(heads, group * std::max<int64_t>(1, kShared / bytes));
    const Arguments<Number> arguments{map(call.q, call.heads, call.num_queries, call.q_strides),
                              map(call.k, call.kv_heads, call.num_keys, call.k_strides),
                              map(call.v, call.kv_heads, call.num_keys, call.v_strides),
                              call.alpha, call.beta, call.sink, call.sums, output_tensor<Number>(call.o, call.o_strides),
                              static_cast<Number*>(call.u), call.lse,
                              Sight{call.num_queries, call.num_keys, -1, call.right}.of_queries(),
                              static_cast<int>(call.heads), static_cast<int>(group), static_cast<int>(tiles),
                              static_cast<int>(together), static_cast<int>(heads), static_cast<float>(call.scale) * kLog2E};
    resident_blocks<kKernel>(Shape::kThreads, Shape::kBytes);
    void* parameters[] = {const_cast<Arguments<Number>*>(&arguments)};
    const dim3 blocks(static_cast<unsigned>(heads * tiles)), threads(Shape::kThreads);
    check(cudaLaunchKernel(kKernel, blocks, threads, parameters, Shape::kBytes, stream), "softmax_forward launch");
}

}  // namespace

void softmax_forward(const SoftmaxForward& call, DType dtype, cudaStream_t stream) {
    dispatch_stream(dtype, call.width,
                    [&](auto* type, auto width) { launch<std::remove_pointer_t<decltype(type)>, width>(call, stream); });
}

}  // namespace nearfar
