// Selective synchronization attention where the keys are the queries: tiles of rows meet the cells that may lock with them.
//
// Warp groups have 64 rows each. While the weights of one step are multiplied with its values, a group turns the products of
// the next step into weights; several groups share the tensor cores and the special functions. A warp of a further group copies
// what they meet, in the order of the lists, into a ring of slots.
//
// log2 J^2, from products of 16-bit numbers, may exceed 0 by rounding. Nothing bounds it: the margin J^2 - c d^2 is saturated
// to [0, 1] where it is formed, for free, and is 1 at 0. Saturation hides NaN, so broken frequencies go another
// way: see copy_cells.
#include "synchronization.h"

#include <cstdint>

#include "common/fragments.cuh"
#include "common/ring.cuh"
#include "common/stream_launch.cuh"
#include "common/tensor.cuh"

namespace nearfar {
namespace {

constexpr int kCell = 64, kWidth = kSynchronizationWidth;
constexpr int kPanel = 128 * kCell;  // bytes of a cell of one tensor
constexpr float kNever = -1e30f;     // log2 J^2 of what is not there
constexpr float kEps = 1e-8f, kLargestC = 1e24f;

// kOwn, kOthers: tensors that a block has its rows of, and the cells it meets. kNumbers: of each token in a cell.
// kCells: at one step.
template <typename Number_, int kOwn_, int kOthers_, int kNumbers_, int kGroups_, int kCells_, int kStages_>
struct Shape {
    using Number = Number_;
    static constexpr int kOwn = kOwn_, kOthers = kOthers_, kNumbers = kNumbers_, kGroups = kGroups_, kCells = kCells_;
    static constexpr int kStages = kStages_, kRows = kCell * kGroups, kTile = kCell * kCells, kThreads = 128 * (kGroups + 1);
    static constexpr int kRegisters = kGroups == 2 ? 240 : 160, kProducerRegisters = kGroups == 2 ? 24 : 32;
    // Bytes from the start of shared memory: own rows, slots, numbers of the tokens in them with those of the cells, an even
    // count of numbers, and barriers.
    static constexpr int kSlotBytes = kOthers * kCells * kPanel, kNumberBytes = 4 * (kNumbers * kTile + 2 * kCells);
    static constexpr int kSlots = kOwn * kGroups * kPanel, kNumbersAt = kSlots + kStages * kSlotBytes;
    static constexpr int kBarriers = kNumbersAt + kStages * kNumberBytes;
    static constexpr int kBytes = kBarriers + Ring<kStages>::kBytes + 8;
    static_assert(kGroups == 2 || kGroups == 3);
};

template <int kTensors, int kNumbers>
struct Tokens {
    CUtensorMap tensor[kTensors];
    const float* number[kNumbers];  // of each token; the first are |w|^2
    const float *c, *bandwidth;
    const int32_t *lists, *counts;
    int heads, num_tokens, tiles, cells, bandwidth_stride;
};

template <typename Shape>
__device__ void make_barriers(uint32_t base) {
    const Ring<Shape::kStages> ring{base + Shape::kBarriers};
    if (threadIdx.x == 0) {
        ring.make(4 * Shape::kGroups, 2);
        make_barrier(ring.barriers + ring.kBytes, 1);
        publish_barriers();
    }
    __syncthreads();
}

// What is the same for all threads of a block.
template <typename Shape, typename Tokens>
struct Block {
    const Tokens& tokens;
    uint32_t base;
    char* memory;
    Ring<Shape::kStages> ring;
    int index, batch, head, tile;  // index: of the head among all
    const int32_t* list;
    int count, steps;
    float decay;

