// The gradients of bidirectional linear attention with one factor: two kernels like those of linear/bidirectional_forward.cu.
//
// The first goes through queries with the state of the keys and, as it has the queries and the gradients of their outputs at
// hand, sums up the state of the queries on the way; the second goes through keys with that.
#include "linear/bidirectional_backward.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "linear/bidirectional.cuh"

namespace nearfar {
namespace {

// ------------------------------------------------------------------------------------------------------------ queries

struct QueryArguments {
    Tensor<const Number> q, grad_o;
    Tensor<Number> dq;
    const float *inverse, *states, *norms;
    float *partials, *partial_norms;
    const int32_t* pieces;
    int heads, group, num_tokens, num_pieces, piece_length, num_states;  // heads: of keys
};

// Bytes from the start of shared memory: the pipeline, the state and its norms, and reciprocals of the rows of this chunk and
// of the next. Sums of norms by blocks of rows take the place of the pipeline in the end.
template <typename Walk>
struct QueryMemory {
    static constexpr int kQueries = 0, kGrads = Walk::kTileBytes;
    static constexpr int kSlotBytes = 2 * Walk::kTileBytes;
    static constexpr int kState = Walk::kStages * kSlotBytes;
    static constexpr int kNorms = kState + Walk::kStateBytes;
    static constexpr int kFactors = kNorms + 4 * Walk::kWidth;
    static constexpr int kBytes = kFactors + 2 * 4 * Walk::kChunk;
};

template <typename Walk, int kResident, typename Map>
__global__ void __launch_bounds__(Walk::kThreads, kResident)
grad_queries_kernel(const __grid_constant__ QueryArguments arguments) {
    constexpr int kWidth = Walk::kWidth, kBlockBytes = Walk::kBlockBytes;
    using Memory = QueryMemory<Walk>;
    static_assert(Walk::kParts == 1, "a warp has all columns of its rows");
    extern __shared__ __align__(128) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int num_chunks = piece.chunks(Walk::kChunk);
    const Role<Walk> role(threadIdx.x);
    const LaneOffsets<kWidth> whole(role.lane);
    const bool normalised = arguments.inverse != nullptr;

    // A step of the pipeline is a chunk of one query head of the group.
    struct Step {
        int head, first;
    };
    const auto step_at = [&](int step) {
        const int member = step / num_chunks;
        return Step{piece.head * arguments.group + member, piece.begin + (step - member * num_chunks) * Walk::kChunk};
    };
    const int num_steps = num_chunks * arguments.group;
    const auto fetch = [&](int index) {
        if (index < num_steps) {
            const Step step = step_at(index);
            const uint32_t slot = base + index % Walk::kStages * Memory::kSlotBytes;
            copy_chunk<Walk>(slot + Memory::kGrads, arguments.grad_o.at(piece.batch, step.head), arguments.grad_o.row,
                             step.first, piece.end);
            copy_chunk<Walk>(slot + Memory::kQueries, arguments.q.at(piece.batch, step.head), arguments.q.row, step.first,
                             piece.end);
        }
        commit_copies();
    };
    float next_factor = 1;  // of the thread's own row
    const auto fetch_factor = [&](int index) {
        if (!normalised || index >= num_steps || threadIdx.x >= Walk::kChunk) return;
        const Step step = step_at(index);
        const int row = step.first + static_cast<int>(threadIdx.x);
        const int64_t head = static_cast<int64_t>(piece.batch) * arguments.heads * arguments.group + step.head;
        next_factor = row < piece.end ? arguments.inverse[head * arguments.num_tokens + row] : 0.0f;
    };
    fetch_factor(0);
    for (int step = 0; step < Walk::kStages - 1; ++step) fetch(step);

    float* const norms = reinterpret_cast<float*>(bytes + Memory::kNorms);
    const int64_t state =
        state_index(piece, piece.head, arguments.heads, arguments.pieces, arguments.num_pieces, arguments.num_states);
    copy_state<Walk>(bytes + Memory::kState, arguments.states + state * kWidth * kWidth);
    if (threadIdx.x < kWidth) norms[threadIdx.x] = arguments.norms[state * kWidth + threadIdx.x];

    Sums<Walk> sums(role);
    float norm_sums[kWidth / 4] = {};  // of this lane's rows, in its columns
    const bool sums_first = role.warp / 4 % 2 == 0;
#pragma unroll 1
    for (int index = 0; index < num_steps; ++index) {
        const Step step = step_at(index);
        const uint32_t slot = base + index % Walk::kStages * Memory::kSlotBytes, rows = slot + role.warp * kBlockBytes;
        float* const factors = reinterpret_cast<float*>(bytes + Memory::kFactors) + index % 2 * Walk::kChunk;
        wait_for_groups<Walk::kStages - 2>();
        if (threadIdx.x < Walk::kChunk) factors[threadIdx.x] = next_factor;
        __syncthreads();
        fetch(index + Walk::kStages - 1);
        fetch_factor(index + 1);

        const auto add_sums = [&] {
            const float* const block_factors = factors + 2 * role.pair;
            sums.add(slot + Memory::kQueries, slot + Memory::kGrads, [&](uint32_t(&a)[4], int block) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {  // word i has tokens 2 pair and 2 pair + 1 of the first or the last 8
                    const float2 x = unpack<Number>(a[i]);
                    const float2 token = *reinterpret_cast<const float2*>(block_factors + 16 * block + i / 2 * 8);
                    a[i] = pack<Number>(Map::value(x.x) * token.x, Map::value(x.y) * token.y);
                }
            });
        };
        const auto finish_rows = [&] {
            // u_i = S dO_i, of which dO_i . o_i = phi(q_i) . u_i inverse_i follows without reading o.
            float u[kWidth / 8][4] = {};
#pragma unroll
            for (int column = 0; column < Walk::kSteps; ++column) {
                uint32_t grad[4];
                load_matrices(grad, whole.normal_at(rows + Memory::kGrads, column));
                multiply_transposed_step<Number, kWidth>(u, grad, base + Memory::kState, column, whole);
            }
            // use(word, u, r, column): neighbours in row quad + 8 r of q and of u, from `column` on of the lane's columns.
            const auto for_queries = [&](const auto& use) {
#pragma unroll
                for (int block = 0; block < kWidth / 16; ++block) {
                    uint32_t raw[4];
                    load_matrices(raw, whole.normal_at(rows + Memory::kQueries, block));
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        use(raw[i], &u[2 * block + i / 2][i % 2 * 2], i % 2, 8 * (2 * block + i / 2));
                }
            };
            const float factor[2] = {factors[16 * role.warp + role.quad], factors[16 * role.warp + role.quad + 8]};
            float delta[2] = {}, weight[2] = {};  // dO . o of rows quad and quad + 8, and that as the gradient of their norms
            if (normalised) {
                // Of rounded features, as the inverse is of them, and so are the sums of dO that norms are subtracted from.
                for_queries([&](uint32_t word, const float* at, int r, int) {
                    const float2 f = unpack<Number>(map_word<Map>(word));
                    delta[r] += f.x * at[0] + f.y * at[1];
                });
#pragma unroll
                for (int r = 0; r < 2; ++r) delta[r] = quad_sum(delta[r]) * factor[r], weight[r] = -delta[r] * factor[r];
            }
            for_queries([&](uint32_t word, float* at, int r, int column) {
                const float2 z = *reinterpret_cast<const float2*>(norms + column + 2 * role.pair);
                const float2 x = unpack<Number>(word), f = unpack<Number>(map_word<Map>(word, factor[r]));
                norm_sums[column / 4] -= f.x * delta[r];
                norm_sums[column / 4 + 1] -= f.y * delta[r];
                at[0] = Map::grad(x.x) * (factor[r] * at[0] + weight[r] * z.x);
                at[1] = Map::grad(x.y) * (factor[r] * at[1] + weight[r] * z.y);
            });
            const int first_row = step.first + 16 * role.warp;
            Number* const dq = arguments.dq.at(piece.batch, step.head);
            store_rows<Number, kWidth>(u, 1.0f, role.lane, piece.end - first_row, arguments.dq.row,
                                       dq + first_row * arguments.dq.row);
        };
        // Warps that share a scheduler take turns at tensor cores and features.
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            if ((half == 0) == sums_first) add_sums();
            else finish_rows();
        }
    }

