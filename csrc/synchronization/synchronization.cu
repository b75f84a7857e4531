// Selective synchronization attention for keys that are the queries: tiles of rows visit the cells that may lock with them.
//
// Warp groups have 64 rows each. While the weights of one cell are multiplied with its values, a group turns the products of
// the next one into weights; several groups share the tensor cores and the special functions. Warps of a further group copy
// the cells, in the order of the lists, into a pipeline. A group skips the cells that only other groups need. Blocks take one
// tile after the other (spans.cuh).
//
// log2 J^2, from products of 16-bit numbers, may exceed 0 by rounding. It needs no bound, because the margin J^2 - c d^2 is
// saturated to [0, 1] by the instruction that forms it. Saturation hides NaN, so frequencies that are not finite are marked
// separately: see copy_cells.
#include "synchronization/synchronization.h"

#include <cstdint>

#include "common/fragments.cuh"
#include "common/pairs_launch.cuh"
#include "common/spans_launch.cuh"
#include "synchronization/walk.cuh"

namespace nearfar {
namespace {

// State and steps of a warp group in the block's nth span, for both directions.
template <typename Traits, typename Tokens>
struct Group {
    const Block<Traits, Tokens>& block;
    Span span;
    int nth, group, lane;

    // Call after its rows have arrived.
    __device__ Group(const Block<Traits, Tokens>& block, int nth, int number)
        : block(block), span(block.tokens, number), nth(nth), group(__shfl_sync(kWholeWarp, threadIdx.x / 128, 0)),
          lane(threadIdx.x % 32) {
        block.own_pipeline.wait_full(nth);
    }

    // The first of this lane's two rows in the tile; the other one is 8 further.
    __device__ int local_row() const { return threadIdx.x / 32 * 16 + lane / 4; }
    __device__ int row() const { return span.tile * Traits::kRows + local_row(); }

    // A number of this lane's rows.
    __device__ void own_numbers(int which, float (&mine)[2]) const {
        for (int r = 0; r < 2; ++r) mine[r] = block.own_numbers(nth, which)[local_row() + 8 * r];
    }

    // Products of this group's rows in one tensor with the cell of a step in another tensor, over all columns.
    __device__ __forceinline__ void start_scores(float (&score)[kCell / 2], int own, int others, int step) const {
        const uint64_t rows = panel_operand(block.own(nth, own, group), 0);
        const uint64_t columns = panel_operand(block.others(step, others), 0);
#pragma unroll
        for (int i = 0; i < kWidth / 16; ++i)
            start_product<typename Traits::Number, kCell>(score, further(rows, 32 * i), further(columns, 32 * i), i > 0);
    }

    // sum += weights of the cell of a step times its rows in one tensor.
    __device__ __forceinline__ void start_values(float (&sum)[kWidth / 2], const uint32_t (&weight)[kCell / 16][4], int others,
                                                 int step) const {
        const uint64_t rows = rows_operand(block.others(step, others), kPanel);
#pragma unroll
        for (int i = 0; i < kCell / 16; ++i)
            start_product_of_rows<typename Traits::Number, kWidth>(sum, weight[i], further(rows, 16 * 128 * i));
    }

    // Whether some of the group's rows may lock with the cell of a step, and how far its first token is behind the first row.
    __device__ bool meets(int step) const { return block.entry(step) >> (kSynchronizationMembers + group) & 1; }
    __device__ int behind(int step) const {
        return (cell_of(block.entry(step)) - span.tile * Traits::kGroups - group) * kCell;
    }

