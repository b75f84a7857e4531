// The gradients of causal Hadamard attention with two factors: two walks, like those of linear/causal_backward.cu.
#include "hadamard/causal_backward.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "hadamard/causal_walk.cuh"

namespace nearfar {
namespace {

using BackwardWalk = HadamardWalk<2>;

// Bytes from the start of shared memory: the pipeline, the states behind this chunk and behind the next, and numbers for
// tokens.
struct Memory {
    static constexpr int kQueries = 0, kKeys = BackwardWalk::kFactorsBytes, kValues = 2 * BackwardWalk::kFactorsBytes;
    static constexpr int kGrads = kValues + BackwardWalk::kValuesBytes;
    static constexpr int kSlotBytes = kGrads + BackwardWalk::kValuesBytes;
    static constexpr int kStates = BackwardWalk::kStages * kSlotBytes;
    static constexpr int kNumbers = kStates + 2 * BackwardWalk::kStateBytes;
    static constexpr int kBytes = kNumbers + 2 * BackwardWalk::kChunk * 4;
    __device__ static int state(int chunk) { return kStates + chunk % 2 * BackwardWalk::kStateBytes; }
};

// Rounds the gradients of both factors of 16 rows, times `factor` and phi'.
template <typename Map>
__device__ __forceinline__ void store_factor_grads(float (&first)[2][4], float (&second)[2][4], const float (&factor)[2],
                                                   uint32_t rows, const Tensor<Number>& d_first, const Tensor<Number>& d_second,
                                                   const Piece& piece, int first_row, int lane) {
    const auto store = [&](float(&c)[2][4], const Tensor<Number>& to, int which) {
        multiply_by_slopes<Map>(c, factor, rows, LaneOffsets<2 * kFactor>(lane, which));
        store_rows<Number, kFactor>(c, 1.0f, lane, piece.end - first_row, to.row,
                                    to.at(piece.batch, piece.head) + first_row * to.row);
    };
    store(first, d_first, 0);
    store(second, d_second, 1);
}

// ------------------------------------------------------------------------------------------------------------ queries

struct QueryArguments {
    Factors q, k;
    Tensor<const Number> v, grad_o;
    Tensor<Number> dq1, dq2;
    const float *inverse, *states, *norms;
    float* weights;
    const int32_t* pieces;
    int heads, group, num_tokens, num_pieces, piece_length;
    float eps;
};

template <typename Map>
__global__ void __launch_bounds__(BackwardWalk::kThreads, 1)
hadamard_causal_grad_queries_kernel(const __grid_constant__ QueryArguments arguments) {
    extern __shared__ __align__(128) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int num_chunks = piece.chunks(BackwardWalk::kChunk);
    const int kv_head = piece.head / arguments.group;
    const Role<BackwardWalk> role(threadIdx.x);
    const TileOffsets offsets(role.lane);
    const int own_factors = role.block * BackwardWalk::kFactorsBlock, own_values = role.block * BackwardWalk::kValuesBlock;

    const Number* const v = arguments.v.at(piece.batch, kv_head);
    const Number* const grad_o = arguments.grad_o.at(piece.batch, piece.head);
    const int64_t row_offset = (static_cast<int64_t>(piece.batch) * arguments.heads + piece.head) * arguments.num_tokens;

    const auto fetch = [&](int chunk) {
        if (chunk < num_chunks) {
            const int first = piece.begin + chunk * BackwardWalk::kChunk + role.own;
            const uint32_t slot = base + chunk % BackwardWalk::kStages * Memory::kSlotBytes;
            const auto rows = [&](int tile, const Number* x, int64_t stride) {
                copy_rows<kValueWidth, 16, 32>(slot + tile + own_values, x, stride, first, piece.end, role.lane);
            };
            arguments.k.copy_own_rows(slot + Memory::kKeys + own_factors, piece.batch, kv_head, first, piece.end, role.lane);
            rows(Memory::kGrads, grad_o, arguments.grad_o.row);
            rows(Memory::kValues, v, arguments.v.row);
            arguments.q.copy_own_rows(slot + Memory::kQueries + own_factors, piece.batch, piece.head, first, piece.end,
                                      role.lane);
        }
        commit_copies();
    };
    for (int chunk = 0; chunk < BackwardWalk::kStages - 1; ++chunk) fetch(chunk);

    HadamardState state(role);
    if (arguments.states != nullptr) {
        const int64_t head = static_cast<int64_t>(piece.batch) * (arguments.heads / arguments.group) + kv_head;
        state.load(arguments.states, arguments.norms, head * arguments.num_pieces + piece.index);
    }
    state.store(bytes + Memory::state(0));

#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const int first_row = piece.begin + chunk * BackwardWalk::kChunk + 16 * role.block, rows_left = piece.end - first_row;
        const int slot = chunk % BackwardWalk::kStages * Memory::kSlotBytes;
        uint32_t query[2][4], grad[kValueWidth / 16][4];
        float factor[2] = {1.0f, 1.0f}, common[2] = {}, rest[2] = {};  // as in linear/causal_backward.cu; rest by u^2
        if (arguments.inverse != nullptr) {
            for (int r = 0; r < 2; ++r) {
                const int row = role.quad + 8 * r;
                factor[r] = row < rows_left ? arguments.inverse[row_offset + first_row + row] : 0.0f;
            }
        }
        wait_for_groups<BackwardWalk::kStages - 2>();
        change_own_rows<OwnTile<2 * kFactor>>(bytes + slot + Memory::kKeys + own_factors, role.lane,
                                              [](uint32_t word, int) { return map_word<Map>(word); });
        __syncwarp();
        load_features<Map>(query, base + slot + Memory::kQueries + own_factors, offsets.factors);
        load_rows<kValueWidth>(grad, base + slot + Memory::kGrads + own_values, offsets.values);
        __syncthreads();
        fetch(chunk + BackwardWalk::kStages - 1);

        const uint32_t keys = base + slot + Memory::kKeys, values = base + slot + Memory::kValues;
        const uint32_t before = base + Memory::state(chunk);
        // Sums over j <= i: u^r_i of (dO_i . v_j - c_i) (x^s_i . y^s_j) y^r_j, with c_i the mean of dO_i . v_j in its block, and
        // z^r_i of the same without dO_i . v_j - c_i.
        float own[2][4] = {}, u1[2][4], u2[2][4], z1[2][4] = {}, z2[2][4] = {};
        const auto slopes = [&](float(&slope)[2][4], int block) {
            multiply_transposed<Number, kValueWidth>(slope, grad, values + block * BackwardWalk::kValuesBlock, 0,
                                                     offsets.values);
        };
        slopes(own, role.block);
        if (arguments.inverse != nullptr) take_means(own, common, role.quad, role.pair);
        add_first_norms(z1, query, before + BackwardWalk::kStateNorms, offsets.factors);
        add_second_norms(z2, query, before + BackwardWalk::kStateNorms, offsets.factors);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            u1[i / 4][i % 4] = -common[i / 2 % 2] * z1[i / 4][i % 4];
            u2[i / 4][i % 4] = -common[i / 2 % 2] * z2[i / 4][i % 4];
        }
        spread_state(u1, u2, query, grad, before, offsets.values, role.lane);
        const auto add_pairs = [&](const float(&slope)[2][4], int block, bool diagonal) {
            const uint32_t others = keys + block * BackwardWalk::kFactorsBlock;
            float weights[2][2][4], of_pair[2][4];
            similarities(weights, query, others, offsets.factors);
            if (diagonal) {
                mask_diagonal<false>(weights[0], role.quad, role.pair);
                mask_diagonal<false>(weights[1], role.quad, role.pair);
            }
            add_factor(z1, weights[1], others, 0, offsets.factors);
            add_factor(z2, weights[0], others, 1, offsets.factors);
            multiply_elements(of_pair, slope, weights[1]);
            add_factor(u1, of_pair, others, 0, offsets.factors);
            multiply_elements(of_pair, slope, weights[0]);
            add_factor(u2, of_pair, others, 1, offsets.factors);
        };
#pragma unroll 1
        for (int block = 0; block < role.block; ++block) {
            float slope[2][4];
#pragma unroll
            for (int i = 0; i < 8; ++i) slope[i / 4][i % 4] = -common[i / 2 % 2];
            slopes(slope, block);
            add_pairs(slope, block, false);
        }
        add_pairs(own, role.block, true);