    const int64_t to = (static_cast<int64_t>(piece.batch) * arguments.heads + piece.head) * arguments.num_pieces + piece.index;
    sums.store(arguments.partials + to * kWidth * kWidth);
    float* const block_sums = reinterpret_cast<float*>(bytes);  // (kBlocks, D)
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) {
        for (int lanes = 4; lanes < 32; lanes *= 2) norm_sums[i] += __shfl_xor_sync(kWholeWarp, norm_sums[i], lanes);
        const int column = i / 2 * 8 + 2 * role.pair + i % 2;
        if (role.quad == 0) block_sums[role.warp * kWidth + column] = norm_sums[i];
    }
    __syncthreads();
    if (threadIdx.x < kWidth) {
        float sum = 0;
        for (int block = 0; block < Walk::kBlocks; ++block) sum += block_sums[block * kWidth + threadIdx.x];
        arguments.partial_norms[to * kWidth + threadIdx.x] = sum;
    }
}

// --------------------------------------------------------------------------------------------------- keys and values

struct KeyArguments {
    Tensor<const Number> k, v;
    Tensor<Number> dk, dv;
    const float *states, *norms;
    const int32_t* pieces;
    int heads, num_tokens, num_pieces, piece_length, num_states;  // heads: of keys
};

// Bytes from the start of shared memory: the pipeline, the state and its norms.
template <typename Walk>
struct KeyMemory {
    static constexpr int kKeys = 0, kValues = Walk::kTileBytes;
    static constexpr int kSlotBytes = 2 * Walk::kTileBytes;
    static constexpr int kState = Walk::kStages * kSlotBytes;
    static constexpr int kNorms = kState + Walk::kStateBytes;
    static constexpr int kBytes = kNorms + 4 * Walk::kWidth;
};