    // The last rows first: with causality they see most.
    __device__ Block(const Tokens& tokens, void* shared)
        : tokens(tokens), base(shared_address(shared)), memory(static_cast<char*>(shared)), ring{base + Shape::kBarriers},
          index(blockIdx.x / tokens.tiles), batch(index / tokens.heads), head(index % tokens.heads),
          tile(tokens.tiles - 1 - blockIdx.x % tokens.tiles) {
        const int64_t place = static_cast<int64_t>(index) * tokens.tiles + tile;
        list = tokens.lists + place * tokens.cells;
        count = tokens.counts[place];
        steps = (count + Shape::kCells - 1) / Shape::kCells;
        decay = load_decay();
    }

    // log2 J^2 of a squared distance of 1.
    __device__ float load_decay() const { return -2.0f * kLog2E * tokens.bandwidth[head * tokens.bandwidth_stride]; }

    __device__ uint32_t loaded() const { return base + Shape::kBarriers + Ring<Shape::kStages>::kBytes; }
    __device__ uint32_t own(int tensor, int group) const { return base + (tensor * Shape::kGroups + group) * kPanel; }
    __device__ uint32_t others(int step, int tensor) const {
        return base + Shape::kSlots + step % Shape::kStages * Shape::kSlotBytes + tensor * Shape::kCells * kPanel;
    }
    __device__ float* numbers(int step, int which) const {
        return reinterpret_cast<float*>(memory + Shape::kNumbersAt + step % Shape::kStages * Shape::kNumberBytes) +
               which * Shape::kTile;
    }
    __device__ int* cells(int step) const { return reinterpret_cast<int*>(numbers(step, Shape::kNumbers)); }
    // Place `place` of the list; a cell beyond all tokens behind its end.
    __device__ int cell(int place) const { return place < count ? list[place] : tokens.cells; }

    // A number of a token in this head.
    __device__ float number(int which, int token) const {
        if (token >= tokens.num_tokens) return which == 0 ? kNever : 0.0f;
        const float x = tokens.number[which][static_cast<int64_t>(index) * tokens.num_tokens + token];
        return which == 0 ? decay * x : x;
    }
};

// What one warp does for the others: it copies the block's own rows, and then step by step the cells that they meet and the
// numbers of their tokens. The squares of a cell with one that is not finite become NaN, all of them, so that a look at one of
// them tells.
template <typename Shape, typename Tokens>
__device__ void copy_cells(const Tokens& tokens, void* memory) {
    const Block<Shape, Tokens> block(tokens, memory);
    constexpr int kEach = Shape::kCells * kCell / 32;  // tokens of a lane, half a cell each
    const int lane = threadIdx.x % 32;
    if (lane == 0) {
        arrive_expecting(block.loaded(), Shape::kSlots);
        for (int i = 0; i < Shape::kOwn * Shape::kGroups; ++i)
            copy_box(block.base + i * kPanel, block.tokens.tensor[i / Shape::kGroups], 0,
                     block.tile * Shape::kRows + i % Shape::kGroups * kCell, block.head, block.batch, block.loaded());
    }
    int listed = 0;
    for (int step = 0; step < block.steps; ++step) {
        const int place = step * Shape::kCells;
        if (place % 32 == 0) listed = block.cell(place + lane);
        int cell[Shape::kCells];
        float number[Shape::kNumbers][kEach];
#pragma unroll
        for (int i = 0; i < Shape::kCells; ++i) cell[i] = __shfl_sync(kWholeWarp, listed, (place + i) % 32);
#pragma unroll
        for (int i = 0; i < Shape::kNumbers * kEach; ++i)
            number[i / kEach][i % kEach] = block.number(i / kEach, cell[i % kEach / 2] * kCell + i % 2 * 32 + lane);
        block.ring.wait_empty(step);
        if (lane == 0) {
            arrive_expecting(block.ring.full(step), Shape::kSlotBytes);
#pragma unroll
            for (int i = 0; i < Shape::kOthers * Shape::kCells; ++i)
                copy_box(block.others(step, 0) + i * kPanel, block.tokens.tensor[i / Shape::kCells], 0,
                         cell[i % Shape::kCells] * kCell, block.head, block.batch, block.ring.full(step));
        }
#pragma unroll
        for (int i = 0; i < Shape::kCells; ++i) {
            const float sum = number[0][2 * i] + number[0][2 * i + 1];
            if (__any_sync(kWholeWarp, !(fabsf(sum) < kInfinity))) number[0][2 * i] = number[0][2 * i + 1] = NAN;
        }
#pragma unroll
        for (int i = 0; i < Shape::kNumbers * kEach; ++i)
            block.numbers(step, i / kEach)[i % kEach * 32 + lane] = number[i / kEach][i % kEach];
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < Shape::kCells; ++i) block.cells(step)[i] = cell[i];
        }
        __syncwarp();
        if (lane == 0) arrive(block.ring.full(step));
    }
}