        // phi(q^r_i) . u^r_i is the same for both factors but for roundings; its own cancel in each.
        const auto subtract_rest = [&](float(&u)[2][4], const float(&z)[2][4], const uint32_t(&x)[4]) {
            for (int r = 0; r < 2; ++r) rest[r] = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 two = unpack<Number>(x[i]);
                const float* const at = u[i / 2] + i % 2 * 2;
                rest[i % 2] += two.x * at[0] + two.y * at[1];
            }
            for (int r = 0; r < 2; ++r) rest[r] = (quad_sum(rest[r]) - common[r] * arguments.eps) * factor[r];
#pragma unroll
            for (int i = 0; i < 8; ++i) u[i / 4][i % 4] -= rest[i / 2 % 2] * z[i / 4][i % 4];
        };
        if (arguments.inverse != nullptr) {
            subtract_rest(u1, z1, query[0]);
            subtract_rest(u2, z2, query[1]);
        }
        for (int r = 0; r < 2; ++r) {
            const int row = role.quad + 8 * r;
            if (role.pair == 0 && row < rows_left)
                arguments.weights[row_offset + first_row + row] = -(common[r] + rest[r]) * factor[r];
        }
        store_factor_grads<Map>(u1, u2, factor, base + slot + Memory::kQueries + own_factors, arguments.dq1, arguments.dq2,
                                piece, first_row, role.lane);