    // Visits the steps of the span. Pairs are products of the group's rows with one cell; weigh turns them into weights, and
    // round rounds the weights for the sums. The sums of one cell run beside the pairs of the group's next cell; then the slot
    // is released.
    template <int kPairs, int kSums, typename StartPairs, typename StartSums, typename Weigh, typename Round>
    __device__ __forceinline__ void walk(int step, int end, float (&pair)[kPairs][kCell / 2], float (&sum)[kSums][kWidth / 2],
                                         const StartPairs& start_pairs, const StartSums& start_sums, const Weigh& weigh,
                                         const Round& round) const {
        constexpr int kNone = -1;
        int last = kNone;  // of the steps that it met: its sums have yet to start
        const auto finish = [&] {
            begin_products();
            start_sums(last);
            wait_for_products<0>(sum);
            block.pipeline.release(last);
            last = kNone;
        };
#pragma unroll 1
        for (; step < end; ++step) {
            block.pipeline.wait_full(step);
            if (!meets(step)) {
                if (last != kNone) finish();  // release the stage before the producer needs it again
                block.pipeline.release(step);
                continue;
            }
            begin_products();
            start_pairs(step);
            if (last != kNone) {
                begin_products();
                start_sums(last);
                wait_for_products<1>(pair);
            } else {
                wait_for_products<0>(pair);
            }
            weigh(step);
            wait_for_products<0>(sum);
            if (last != kNone) block.pipeline.release(last);
            round();
            last = step;
        }
        if (last != kNone) finish();
    }

    // Leaves its rows and what came with them, and returns the number of the next span.
    __device__ int release() const {
        const int number = block.next.wait(nth);
        block.own_pipeline.release(nth);
        return number;
    }

    // Stores this lane's share of the group's rows.
    __device__ void store(const float (&sum)[kWidth / 2], const Tensor<typename Traits::Number>& to) const {
        const int first = row() - lane / 4;
        store_rows<typename Traits::Number, kWidth>(tiles_of(sum), 1.0f, lane, block.tokens.num_tokens - first, to.row,
                                                    to.at(span.batch, span.head) + first * to.row);
    }

    // Calls body(r, at) for the lane's rows, those that there are, in one lane of each; at: its place among rows of all heads.
    template <typename Body>
    __device__ void for_each_row(const Body& body) const {
        for (int r = 0; r < 2; ++r)
            if (lane % 4 == 0 && row() + 8 * r < block.tokens.num_tokens)
                body(r, static_cast<int64_t>(span.index) * block.tokens.num_tokens + row() + 8 * r);
    }
};

// A product of which log2 J^2 is 1e30, beside any squares.
__device__ __forceinline__ float product_of_far(float factor) { return fminf(-kNever / factor, 1e38f); }

template <typename Traits>
struct ForwardArguments : Tokens<Traits::kOthers, Traits::kOwnNumbers> {
    Tensor<typename Traits::Number> o;
    float* total;
    bool causal;
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) synchronization_forward_kernel(
    const __grid_constant__ ForwardArguments<Traits> arguments) {
    enum { kOmega, kValues };
    enum { kSquares, kC };
    extern __shared__ __align__(1024) uint4 memory[];
    const Block<Traits, ForwardArguments<Traits>> block(arguments, memory);
    block.init_barriers();
    if (threadIdx.x / 128 == Traits::kGroups) {
        release_registers<Traits::kCopyingRegisters>();
        copy(block);
        return;
    }
    claim_registers<Traits::kRegisters>();

    int step = 0, number = blockIdx.x;
#pragma unroll 1
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Group group(block, nth, number);
        const int lane = group.lane;
        const Common common = block.common(nth);
        const float factor = -2.0f * common.decay;
        float square[2], slope[2], total[2];
        group.own_numbers(kSquares, square);
        group.own_numbers(kC, slope);
        for (int r = 0; r < 2; ++r) {
            slope[r] /= -common.decay;
            total[r] = 0.0f * square[r] + 0.0f * slope[r];  // NaN where an input is broken
        }

        float score[1][kCell / 2], acc[1][kWidth / 2] = {};
        uint32_t weight[kCell / 16][4];
        const auto start_scores = [&](int step) {
            group.start_scores(score[0], kOmega, kOmega, step);
            commit_products();
        };
        const auto start_values = [&](int step) {
            group.start_values(acc[0], weight, kValues, step);
            commit_products();
        };
        const bool causal = arguments.causal;
        const auto weigh = [&](int step) {
            const int behind = group.behind(step);
            if (behind == 0 || (causal && behind > 0)) {  // a token is at distance 0 from itself
                const float apart = product_of_far(factor);
#pragma unroll
                for (int i = 0; i < kCell / 2; ++i) {
                    const int ahead = behind + product_column(lane, i) - (group.local_row() % kCell + i / 2 % 2 * 8);
                    if (ahead == 0) score[0][i] = apart;
                    else if (causal && ahead > 0) score[0][i] = -apart;
                }
            }
            const float* const squares = block.numbers(step, kSquares);
            float sum[2][2] = {};
#pragma unroll
            for (int i = 0; i < kCell / 2; ++i) {
                const int r = i / 2 % 2;
                const float x = fmaf(score[0][i], factor, square[r] + squares[product_column(lane, i)]);
                score[0][i] = sqrt_approximate(fma_saturated(slope[r], x, exp2_approximate(x)));
                sum[r][i % 2] += score[0][i];
            }
            // By cells, so that those without a weight change no bit.
            for (int r = 0; r < 2; ++r) total[r] += (sum[r][0] + sum[r][1]) + 0.0f * squares[product_column(lane, 0)];
        };
        const auto round = [&] { round_products<typename Traits::Number>(weight, score[0]); };
        group.walk(step, step + common.count, score, acc, start_scores, start_values, weigh, round);
        step += common.count;
        number = group.release();

        for (int r = 0; r < 2; ++r) total[r] = quad_sum(total[r]);
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) acc[0][i] *= 1.0f / (total[i / 2 % 2] + kEps);
        group.store(acc[0], arguments.o);
        group.for_each_row([&](int r, int64_t at) { arguments.total[at] = total[r]; });
    }
}