// What a warp group knows and does in either direction.
template <typename Shape, typename Tokens>
struct Group {
    const Block<Shape, Tokens>& block;
    int group, lane, row;  // row: the first of this lane's two among all tokens; the other one is 8 further

    __device__ explicit Group(const Block<Shape, Tokens>& block)
        : block(block), group(__shfl_sync(kWholeWarp, threadIdx.x / 128, 0)), lane(threadIdx.x % 32),
          row(block.tile * Shape::kRows + threadIdx.x / 32 * 16 + lane / 4) {}

    // A number of this lane's rows.
    __device__ void own_numbers(int which, float (&mine)[2]) const {
        for (int r = 0; r < 2; ++r) mine[r] = block.number(which, row + 8 * r);
    }

    // Products of this group's rows in one tensor with the others of a step in another one, all columns of both.
    __device__ __forceinline__ void start_scores(float (&score)[Shape::kTile / 2], int own, int others, int step) const {
        const uint64_t rows = panel_operand(block.own(own, group), 0), columns = panel_operand(block.others(step, others), 0);
#pragma unroll
        for (int i = 0; i < kWidth / 16; ++i)
            start_product<typename Shape::Number, Shape::kTile>(score, further(rows, 32 * i), further(columns, 32 * i), i > 0);
    }

    // sum += weights of the others of a step times their rows in one tensor.
    __device__ __forceinline__ void start_values(float (&sum)[kWidth / 2], const uint32_t (&weight)[Shape::kTile / 16][4],
                                                 int others, int step) const {
        const uint64_t rows = rows_operand(block.others(step, others), kPanel);
#pragma unroll
        for (int i = 0; i < Shape::kTile / 16; ++i)
            start_product_of_rows<typename Shape::Number, kWidth>(sum, weight[i], further(rows, 16 * 128 * i));
    }

    // How far the first token of a step's cell is behind the first row of the group.
    __device__ int behind(int step, int cell) const {
        return (block.cells(step)[cell] - block.tile * Shape::kGroups - group) * kCell;
    }

    // Stores this lane's share of the group's rows.
    __device__ void store(const float (&sum)[kWidth / 2], const Tensor<typename Shape::Number>& to) const {
        const int first = row - lane / 4;
        store_rows<typename Shape::Number, kWidth>(reinterpret_cast<const float(&)[kWidth / 8][4]>(sum), 1.0f, lane,
                                                   block.tokens.num_tokens - first, to.row,
                                                   to.at(block.batch, block.head) + first * to.row);
    }

    // Calls body(r, at) for the lane's rows, those that there are, in one lane of each; at: its place among rows of all heads.
    template <typename Body>
    __device__ void for_each_row(const Body& body) const {
        for (int r = 0; r < 2; ++r)
            if (lane % 4 == 0 && row + 8 * r < block.tokens.num_tokens)
                body(r, static_cast<int64_t>(block.index) * block.tokens.num_tokens + row + 8 * r);
    }
};