        if (chunk + 1 < num_chunks) {
            state.add(keys, values, offsets, [&](int) {
                const uint32_t one = role.quad == 0 ? pack<Number>(1.0f, 1.0f) : 0;
                return uint2{one, one};
            });
            state.store(bytes + Memory::state(chunk + 1));
        }
    }
}

// --------------------------------------------------------------------------------------------------- keys and values

struct KeyArguments {
    Factors k, q;
    Tensor<const Number> v, grad_o;
    Tensor<Number> dk1, dk2, dv;
    const float *inverse, *weights, *states, *norms;
    const int32_t* pieces;
    int heads, group, num_tokens, num_pieces, piece_length;  // heads: of keys
};

template <typename Map>
__global__ void __launch_bounds__(BackwardWalk::kThreads, 1)
hadamard_causal_grad_keys_kernel(const __grid_constant__ KeyArguments arguments) {
    extern __shared__ __align__(128) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int group = arguments.group, num_chunks = piece.chunks(BackwardWalk::kChunk);
    const Role<BackwardWalk> role(threadIdx.x);
    const TileOffsets offsets(role.lane);
    const int own_factors = role.block * BackwardWalk::kFactorsBlock, own_values = role.block * BackwardWalk::kValuesBlock;

    const Number* const v = arguments.v.at(piece.batch, piece.head);
    Number* const dv = arguments.dv.at(piece.batch, piece.head);

    // A step of the pipeline is a chunk, the last one first, with one query head of the group.
    struct Step {
        int first, head;
    };
    const auto step_at = [&](int step) {
        return Step{piece.begin + (num_chunks - 1 - step / group) * BackwardWalk::kChunk, piece.head * group + step % group};
    };
    const int num_steps = num_chunks * group;
    const auto fetch = [&](int index) {
        if (index < num_steps) {
            const Step step = step_at(index);
            const uint32_t slot = base + index % BackwardWalk::kStages * Memory::kSlotBytes;
            const int first = step.first + role.own;
            const auto rows = [&](int tile, const Number* x, int64_t stride) {
                copy_rows<kValueWidth, 16, 32>(slot + tile + own_values, x, stride, first, piece.end, role.lane);
            };
            arguments.q.copy_own_rows(slot + Memory::kQueries + own_factors, piece.batch, step.head, first, piece.end,
                                      role.lane);
            rows(Memory::kGrads, arguments.grad_o.at(piece.batch, step.head), arguments.grad_o.row);
            arguments.k.copy_own_rows(slot + Memory::kKeys + own_factors, piece.batch, piece.head, first, piece.end, role.lane);
            rows(Memory::kValues, v, arguments.v.row);
        }
        commit_copies();
    };
    // In lane i, of the warp's own query i: its first features are taken times the inverse, as in linear/causal_backward.cu.
    float next_factor = 1, next_shift = 0;
    const auto fetch_numbers = [&](int index) {
        if (index >= num_steps || role.lane >= BackwardWalk::kOwnRows) return;
        const Step step = step_at(index);
        const int row = step.first + role.own + role.lane;
        const int64_t head = static_cast<int64_t>(piece.batch) * arguments.heads * group + step.head;
        const int64_t at = head * arguments.num_tokens + row;
        if (arguments.inverse != nullptr) next_factor = row < piece.end ? arguments.inverse[at] : 0.0f;
        next_shift = row < piece.end ? shift_of(arguments.weights[at], next_factor) : 0.0f;
    };
    fetch_numbers(0);
    for (int step = 0; step < BackwardWalk::kStages - 1; ++step) fetch(step);

    HadamardState state(role);
    float* const numbers = reinterpret_cast<float*>(bytes + Memory::kNumbers);
    if (arguments.states != nullptr) {
        const int64_t head = static_cast<int64_t>(piece.batch) * arguments.heads + piece.head;
        state.load(arguments.states, arguments.norms, head * arguments.num_pieces + piece.index);
    }
    state.store(bytes + Memory::state(0));

    uint32_t key[2][4], value[kValueWidth / 16][4];
    float dk1[2][4], dk2[2][4], dv_acc[kValueWidth / 8][4];
#pragma unroll 1
    for (int index = 0; index < num_steps; ++index) {
        const int slot = index % BackwardWalk::kStages * Memory::kSlotBytes;
        const int chunk = index / group, member = index - chunk * group;
        wait_for_groups<BackwardWalk::kStages - 2>();
        using Own = OwnTile<2 * kFactor>;
        float factor[Own::kPasses];  // of features: those of the other factor are taken as they are
        for (int pass = 0; pass < Own::kPasses; ++pass) {
            factor[pass] = __shfl_sync(kWholeWarp, next_factor, own_row<Own>(role.lane, pass));
            if (role.lane % Tile<2 * kFactor>::kChunks >= Tile<2 * kFactor>::kChunks / 2) factor[pass] = 1;
        }
        change_own_rows<Own>(bytes + slot + Memory::kQueries + own_factors, role.lane,
                             [&](uint32_t word, int pass) { return map_word<Map>(word, factor[pass]); });
        float* const shifts = numbers + index % 2 * BackwardWalk::kChunk;
        if (role.lane < BackwardWalk::kOwnRows) shifts[role.own + role.lane] = next_shift;
        if (member == 0) {
            __syncwarp();
            load_features<Map>(key, base + slot + Memory::kKeys + own_factors, offsets.factors);
            load_rows<kValueWidth>(value, base + slot + Memory::kValues + own_values, offsets.values);
        }
        __syncthreads();
        fetch(index + BackwardWalk::kStages - 1);
        fetch_numbers(index + 1);

        if (member == 0) {  // the queries of later chunks
            const uint32_t after = base + Memory::state(chunk);
#pragma unroll
            for (int i = 0; i < 8; ++i) dk1[i / 4][i % 4] = dk2[i / 4][i % 4] = 0;
#pragma unroll
            for (int i = 0; i < kValueWidth / 2; ++i) dv_acc[i / 4][i % 4] = 0;
            spread_state(dk1, dk2, key, value, after, offsets.values, role.lane);
            add_first_norms(dk1, key, after + BackwardWalk::kStateNorms, offsets.factors);
            add_second_norms(dk2, key, after + BackwardWalk::kStateNorms, offsets.factors);
            read_state(dv_acc, key, after, offsets.values, role.lane);
        }
        const uint32_t queries = base + slot + Memory::kQueries, grads = base + slot + Memory::kGrads;
        const auto add_pairs = [&](int block, bool diagonal) {
            const uint32_t others = queries + block * BackwardWalk::kFactorsBlock;
            const uint32_t values = grads + block * BackwardWalk::kValuesBlock;
            const float* const shift = shifts + 16 * block + 2 * role.pair;
            float slope[2][4], pairs[2][2][4], of_pair[2][4];
            uint32_t a[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 x = *reinterpret_cast<const float2*>(shift + 8 * half);
                slope[half][0] = slope[half][2] = x.x, slope[half][1] = slope[half][3] = x.y;
            }
            multiply_transposed<Number, kValueWidth>(slope, value, values, 0, offsets.values);
            similarities(pairs, key, others, offsets.factors);
            if (diagonal) {
                mask_diagonal<true>(pairs[0], role.quad, role.pair);
                mask_diagonal<true>(pairs[1], role.quad, role.pair);
            }
            multiply_elements(of_pair, slope, pairs[1]);
            add_factor(dk1, of_pair, others, 0, offsets.factors);
            multiply_elements(of_pair, slope, pairs[0]);
            add_factor(dk2, of_pair, others, 1, offsets.factors);
            multiply_elements(of_pair, pairs[0], pairs[1]);
            round_to_fragment<Number>(a, of_pair);
            multiply<Number, kValueWidth>(dv_acc, a, values, 0, offsets.values);
        };
        add_pairs(role.block, true);
#pragma unroll 1
        for (int block = role.block + 1; block < BackwardWalk::kBlocks; ++block) add_pairs(block, false);

        if (member == group - 1) {
            const int first_row = step_at(index).first + 16 * role.block;
            const float one[2] = {1.0f, 1.0f};
            store_factor_grads<Map>(dk1, dk2, one, base + slot + Memory::kKeys + own_factors, arguments.dk1, arguments.dk2,
                                    piece, first_row, role.lane);
            store_rows<Number, kValueWidth>(dv_acc, 1.0f, role.lane, piece.end - first_row, arguments.dv.row,
                                            dv + first_row * arguments.dv.row);
        }
        if (chunk + 1 < num_chunks) {
            state.add(queries, grads, offsets, [&](int block) {
                const float2* const pair = reinterpret_cast<const float2*>(shifts + 16 * block + 2 * role.pair);
                return uint2{as_sums(pair[0], role.quad), as_sums(pair[4], role.quad)};
            });
            if (member == group - 1) state.store(bytes + Memory::state(chunk + 1));
        }
    }
}

}  // namespace