// What is one for a head.
struct Rates {
    float decay, two_alpha, c, unit;  // unit of the pulls, so that they do not overflow in half precision: c may be large

    __device__ explicit Rates(const Common& common)
        : decay(common.decay), two_alpha(-kLn2 * decay), c(common.c), unit(two_alpha + c) {}
};

template <typename Traits>
struct BackwardArguments : Tokens<Traits::kOthers, Traits::kOwnNumbers> {
    Tensor<typename Traits::Number> dw, dv;
    float *dalpha, *dradius;
    float steepest;
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) synchronization_backward_kernel(
    const __grid_constant__ BackwardArguments<Traits> arguments) {
    using Number = typename Traits::Number;
    enum { kOmega, kValues, kGradO };
    enum { kSquares, kInverse, kShift };
    extern __shared__ __align__(1024) uint4 memory[];
    const Block<Traits, BackwardArguments<Traits>> block(arguments, memory);
    block.init_barriers();
    if (threadIdx.x / 128 == Traits::kGroups) {
        release_registers<Traits::kCopyingRegisters>();
        copy(block);
        return;
    }
    claim_registers<Traits::kRegisters>();

    int step = 0, number = blockIdx.x;
#pragma unroll 1
    for (int nth = 0; number < arguments.spans.count(); ++nth) {
        const Group group(block, nth, number);
        const int lane = group.lane;
        const Rates rates(block.common(nth));
        const float factor = -2.0f * rates.decay, slope_c = rates.c / -rates.decay;
        const float of_near = rates.two_alpha / rates.unit, of_all = rates.c / rates.unit;
        float square[2], inverse[2], shift[2];
        group.own_numbers(kSquares, square);
        group.own_numbers(kInverse, inverse);
        group.own_numbers(kShift, shift);
        // Where the lock radius is below the rounding of distances, whether another token locks is noise: no gradient.
        float steepest[2];
        for (int r = 0; r < 2; ++r)
            steepest[r] = rates.c * (square[r] / rates.decay) * kRounding > 1 ? 0.0f : arguments.steepest;

        // Products of the rows with a cell: omega with omega, grad_o with v, v with grad_o. The weights of dv overwrite the
        // first, and the pulls the second.
        float pair[3][kCell / 2], acc[2][kWidth / 2] = {}, pulls[4] = {}, dalpha[2] = {}, dradius[2] = {};
        // To correct the error that rounding o leaves in the shift: the rows' sums of S dS as queries, which measure it, and
        // the derivatives of the parameter gradients with respect to the shift.
        float balance[2] = {}, dalpha_by_shift[2] = {}, dradius_by_shift[2] = {};
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
            if (group.behind(step) == 0) {  // a token's contribution to its own dv is added at the end
                const float apart = product_of_far(factor);
#pragma unroll
                for (int i = 0; i < kCell / 2; ++i) {
                    const int r = i / 2 % 2;
                    if (product_column(lane, i) == group.local_row() % kCell + r * 8) {
                        pair[0][i] = -apart;
                        balance[r] += fmaf(pair[1][i], inverse[r], -shift[r]);
                    }
                }
            }
            const float *const squares = block.numbers(step, kSquares), *const inverses = block.numbers(step, kInverse);
            const float* const shifts = block.numbers(step, kShift);
#pragma unroll
            for (int i = 0; i < kCell / 2; ++i) {
                const int r = i / 2 % 2, column = product_column(lane, i);
                const float x = fmaf(pair[0][i], factor, square[r] + squares[column]), near = exp2_approximate(x);
                const float margin = fma_saturated(slope_c, x, near);
                const float inverse_s = margin > 0 ? rsqrt_approximate(margin) : 0.0f;
                const float s = margin * inverse_s, steep = fminf(inverse_s, steepest[r]), steep_x = steep * x;
                dradius_by_shift[r] += steep_x;
                dalpha_by_shift[r] = fmaf(steep_x, near, dalpha_by_shift[r]);
                const float own_ds = fmaf(pair[1][i], inverse[r], -shift[r]);
                balance[r] = fmaf(s, own_ds, balance[r]);
                pair[0][i] = s * inverses[column];
                float slope = own_ds + fmaf(pair[2][i], inverses[column], -shifts[column]);
                pair[1][i] = slope * steep * fmaf(near, of_near, of_all);
                slope *= steep_x;
                dradius[r] += slope;
                dalpha[r] = fmaf(slope, near, dalpha[r]);
            }
        };
        // The weights of w_j and the sum of them, the weight of w_i, are sums of the same rounded numbers: only so do they
        // cancel for tokens whose frequencies nearly agree.
        const auto round = [&] {
            round_products<typename Traits::Number>(weight, pair[0]);
            round_products<typename Traits::Number>(pull, pair[1]);
            const uint32_t ones = pack<Number>(1.0f, 1.0f);
#pragma unroll
            for (int i = 0; i < kCell / 16; ++i) mma<Number>(pulls, pull[i], ones, ones);
        };
        const int end = step + block.common(nth).count;
        group.walk(step, end, pair, acc, start_pairs, start_sums, weigh, round);
        step = end;

        // Loaded again, to save registers.
        const Rates again(block.common(nth));
        group.own_numbers(kInverse, inverse);
        group.own_numbers(kShift, shift);
        const LaneOffsets<kWidth> offsets(lane);
        const auto own_rows = [&](int tensor, const auto& body) {
            uint32_t word[kWidth / 16][4];
            load_rows<kWidth>(word, block.own(nth, tensor, group.group) + threadIdx.x % 128 / 32 * 16 * 128, offsets);
#pragma unroll
            for (int i = 0; i < kWidth / 4; ++i) {
                const float2 pair = unpack<Number>(word[i / 4][i % 4]);
                body(2 * i, i % 2, pair.x);
                body(2 * i + 1, i % 2, pair.y);
            }
        };
        own_rows(kOmega, [&](int i, int r, float w) { acc[0][i] = (acc[0][i] - pulls[2 * r] * w) * again.unit; });
        own_rows(kGradO, [&](int i, int r, float g) { acc[1][i] = fmaf(inverse[r], g, acc[1][i]); });
        number = group.release();
        group.store(acc[0], arguments.dw);
        group.store(acc[1], arguments.dv);
        // Every pair counts in the rows of both of its tokens, and so does the error of each one's shift. A c at its bound
        // depends on neither K nor r.
        const float half = 0.5f / again.decay, of_radius = again.c == kLargestC ? 0.0f : half * again.c * sqrtf(again.c);
        for (int r = 0; r < 2; ++r) {
            const float error = inverse[r] * (quad_sum(balance[r]) - kEps * shift[r]);
            dalpha[r] = quad_sum(fmaf(-2.0f * error, dalpha_by_shift[r], dalpha[r]));
            dradius[r] = quad_sum(fmaf(-2.0f * error, dradius_by_shift[r], dradius[r]));
        }
        group.for_each_row([&](int r, int64_t at) {
            arguments.dalpha[at] = -half * dalpha[r];
            arguments.dradius[at] = of_radius * dradius[r];
        });
    }
}