template <typename Walk, int kResident, typename Map>
__global__ void __launch_bounds__(Walk::kThreads, kResident) grad_keys_kernel(const __grid_constant__ KeyArguments arguments) {
    constexpr int kWidth = Walk::kWidth, kBlockBytes = Walk::kBlockBytes;
    using Memory = KeyMemory<Walk>;
    static_assert(Walk::kParts == 1, "a warp has its rows to itself");
    extern __shared__ __align__(128) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int num_chunks = piece.chunks(Walk::kChunk);
    const Role<Walk> role(threadIdx.x);
    const LaneOffsets<kWidth> whole(role.lane);
    const int first = piece.begin + 16 * role.warp;
    const Number* const k = arguments.k.at(piece.batch, piece.head);
    const Number* const v = arguments.v.at(piece.batch, piece.head);
    Number* const dk = arguments.dk.at(piece.batch, piece.head);
    Number* const dv = arguments.dv.at(piece.batch, piece.head);

    const auto slot_of = [&](int chunk) {
        return base + chunk % Walk::kStages * Memory::kSlotBytes + role.warp * kBlockBytes;
    };
    const auto fetch = [&](int chunk) {
        if (chunk < num_chunks) {
            const int row = first + chunk * Walk::kChunk;
            copy_rows<kWidth, 16, 32>(slot_of(chunk) + Memory::kValues, v, arguments.v.row, row, piece.end, role.lane);
            copy_rows<kWidth, 16, 32>(slot_of(chunk) + Memory::kKeys, k, arguments.k.row, row, piece.end, role.lane);
        }
        commit_copies();
    };
    for (int chunk = 0; chunk < Walk::kStages - 1; ++chunk) fetch(chunk);

    float* const norms = reinterpret_cast<float*>(bytes + Memory::kNorms);
    const int64_t state =
        state_index(piece, piece.head, arguments.heads, arguments.pieces, arguments.num_pieces, arguments.num_states);
    copy_state<Walk>(bytes + Memory::kState, arguments.states + state * kWidth * kWidth);
    if (threadIdx.x < kWidth) norms[threadIdx.x] = arguments.norms[state * kWidth + threadIdx.x];
    __syncthreads();

#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        wait_for_groups<Walk::kStages - 2>();
        __syncwarp();
        fetch(chunk + Walk::kStages - 1);

        const uint32_t rows = slot_of(chunk);
        const int first_row = first + chunk * Walk::kChunk, rows_left = piece.end - first_row;
        float acc[kWidth / 8][4];  // dk, then dv
#pragma unroll
        for (int tile = 0; tile < kWidth / 8; ++tile) {
            const float2 z = *reinterpret_cast<const float2*>(norms + 8 * tile + 2 * role.pair);
            acc[tile][0] = acc[tile][2] = z.x, acc[tile][1] = acc[tile][3] = z.y;
        }
#pragma unroll
        for (int step = 0; step < Walk::kSteps; ++step) {
            uint32_t value[4];
            load_matrices(value, whole.normal_at(rows + Memory::kValues, step));
            multiply_transposed_step<Number, kWidth>(acc, value, base + Memory::kState, step, whole);
        }
        const float one[2] = {1.0f, 1.0f};
        multiply_by_slopes<Map>(acc, one, rows + Memory::kKeys, whole);
        store_rows<Number, kWidth>(acc, 1.0f, role.lane, rows_left, arguments.dk.row, dk + first_row * arguments.dk.row);

#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) acc[i / 4][i % 4] = 0;
#pragma unroll
        for (int step = 0; step < Walk::kSteps; ++step) {
            uint32_t key[4];
            load_matrices(key, whole.normal_at(rows + Memory::kKeys, step));
#pragma unroll
            for (int i = 0; i < 4; ++i) key[i] = map_word<Map>(key[i]);
            multiply<Number, kWidth>(acc, key, base + Memory::kState + step * kBlockBytes, 0, whole);
        }
        store_rows<Number, kWidth>(acc, 1.0f, role.lane, rows_left, arguments.dv.row, dv + first_row * arguments.dv.row);
    }
}