int64_t hadamard_causal_backward_shared_bytes() { return Memory::kBytes; }

void hadamard_causal_grad_queries(const HadamardCausalGradQueries& call, const std::string& feature_map, cudaStream_t stream) {
    const auto input = input_tensor<Number>;
    const auto output = output_tensor<Number>;
    const QueryArguments arguments{
        {input(call.q1, call.q1_strides), input(call.q2, call.q2_strides)},
        {input(call.k1, call.k1_strides), input(call.k2, call.k2_strides)},
        input(call.v, call.v_strides), input(call.grad_o, call.grad_o_strides),
        output(call.dq1, call.dq1_strides), output(call.dq2, call.dq2_strides),
        call.inverse, call.states, call.norms, call.weights, call.pieces,
        static_cast<int>(call.heads), static_cast<int>(call.heads / call.kv_heads), static_cast<int>(call.num_tokens),
        static_cast<int>(call.num_pieces), static_cast<int>(call.piece_length), static_cast<float>(call.eps)};
    dispatch_feature_map(feature_map, [&](auto map) {
        constexpr auto kKernel = hadamard_causal_grad_queries_kernel<decltype(map)>;
        launch_walk<kKernel>(arguments, call.batches * call.heads * call.num_pieces, BackwardWalk::kThreads, Memory::kBytes,
                             stream, "hadamard_causal_grad_queries launch");
    });
}