template <typename Number>
using Forward = Traits<Number, 1, 2, 2, 1, kSynchronizationRows / kCell, 8>;
template <typename Number>
using Backward = Traits<Number, 3, 3, 3, 3, kSynchronizationGradRows / kCell, 4>;

// data, strides: of omega, v and, in the backward, grad_o; numbers: squares and c or, in the backward, inverse and shift.
template <typename Traits, typename Call>
Tokens<Traits::kOthers, Traits::kOwnNumbers> tokens_of(const Call& call, const std::array<const void*, Traits::kOthers>& data,
                                                       const std::array<std::array<int64_t, 3>, Traits::kOthers>& strides,
                                                       const std::array<const float*, Traits::kOwnNumbers>& numbers) {
    Tokens<Traits::kOthers, Traits::kOwnNumbers> tokens{};
    for (int i = 0; i < Traits::kOthers; ++i)
        tokens.tensor[i] = Rows{data[i], {call.batches, call.heads, call.num_tokens, kWidth}, strides[i]}
                               .template map<typename Traits::Number>(kCell);
    std::copy(numbers.begin(), numbers.end(), tokens.number);
    tokens.c = call.c, tokens.bandwidth = call.bandwidth, tokens.lists = call.lists, tokens.counts = call.counts;
    tokens.counter = call.counter;
    tokens.spans = make_spans(call.num_tokens, Traits::kRows, call.batches * call.heads, 1,
                              Traits::kOthers * 2 * kWidth * call.num_tokens);
    tokens.heads = static_cast<int>(call.heads), tokens.num_tokens = static_cast<int>(call.num_tokens);
    tokens.cells = static_cast<int>((call.num_tokens + kCell - 1) / kCell);
    tokens.bandwidth_stride = static_cast<int>(call.bandwidth_stride);
    return tokens;
}