template <typename Shape>
__device__ __forceinline__ void round_to_words(uint32_t (&word)[Shape::kTile / 16][4], const float (&x)[Shape::kTile / 2]) {
#pragma unroll
    for (int i = 0; i < Shape::kTile / 4; ++i) word[i / 4][i % 4] = pack<typename Shape::Number>(x[2 * i], x[2 * i + 1]);
}

// A product of which log2 J^2 is 1e30, beside any squares.
__device__ __forceinline__ float product_of_far(float factor) { return fminf(-kNever / factor, 1e38f); }

template <typename Shape>
struct ForwardArguments {
    Tokens<Shape::kOthers, Shape::kNumbers> tokens;
    Tensor<typename Shape::Number> o;
    float* total;
    bool causal;
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) synchronization_forward_kernel(
    const __grid_constant__ ForwardArguments<Shape> arguments) {
    enum { kOmega, kValues };
    extern __shared__ __align__(1024) uint4 memory[];
    make_barriers<Shape>(shared_address(memory));
    if (threadIdx.x / 128 == Shape::kGroups) {
        release_registers<Shape::kProducerRegisters>();
        if (threadIdx.x % 128 < 32) copy_cells<Shape>(arguments.tokens, memory);
        return;
    }
    claim_registers<Shape::kRegisters>();

    const Block<Shape, decltype(arguments.tokens)> block(arguments.tokens, memory);
    const Group group(block);
    const int lane = group.lane;
    const float factor = -2.0f * block.decay;
    float square[2], slope[2], total[2];
    group.own_numbers(0, square);
    const float* const c = block.tokens.c + static_cast<int64_t>(block.index) * block.tokens.num_tokens;
    for (int r = 0; r < 2; ++r) {
        slope[r] = c[min(group.row + 8 * r, block.tokens.num_tokens - 1)] / -block.decay;
        total[r] = 0.0f * square[r] + 0.0f * slope[r];  // NaN where an input is broken
    }

    float score[1][Shape::kTile / 2], acc[1][kWidth / 2] = {};
    uint32_t weight[Shape::kTile / 16][4];
    const auto start_scores = [&](int step) {
        group.start_scores(score[0], kOmega, kOmega, step);
        commit_products();
    };
    const auto start_values = [&](int step) {
        group.start_values(acc[0], weight, kValues, step);
        commit_products();
    };
    // Products become weights: of one cell with its squares, `behind` the rows.
    const bool causal = arguments.causal;
    const auto weigh_cell = [&](float* score, const float* squares, int behind) {
        if (behind == 0 || (causal && behind > 0)) {  // a token is at distance 0 from itself
            const float apart = product_of_far(factor);
#pragma unroll
            for (int i = 0; i < kCell / 2; ++i) {
                const int ahead = behind + product_column(lane, i) - (group.row % kCell + i / 2 % 2 * 8);
                if (ahead == 0) score[i] = apart;
                else if (causal && ahead > 0) score[i] = -apart;
            }
        }
        float sum[2][2] = {};
#pragma unroll
        for (int i = 0; i < kCell / 2; ++i) {
            const int r = i / 2 % 2;
            const float x = fmaf(score[i], factor, square[r] + squares[product_column(lane, i)]);
            score[i] = sqrt_approximate(fma_saturated(slope[r], x, exp2_approximate(x)));
            sum[r][i % 2] += score[i];
        }
        // By cells, so that those without a weight change no bit.
        for (int r = 0; r < 2; ++r) total[r] += (sum[r][0] + sum[r][1]) + 0.0f * squares[product_column(lane, 0)];
    };
    const auto weigh = [&](int step) {
#pragma unroll
        for (int i = 0; i < Shape::kCells; ++i)
            weigh_cell(score[0] + i * kCell / 2, block.numbers(step, 0) + i * kCell, group.behind(step, i));
    };

    wait_for_barrier(block.loaded(), 0);
    if (block.steps > 0) {
#pragma unroll 1
        for (int step = 0; step < block.steps; ++step) {
            block.ring.wait_full(step);
            begin_products();
            start_scores(step);
            if (step > 0) {
                begin_products();
                start_values(step - 1);
                wait_for_products<1>(score);
            } else {
                wait_for_products<0>(score);
            }
            weigh(step);
            wait_for_products<0>(acc);
            if (step > 0) block.ring.leave(step - 1);
            round_to_words<Shape>(weight, score[0]);
        }
        begin_products();
        start_values(block.steps - 1);
        wait_for_products<0>(acc);
    }

    for (int r = 0; r < 2; ++r) total[r] = quad_sum(total[r]);
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) acc[0][i] *= 1.0f / (total[i / 2 % 2] + kEps);
    group.store(acc[0], arguments.o);
    group.for_each_row([&](int r, int64_t at) { arguments.total[at] = total[r]; });
}