void hadamard_causal_grad_keys(const HadamardCausalGradKeys& call, const std::string& feature_map, cudaStream_t stream) {
    const auto input = input_tensor<Number>;
    const auto output = output_tensor<Number>;
    const KeyArguments arguments{
        {input(call.k1, call.k1_strides), input(call.k2, call.k2_strides)},
        {input(call.q1, call.q1_strides), input(call.q2, call.q2_strides)},
        input(call.v, call.v_strides), input(call.grad_o, call.grad_o_strides),
        output(call.dk1, call.dk1_strides), output(call.dk2, call.dk2_strides), output(call.dv, call.dv_strides),
        call.inverse, call.weights, call.states, call.norms, call.pieces,
        static_cast<int>(call.kv_heads), static_cast<int>(call.heads / call.kv_heads), static_cast<int>(call.num_tokens),
        static_cast<int>(call.num_pieces), static_cast<int>(call.piece_length)};
    dispatch_feature_map(feature_map, [&](auto map) {
        constexpr auto kKernel = hadamard_causal_grad_keys_kernel<decltype(map)>;
        launch_walk<kKernel>(arguments, call.batches * call.kv_heads * call.num_pieces, BackwardWalk::kThreads, Memory::kBytes,
                             stream, "hadamard_causal_grad_keys launch");
    });
}

}  // namespace nearfar