template <auto kKernel, typename Traits, typename Arguments>
void launch(Arguments& arguments, cudaStream_t stream, const char* name) {
    NEARFAR_CHECK(cudaMemsetAsync(arguments.counter, 0, sizeof(int), stream));
    launch_spans<kKernel, Traits>(arguments, stream, name);
}

}  // namespace

void synchronization_forward(const SynchronizationForward& call, DType dtype, cudaStream_t stream) {
    dispatch_hopper(dtype, kWidth, [&](auto* type, auto width) {
        if constexpr (width == kWidth) {
            using Traits = Forward<std::remove_pointer_t<decltype(type)>>;
            ForwardArguments<Traits> arguments{
                tokens_of<Traits>(call, {call.omega, call.v}, {call.omega_strides, call.v_strides}, {call.squares, call.c}),
                output_tensor<typename Traits::Number>(call.o, call.o_strides), call.total, call.causal != 0};
            launch<synchronization_forward_kernel<Traits>, Traits>(arguments, stream, "synchronization_forward launch");
        }
    });
}

void synchronization_backward(const SynchronizationBackward& call, DType dtype, cudaStream_t stream) {
    dispatch_hopper(dtype, kWidth, [&](auto* type, auto width) {
        if constexpr (width == kWidth) {
            using Traits = Backward<std::remove_pointer_t<decltype(type)>>;
            using Number = typename Traits::Number;
            BackwardArguments<Traits> arguments{
                tokens_of<Traits>(call, {call.omega, call.v, call.grad_o},
                                  {call.omega_strides, call.v_strides, call.grad_o_strides},
                                  {call.squares, call.inverse, call.shift}),
                output_tensor<Number>(call.dw, call.dw_strides), output_tensor<Number>(call.dv, call.dv_strides),
                call.dalpha, call.dradius, static_cast<float>(1.0 / call.grad_floor)};
            launch<synchronization_backward_kernel<Traits>, Traits>(arguments, stream, "synchronization_backward launch");
        }
    });
}

}  // namespace nearfar