// What is one for a head. Loaded anew where it is needed, rather than held in registers all the way.
struct Rates {
    float decay, two_alpha, c, unit;  // pulls are taken in this unit, lest half precision overflow: c may be large

    template <typename Block>
    __device__ explicit Rates(const Block& block)
        : decay(block.load_decay()), two_alpha(-kLn2 * decay),
          c(block.tokens.c[static_cast<int64_t>(block.index) * block.tokens.num_tokens]), unit(two_alpha + c) {}
};

template <typename Shape>
struct BackwardArguments {
    Tokens<Shape::kOthers, Shape::kNumbers> tokens;
    Tensor<typename Shape::Number> dw, dv;
    float *dalpha, *dradius;
    float steepest;
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) synchronization_backward_kernel(
    const __grid_constant__ BackwardArguments<Shape> arguments) {
    using Number = typename Shape::Number;
    enum { kOmega, kValues, kGradO };
    enum { kSquares, kInverse, kShift };
    extern __shared__ __align__(1024) uint4 memory[];
    make_barriers<Shape>(shared_address(memory));
    if (threadIdx.x / 128 == Shape::kGroups) {
        release_registers<Shape::kProducerRegisters>();
        if (threadIdx.x % 128 < 32) copy_cells<Shape>(arguments.tokens, memory);
        return;
    }
    claim_registers<Shape::kRegisters>();

    const Block<Shape, decltype(arguments.tokens)> block(arguments.tokens, memory);
    const Group group(block);
    const int lane = group.lane;
    const float factor = -2.0f * block.decay;
    const Rates rates(block);
    const float of_near = rates.two_alpha / rates.unit, of_all = rates.c / rates.unit, slope_c = rates.c / -rates.decay;
    float square[2], inverse[2], shift[2];
    group.own_numbers(kSquares, square);
    group.own_numbers(kInverse, inverse);
    group.own_numbers(kShift, shift);

    // Products of the rows with the others: omega with omega, grad_o with v, v with grad_o. Of these the weights of dv take the
    // place of the first, and pulls that of the second.
    float pair[3][kCell / 2], acc[2][kWidth / 2] = {}, pulls[4] = {}, dalpha[2] = {}, dradius[2] = {};
    uint32_t weight[kCell / 16][4], pull[kCell / 16][4];
    const auto start_pairs = [&](int step) {
        group.start_scores(pair[0], kOmega, kOmega, step);
        group.start_scores(pair[1], kGradO, kValues, step);
        group.start_scores(pair[2], kValues, kGradO, step);
        commit_products();
    };
    const auto start_sums = [&](int step) {
        group.start_values(acc[0], pull, kOmega, step);
        group.start_values(acc[1], weight, kGradO, step);
        commit_products();
    };
    const auto weigh = [&](int step) {
        if (group.behind(step, 0) == 0) {  // a token's own share of dv is added in the end
            const float apart = product_of_far(factor);
#pragma unroll
            for (int i = 0; i < kCell / 2; ++i)
                if (product_column(lane, i) == group.row % kCell + i / 2 % 2 * 8) pair[0][i] = -apart;
        }
        const float *const squares = block.numbers(step, kSquares), *const inverses = block.numbers(step, kInverse);
        const float* const shifts = block.numbers(step, kShift);
#pragma unroll
        for (int i = 0; i < kCell / 2; ++i) {
            const int r = i / 2 % 2, column = product_column(lane, i);
            const float x = fmaf(pair[0][i], factor, square[r] + squares[column]), near = exp2_approximate(x);
            const float margin = fma_saturated(slope_c, x, near);
            const float inverse_s = margin > 0 ? rsqrt_approximate(margin) : 0.0f;
            const float ds = fmaf(pair[1][i], inverse[r], fmaf(pair[2][i], inverses[column], -(shift[r] + shifts[column])));
            float slope = ds * fminf(inverse_s, arguments.steepest);
            pair[0][i] = margin * inverse_s * inverses[column];
            pair[1][i] = slope * fmaf(near, of_near, of_all);
            slope *= x;
            dradius[r] += slope;
            dalpha[r] = fmaf(slope, near, dalpha[r]);
        }
    };
    // The weights of w_j and the sum of them, the weight of w_i, are sums of the same rounded numbers: only so do they cancel
    // for tokens whose frequencies nearly agree.
    const auto round = [&] {
        round_to_words<Shape>(weight, pair[0]);
        round_to_words<Shape>(pull, pair[1]);
        const uint32_t ones = pack<Number>(1.0f, 1.0f);
#pragma unroll
        for (int i = 0; i < kCell / 16; ++i) mma<Number>(pulls, pull[i], ones, ones);
    };

    wait_for_barrier(block.loaded(), 0);
    if (block.steps > 0) {
#pragma unroll 1
        for (int step = 0; step < block.steps; ++step) {
            block.ring.wait_full(step);
            begin_products();
            start_pairs(step);
            if (step > 0) {
                begin_products();
                start_sums(step - 1);
                wait_for_products<1>(pair);
            } else {
                wait_for_products<0>(pair);
            }
            weigh(step);
            wait_for_products<0>(acc);
            if (step > 0) block.ring.leave(step - 1);
            round();
        }
        begin_products();
        start_sums(block.steps - 1);
        wait_for_products<0>(acc);
    }

    const Rates again(block);
    group.own_numbers(kInverse, inverse);
    const LaneOffsets<kWidth> offsets(lane);
    const auto own_rows = [&](int tensor, const auto& body) {
        uint32_t word[kWidth / 16][4];
        load_rows<kWidth>(word, block.own(tensor, group.group) + threadIdx.x % 128 / 32 * 16 * 128, offsets);
#pragma unroll
        for (int i = 0; i < kWidth / 4; ++i) {
            const float2 pair = unpack<Number>(word[i / 4][i % 4]);
            body(2 * i, i % 2, pair.x);
            body(2 * i + 1, i % 2, pair.y);
        }
    };
    own_rows(kOmega, [&](int i, int r, float w) { acc[0][i] = (acc[0][i] - pulls[2 * r] * w) * again.unit; });
    own_rows(kGradO, [&](int i, int r, float g) { acc[1][i] = fmaf(inverse[r], g, acc[1][i]); });
    group.store(acc[0], arguments.dw);
    group.store(acc[1], arguments.dv);
    // Every pair counts in the rows of both of its tokens. A c at its bound depends on neither K nor r.
    const float half = 0.5f / again.decay, of_radius = again.c == kLargestC ? 0.0f : half * again.c * sqrtf(again.c);
    for (int r = 0; r < 2; ++r) dalpha[r] = quad_sum(dalpha[r]), dradius[r] = quad_sum(dradius[r]);
    group.for_each_row([&](int r, int64_t at) {
        arguments.dalpha[at] = -half * dalpha[r];
        arguments.dradius[at] = of_radius * dradius[r];
    });
}