template <int Width>
struct Config {
    static constexpr int kResident = Width == 64 ? 3 : 1;  // blocks on a multiprocessor
    using QueryWalk = Walk<Width, Width, Width / 16, 2>;
    using KeyWalk = Walk<Width, Width, Width / 16, Width == 64 ? 2 : 3>;
    using Query = QueryMemory<QueryWalk>;
    using Key = KeyMemory<KeyWalk>;
};

}  // namespace

int64_t linear_bidirectional_backward_shared_bytes(int64_t width) {
    return width == 64 ? std::max(Config<64>::Query::kBytes, Config<64>::Key::kBytes)
                       : std::max(Config<128>::Query::kBytes, Config<128>::Key::kBytes);
}

void linear_bidirectional_grad_queries(const LinearBidirectionalGradQueries& call, const std::string& feature_map,
                                       cudaStream_t stream) {
    const auto input = input_tensor<Number>;
    const QueryArguments arguments{
        input(call.q, call.q_strides), input(call.grad_o, call.grad_o_strides), output_tensor<Number>(call.dq, call.dq_strides),
        call.inverse, call.states, call.norms, call.partials, call.partial_norms, call.pieces,
        static_cast<int>(call.kv_heads), static_cast<int>(call.heads / call.kv_heads), static_cast<int>(call.num_tokens),
        static_cast<int>(call.num_pieces), static_cast<int>(call.piece_length), static_cast<int>(call.num_states)};
    dispatch_walk(feature_map, call.width, [&](auto map, auto width) {
        using Config = Config<width>;
        using Walk = typename Config::QueryWalk;
        launch_walk<grad_queries_kernel<Walk, Config::kResident, decltype(map)>>(
            arguments, call.batches * call.kv_heads * call.num_pieces, Walk::kThreads, Config::Query::kBytes, stream,
            "linear_bidirectional_grad_queries launch");
    });
}

void linear_bidirectional_grad_keys(const LinearBidirectionalGradKeys& call, const std::string& feature_map,
                                    cudaStream_t stream) {
    const auto input = input_tensor<Number>;
    const auto output = output_tensor<Number>;
    const KeyArguments arguments{
        input(call.k, call.k_strides), input(call.v, call.v_strides), output(call.dk, call.dk_strides),
        output(call.dv, call.dv_strides), call.states, call.norms, call.pieces,
        static_cast<int>(call.kv_heads), static_cast<int>(call.num_tokens), static_cast<int>(call.num_pieces),
        static_cast<int>(call.piece_length), static_cast<int>(call.num_states)};
    dispatch_walk(feature_map, call.width, [&](auto map, auto width) {
        using Config = Config<width>;
        using Walk = typename Config::KeyWalk;
        launch_walk<grad_keys_kernel<Walk, Config::kResident, decltype(map)>>(
            arguments, call.batches * call.kv_heads * call.num_pieces, Walk::kThreads, Config::Key::kBytes, stream,
            "linear_bidirectional_grad_keys launch");
    });
}

}  // namespace nearfar