template <typename Number>
using Forward = Shape<Number, 1, 2, 1, kSynchronizationRows / kCell, 1, 4>;
template <typename Number>
using Backward = Shape<Number, 3, 3, 3, kSynchronizationGradRows / kCell, 1, 4>;

// data, strides: of omega, v and, in the backward, grad_o; numbers: squares and, in the backward, inverse and shift.
template <typename Shape, typename Call>
Tokens<Shape::kOthers, Shape::kNumbers> tokens_of(const Call& call, const std::array<const void*, Shape::kOthers>& data,
                                                  const std::array<std::array<int64_t, 3>, Shape::kOthers>& strides,
                                                  const std::array<const float*, Shape::kNumbers>& numbers) {
    Tokens<Shape::kOthers, Shape::kNumbers> tokens{};
    for (int i = 0; i < Shape::kOthers; ++i)
        tokens.tensor[i] = Rows{data[i], {call.batches, call.heads, call.num_tokens, kWidth}, strides[i]}
                               .template map<typename Shape::Number>(kCell);
    std::copy(numbers.begin(), numbers.end(), tokens.number);
    tokens.c = call.c, tokens.bandwidth = call.bandwidth, tokens.lists = call.lists, tokens.counts = call.counts;
    tokens.heads = static_cast<int>(call.heads), tokens.num_tokens = static_cast<int>(call.num_tokens);
    tokens.tiles = static_cast<int>((call.num_tokens + Shape::kRows - 1) / Shape::kRows);
    tokens.cells = static_cast<int>((call.num_tokens + kCell - 1) / kCell);
    tokens.bandwidth_stride = static_cast<int>(call.bandwidth_stride);
    return tokens;
}

template <auto kKernel, typename Shape, typename Arguments, typename Call>
void launch(const Arguments& arguments, const Call& call, cudaStream_t stream, const char* name) {
    resident_blocks<kKernel>(Shape::kThreads, Shape::kBytes);
    void* parameters[] = {const_cast<Arguments*>(&arguments)};
    const auto blocks = static_cast<unsigned>(call.batches * call.heads * arguments.tokens.tiles);
    check(cudaLaunchKernel(kKernel, dim3(blocks), dim3(Shape::kThreads), parameters, Shape::kBytes, stream), name);
}

}  // namespace

void synchronization_forward(const SynchronizationForward& call, DType dtype, cudaStream_t stream) {
    dispatch_stream(dtype, kWidth, [&](auto* type, auto width) {
        if constexpr (width == kWidth) {
            using Shape = Forward<std::remove_pointer_t<decltype(type)>>;
            const ForwardArguments<Shape> arguments{
                tokens_of<Shape>(call, {call.omega, call.v}, {call.omega_strides, call.v_strides}, {call.squares}),
                output_tensor<typename Shape::Number>(call.o, call.o_strides), call.total, call.causal != 0};
            launch<synchronization_forward_kernel<Shape>, Shape>(arguments, call, stream, "synchronization_forward launch");
        }
    });
}

void synchronization_backward(const SynchronizationBackward& call, DType dtype, cudaStream_t stream) {
    dispatch_stream(dtype, kWidth, [&](auto* type, auto width) {
        if constexpr (width == kWidth) {
            using Shape = Backward<std::remove_pointer_t<decltype(type)>>;
            using Number = typename Shape::Number;
            const BackwardArguments<Shape> arguments{
                tokens_of<Shape>(call, {call.omega, call.v, call.grad_o},
                                 {call.omega_strides, call.v_strides, call.grad_o_strides},
                                 {call.squares, call.inverse, call.shift}),
                output_tensor<Number>(call.dw, call.dw_strides), output_tensor<Number>(call.dv, call.dv_strides),
                call.dalpha, call.dradius, static_cast<float>(1.0 / call.grad_floor)};
            launch<synchronization_backward_kernel<Shape>, Shape>(arguments, call, stream, "synchronization_backward launch");
        }
    });
}

}  // namespace nearfar
