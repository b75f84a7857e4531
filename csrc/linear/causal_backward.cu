// The gradients of causal linear attention with one factor: two walks like that of linear/causal_forward.cu.
//
// Gradients of queries go from the first chunk to the last with the state of the keys, sum_j phi(k_j) v_j^T; gradients of keys
// and values from the last to the first with that of the queries, sum_i phi(q_i) g_i^T.
#include "linear/causal_backward.cuh"

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/walk.cuh"

namespace nearfar {
namespace {

// Bytes from the start of shared memory: the pipeline, the states behind this chunk and behind the next, their norms, and some
// numbers for tokens.
template <typename Walk, int Tiles, int Numbers>
struct Memory {
    static constexpr int kSlotBytes = Tiles * Walk::kTileBytes;
    static constexpr int kStates = Walk::kStages * kSlotBytes;
    static constexpr int kNorms = kStates + 2 * Walk::kStateBytes;
    static constexpr int kNumbers = kNorms + 2 * Walk::kWidth * 4;
    static constexpr int kBytes = kNumbers + Numbers * 4;
};

template <typename Walk>
__device__ __forceinline__ void store_state(const State<Walk>& state, char* tile, float* norms) {
    state.store(tile);
    state.store_norms([&](int row, float norm) { norms[row] = norm; });
}

// Two neighbouring c as the result of a product with 16 rows.
template <int Tiles>
__device__ __forceinline__ float (&two_tiles(float (&c)[Tiles][4], int first))[2][4] {
    return reinterpret_cast<float(&)[2][4]>(c[first]);
}

// ------------------------------------------------------------------------------------------------------------ queries

template <typename Walk>
struct QueryMemory : Memory<Walk, 4, Walk::kParts * Walk::kChunk> {  // the numbers: what each part has of dO . o
    static constexpr int kKeys = 0, kValues = Walk::kTileBytes, kGrads = 2 * Walk::kTileBytes, kQueries = 3 * Walk::kTileBytes;
};

// The part of a fragment a of a lower triangle of ones, or of ones everywhere.
__device__ __forceinline__ void ones_fragment(uint32_t (&a)[4], bool triangle, int quad, int pair) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = quad + i % 2 * 8, column = 2 * pair + i / 2 * 8;
        const bool first = !triangle || column <= row, second = !triangle || column < row;
        a[i] = pack<Number>(first ? 1.0f : 0.0f, second ? 1.0f : 0.0f);
    }
}

template <typename Walk, typename Map>
__global__ void __launch_bounds__(Walk::kThreads, 1) grad_queries_kernel(const __grid_constant__ QueryArguments arguments) {
    constexpr int kWidth = Walk::kWidth, kBlockBytes = Walk::kBlockBytes;
    using Memory = QueryMemory<Walk>;
    extern __shared__ __align__(128) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int num_chunks = piece.chunks(Walk::kChunk);
    const int kv_head = piece.head / arguments.group;
    const Role<Walk> role(threadIdx.x);
    const LaneOffsets<kWidth> whole(role.lane), mine(role.lane, role.part * Walk::kColumns / 16);
    const int my_rows = role.block * kBlockBytes, own_rows = role.own * Walk::kRowBytes;
    const int my_state_rows = role.part * Walk::kColumns * Walk::kRowBytes;
    const bool normalised = arguments.inverse != nullptr;

    const Number* const q = arguments.q.at(piece.batch, piece.head);
    const Number* const k = arguments.k.at(piece.batch, kv_head);
    const Number* const v = arguments.v.at(piece.batch, kv_head);
    const Number* const grad_o = arguments.grad_o.at(piece.batch, piece.head);
    Number* const dq = arguments.dq.at(piece.batch, piece.head) + role.part * Walk::kColumns;
    const int64_t row_offset = (static_cast<int64_t>(piece.batch) * arguments.heads + piece.head) * arguments.num_tokens;

    const auto fetch = [&](int chunk) {
        if (chunk < num_chunks) {
            const int first = piece.begin + chunk * Walk::kChunk + role.own;
            const uint32_t slot = base + chunk % Walk::kStages * Memory::kSlotBytes + own_rows;
            const auto rows = [&](int tile, const Number* x, int64_t stride) {
                copy_rows<kWidth, Walk::kOwnRows, 32>(slot + tile, x, stride, first, piece.end, role.lane);
            };
            rows(Memory::kKeys, k, arguments.k.row);
            rows(Memory::kGrads, grad_o, arguments.grad_o.row);
            rows(Memory::kValues, v, arguments.v.row);
            rows(Memory::kQueries, q, arguments.q.row);
        }
        commit_copies();
    };
    for (int chunk = 0; chunk < Walk::kStages - 1; ++chunk) fetch(chunk);

    State<Walk> state(role);
    float* const norms = reinterpret_cast<float*>(bytes + Memory::kNorms);
    float* const rests = reinterpret_cast<float*>(bytes + Memory::kNumbers);
    if (arguments.states != nullptr) {
        const int64_t head = static_cast<int64_t>(piece.batch) * (arguments.heads / arguments.group) + kv_head;
        state.load(arguments.states, arguments.norms, head * arguments.num_pieces + piece.index);
    }
    store_state(state, bytes + Memory::kStates, norms);

#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const int first_row = piece.begin + chunk * Walk::kChunk + 16 * role.block, rows_left = piece.end - first_row;
        const int slot = chunk % Walk::kStages * Memory::kSlotBytes;
        const uint32_t rows = base + slot + my_rows;
        uint32_t grad[Walk::kSteps][4];
        // Of rows quad and quad + 8 the inverse, and dO . o: a part near it, and what is left.
        float factor[2] = {1.0f, 1.0f}, common[2] = {}, rest[2] = {};
        const auto load_grads = [&] { load_rows<kWidth>(grad, rows + Memory::kGrads, whole); };
        if (normalised) {
            for (int r = 0; r < 2; ++r) {
                const int row = role.quad + 8 * r;
                factor[r] = row < rows_left ? arguments.inverse[row_offset + first_row + row] : 0.0f;
            }
        }
        wait_for_groups<Walk::kStages - 2>();
        change_own_rows<Walk>(bytes + slot + Memory::kKeys + own_rows, role.lane,
                              [](uint32_t word, int) { return map_word<Map>(word); });
        if (Walk::kParts == 1) {  // nobody else has fetched any of them
            __syncwarp();
            load_grads();
        }
        __syncthreads();
        fetch(chunk + Walk::kStages - 1);
        if (Walk::kParts > 1) load_grads();

        const uint32_t keys = base + slot + Memory::kKeys, values = base + slot + Memory::kValues;
        const uint32_t before = base + Memory::kStates + chunk % 2 * Walk::kStateBytes + my_state_rows;
        const float* const norm = norms + chunk % 2 * kWidth + role.part * Walk::kColumns + 2 * role.pair;
        // u_i = sum_{j <= i} (dO_i . v_j - c_i) phi(k_j) and z_i = sum_{j <= i} phi(k_j), c_i the mean of dO_i . v_j in its
        // block. If values have a large common part, all dO_i . v_j are near dO_i . o_i, and rounding them would lose the small
        // differences that make up dq.
        float own[2][4] = {}, u[Walk::kColumns / 8][4], z[Walk::kColumns / 8][4];
        multiply_transposed<Number, kWidth>(own, grad, values + role.block * kBlockBytes, 0, whole);
        if (normalised) take_means(own, common, role.quad, role.pair);
        else mask_diagonal<false>(own, role.quad, role.pair);
        uint32_t own_slopes[4];
        round_to_fragment<Number>(own_slopes, own);
#pragma unroll
        for (int tile = 0; tile < Walk::kColumns / 8; ++tile) {
            const float2 x = *reinterpret_cast<const float2*>(norm + 8 * tile);
            z[tile][0] = z[tile][2] = x.x, z[tile][1] = z[tile][3] = x.y;
            for (int i = 0; i < 4; ++i) u[tile][i] = -common[i / 2] * z[tile][i];
        }
#pragma unroll
        for (int block = 0; block < Walk::kColumns / 16; ++block)
            multiply_transposed<Number, kWidth>(two_tiles(u, 2 * block), grad, before, block * kBlockBytes, whole);
        const auto add_pairs = [&](const uint32_t(&slopes)[4], int block, bool diagonal) {
            uint32_t ones[4];
            ones_fragment(ones, diagonal, role.quad, role.pair);
#pragma unroll
            for (int step = 0; step < Walk::kColumns / 16; ++step) {
                uint32_t b[4];
                load_matrices_transposed(b, mine.normal_at(keys + block * kBlockBytes, step));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    mma<Number>(u[2 * step + half], slopes, b[2 * half], b[2 * half + 1]);
                    mma<Number>(z[2 * step + half], ones, b[2 * half], b[2 * half + 1]);
                }
            }
        };
#pragma unroll 2
        for (int block = 0; block < role.block; ++block) {
            float slope[2][4];
            uint32_t slopes[4];
#pragma unroll
            for (int i = 0; i < 8; ++i) slope[i / 4][i % 4] = -common[i / 2 % 2];
            multiply_transposed<Number, kWidth>(slope, grad, values + block * kBlockBytes, 0, whole);
            round_to_fragment<Number>(slopes, slope);
            add_pairs(slopes, block, false);
        }
        add_pairs(own_slopes, role.block, true);

        // o_i is phi(q_i) S_i inverse_i, so that without reading o
        // dO_i . o_i = (phi(q_i) . u_i + c_i (1 / inverse_i - eps)) inverse_i.
        if (normalised) {
#pragma unroll
            for (int step = 0; step < Walk::kColumns / 16; ++step) {
                uint32_t raw[4];
                load_matrices(raw, mine.normal_at(rows + Memory::kQueries, step));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 x = unpack<Number>(raw[i]);
                    const float* const at = u[2 * step + i / 2] + i % 2 * 2;
                    rest[i % 2] += Map::value(x.x) * at[0] + Map::value(x.y) * at[1];
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) rest[r] = quad_sum(rest[r]);
            if constexpr (Walk::kParts > 1) {
                float* const rest_at = rests + 16 * role.block + role.quad;
                for (int r = 0; r < 2; ++r)
                    if (role.pair == 0) rest_at[role.part * Walk::kChunk + 8 * r] = rest[r];
                __syncthreads();
                for (int r = 0; r < 2; ++r) {
                    rest[r] = 0;
                    for (int part = 0; part < Walk::kParts; ++part) rest[r] += rest_at[part * Walk::kChunk + 8 * r];
                }
            }
            for (int r = 0; r < 2; ++r) rest[r] = (rest[r] - common[r] * arguments.eps) * factor[r];
#pragma unroll
            for (int i = 0; i < Walk::kColumns / 2; ++i) u[i / 4][i % 4] -= rest[i / 2 % 2] * z[i / 4][i % 4];
        }
        for (int r = 0; r < 2; ++r) {
            const int row = role.quad + 8 * r;
            if (role.part == 0 && role.pair == 0 && row < rows_left)
                arguments.weights[row_offset + first_row + row] = -(common[r] + rest[r]) * factor[r];
        }
        multiply_by_slopes<Map>(u, factor, rows + Memory::kQueries, mine);
        store_rows<Number, Walk::kColumns>(u, 1.0f, role.lane, rows_left, arguments.dq.row, dq + first_row * arguments.dq.row);

        if (chunk + 1 < num_chunks) {
            state.add(keys, values, [&](int) {
                const uint32_t one = role.quad == 0 ? pack<Number>(1.0f, 1.0f) : 0;
                return uint2{one, one};
            });
            const int next = (chunk + 1) % 2;
            store_state(state, bytes + Memory::kStates + next * Walk::kStateBytes, norms + next * kWidth);
        }
    }
}

// --------------------------------------------------------------------------------------------------- keys and values

template <typename Walk>
struct KeyMemory : Memory<Walk, 4, 2 * Walk::kChunk> {  // the numbers: shifts of this chunk and of the next
    static constexpr int kQueries = 0, kGrads = Walk::kTileBytes, kKeys = 2 * Walk::kTileBytes, kValues = 3 * Walk::kTileBytes;
};

template <typename Walk, typename Map>
__global__ void __launch_bounds__(Walk::kThreads, 1) grad_keys_kernel(const __grid_constant__ KeyArguments arguments) {
    constexpr int kWidth = Walk::kWidth, kBlockBytes = Walk::kBlockBytes;
    using Memory = KeyMemory<Walk>;
    extern __shared__ __align__(128) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int group = arguments.group, num_chunks = piece.chunks(Walk::kChunk);
    const Role<Walk> role(threadIdx.x);
    const LaneOffsets<kWidth> whole(role.lane), mine(role.lane, role.part * Walk::kColumns / 16);
    const int my_rows = role.block * kBlockBytes, own_rows = role.own * Walk::kRowBytes;
    const int my_state_rows = role.part * Walk::kColumns * Walk::kRowBytes;

    const Number* const k = arguments.k.at(piece.batch, piece.head);
    const Number* const v = arguments.v.at(piece.batch, piece.head);
    Number* const dk = arguments.dk.at(piece.batch, piece.head) + role.part * Walk::kColumns;
    Number* const dv = arguments.dv.at(piece.batch, piece.head) + role.part * Walk::kColumns;

    // A step of the pipeline is a chunk, the last one first, with one query head of the group.
    struct Step {
        int first, head;
    };
    const auto step_at = [&](int step) {
        return Step{piece.begin + (num_chunks - 1 - step / group) * Walk::kChunk, piece.head * group + step % group};
    };
    const int num_steps = num_chunks * group;
    const auto fetch = [&](int index) {
        if (index < num_steps) {
            const Step step = step_at(index);
            const uint32_t slot = base + index % Walk::kStages * Memory::kSlotBytes + own_rows;
            const auto rows = [&](int tile, const Number* x, int64_t stride) {
                copy_rows<kWidth, Walk::kOwnRows, 32>(slot + tile, x, stride, step.first + role.own, piece.end, role.lane);
            };
            rows(Memory::kQueries, arguments.q.at(piece.batch, step.head), arguments.q.row);
            rows(Memory::kGrads, arguments.grad_o.at(piece.batch, step.head), arguments.grad_o.row);
            rows(Memory::kKeys, k, arguments.k.row);
            rows(Memory::kValues, v, arguments.v.row);
        }
        commit_copies();
    };
    // Lane i has the numbers of the warp's query i. Its features are multiplied by the inverse, so that dO . v - dO . o, which
    // may nearly cancel, uses dO without further rounding.
    float next_factor = 1, next_shift = 0;
    const auto fetch_numbers = [&](int index) {
        if (index >= num_steps || role.lane >= Walk::kOwnRows) return;
        const Step step = step_at(index);
        const int row = step.first + role.own + role.lane;
        const int64_t head = static_cast<int64_t>(piece.batch) * arguments.heads * group + step.head;
        const int64_t at = head * arguments.num_tokens + row;
        if (arguments.inverse != nullptr) next_factor = row < piece.end ? arguments.inverse[at] : 0.0f;
        next_shift = row < piece.end ? shift_of(arguments.weights[at], next_factor) : 0.0f;
    };
    fetch_numbers(0);
    for (int step = 0; step < Walk::kStages - 1; ++step) fetch(step);

    State<Walk> state(role);
    float* const norms = reinterpret_cast<float*>(bytes + Memory::kNorms);
    float* const numbers = reinterpret_cast<float*>(bytes + Memory::kNumbers);
    if (arguments.states != nullptr) {
        const int64_t head = static_cast<int64_t>(piece.batch) * arguments.heads + piece.head;
        state.load(arguments.states, arguments.norms, head * arguments.num_pieces + piece.index);
    }
    store_state(state, bytes + Memory::kStates, norms);

    uint32_t key[Walk::kSteps][4], value[Walk::kSteps][4];
    float dk_acc[Walk::kColumns / 8][4], dv_acc[Walk::kColumns / 8][4];
#pragma unroll 1
    for (int index = 0; index < num_steps; ++index) {
        const int slot = index % Walk::kStages * Memory::kSlotBytes;
        const int chunk = index / group, member = index - chunk * group;
        const uint32_t rows = base + slot + my_rows;
        const auto load_keys = [&] {
            load_rows<kWidth>(key, rows + Memory::kKeys, whole);
            load_rows<kWidth>(value, rows + Memory::kValues, whole);
#pragma unroll
            for (int i = 0; i < 4 * Walk::kSteps; ++i) key[i / 4][i % 4] = map_word<Map>(key[i / 4][i % 4]);
        };
        wait_for_groups<Walk::kStages - 2>();
        float factor[Walk::kPasses];
        for (int pass = 0; pass < Walk::kPasses; ++pass)
            factor[pass] = __shfl_sync(kWholeWarp, next_factor, own_row<Walk>(role.lane, pass));
        change_own_rows<Walk>(bytes + slot + Memory::kQueries + own_rows, role.lane,
                              [&](uint32_t word, int pass) { return map_word<Map>(word, factor[pass]); });
        float* const shifts = numbers + index % 2 * Walk::kChunk;
        if (role.lane < Walk::kOwnRows) shifts[role.own + role.lane] = next_shift;
        if (Walk::kParts == 1 && member == 0) {  // nobody else has fetched any of them
            __syncwarp();
            load_keys();
        }
        __syncthreads();
        fetch(index + Walk::kStages - 1);
        fetch_numbers(index + 1);
        if (Walk::kParts > 1 && member == 0) load_keys();

        if (member == 0) {  // the queries of later chunks
            const uint32_t after = base + Memory::kStates + chunk % 2 * Walk::kStateBytes;
            const float* const norm = norms + chunk % 2 * kWidth + role.part * Walk::kColumns + 2 * role.pair;
#pragma unroll
            for (int tile = 0; tile < Walk::kColumns / 8; ++tile) {
                const float2 z = *reinterpret_cast<const float2*>(norm + 8 * tile);
                dk_acc[tile][0] = dk_acc[tile][2] = z.x, dk_acc[tile][1] = dk_acc[tile][3] = z.y;
                for (float& x : dv_acc[tile]) x = 0;
            }
#pragma unroll
            for (int block = 0; block < Walk::kColumns / 16; ++block)
                multiply_transposed<Number, kWidth>(two_tiles(dk_acc, 2 * block), value, after + my_state_rows,
                                                    block * kBlockBytes, whole);
#pragma unroll
            for (int step = 0; step < Walk::kSteps; ++step)
                multiply<Number, kWidth>(dv_acc, key[step], after + step * kBlockBytes, 0, mine);
        }
        const uint32_t queries = base + slot + Memory::kQueries, grads = base + slot + Memory::kGrads;
        const auto add_pairs = [&](int block, bool diagonal) {
            const float* const shift = shifts + 16 * block + 2 * role.pair;
            float slope[2][4], pairs[2][4] = {};
            uint32_t a[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 x = *reinterpret_cast<const float2*>(shift + 8 * half);
                slope[half][0] = slope[half][2] = x.x, slope[half][1] = slope[half][3] = x.y;
            }
            multiply_transposed<Number, kWidth>(slope, value, grads + block * kBlockBytes, 0, whole);
            multiply_transposed<Number, kWidth>(pairs, key, queries + block * kBlockBytes, 0, whole);
            if (diagonal) mask_diagonal<true>(slope, role.quad, role.pair);
            if (diagonal) mask_diagonal<true>(pairs, role.quad, role.pair);
            round_to_fragment<Number>(a, slope);
            multiply<Number, kWidth>(dk_acc, a, queries + block * kBlockBytes, 0, mine);
            round_to_fragment<Number>(a, pairs);
            multiply<Number, kWidth>(dv_acc, a, grads + block * kBlockBytes, 0, mine);
        };
        add_pairs(role.block, true);
#pragma unroll 1
        for (int block = role.block + 1; block < Walk::kBlocks; ++block) add_pairs(block, false);

        if (member == group - 1) {
            const int first_row = step_at(index).first + 16 * role.block, rows_left = piece.end - first_row;
            const float one[2] = {1.0f, 1.0f};
            multiply_by_slopes<Map>(dk_acc, one, rows + Memory::kKeys, mine);
            const auto store = [&](auto& acc, Number* to, int64_t stride) {
                store_rows<Number, Walk::kColumns>(acc, 1.0f, role.lane, rows_left, stride, to + first_row * stride);
            };
            store(dk_acc, dk, arguments.dk.row);
            store(dv_acc, dv, arguments.dv.row);
        }
        if (chunk + 1 < num_chunks) {
            state.add(queries, grads, [&](int block) {  // each shift as the sum of two numbers
                const auto part = [&](float2 w) {
                    const uint32_t high = pack<Number>(w.x, w.y);
                    const float2 rounded = unpack<Number>(high);
                    return role.quad == 0 ? high : role.quad == 1 ? pack<Number>(w.x - rounded.x, w.y - rounded.y) : 0;
                };
                const float2* const pair = reinterpret_cast<const float2*>(shifts + 16 * block + 2 * role.pair);
                return uint2{part(pair[0]), part(pair[4])};
            });
            if (member == group - 1) {
                const int next = (chunk + 1) % 2;
                store_state(state, bytes + Memory::kStates + next * Walk::kStateBytes, norms + next * kWidth);
            }
        }
    }
}

template <int Width>
using WalkOf = Walk<Width, Width == 64 ? 128 : 64, 8, 2>;  // three slots are no faster (docs/notes/linear.md)

template <auto kKernel, typename Walk, typename Memory, typename Arguments>
void launch(const Arguments& arguments, int64_t heads, cudaStream_t stream, const char* name) {
    launch_walk<kKernel>(arguments, heads * arguments.num_pieces, Walk::kThreads, Memory::kBytes, stream, name);
}

}  // namespace

int64_t linear_causal_backward_shared_bytes(int64_t width) {
    return width == 64 ? std::max(QueryMemory<WalkOf<64>>::kBytes, KeyMemory<WalkOf<64>>::kBytes)
                       : std::max(QueryMemory<WalkOf<128>>::kBytes, KeyMemory<WalkOf<128>>::kBytes);
}

void linear_causal_grad_queries(const LinearCausalGradQueries& call, const std::string& feature_map, cudaStream_t stream) {
    const QueryArguments arguments = query_arguments(call);
    dispatch_walk(feature_map, call.width, [&](auto map, auto width) {
        using Walk = WalkOf<width>;
        launch<grad_queries_kernel<Walk, decltype(map)>, Walk, QueryMemory<Walk>>(arguments, call.batches * call.heads, stream,
                                                                                  "linear_causal_grad_queries launch");
    });
}

void linear_causal_grad_keys(const LinearCausalGradKeys& call, const std::string& feature_map, cudaStream_t stream) {
    const KeyArguments arguments = key_arguments(call);
    dispatch_walk(feature_map, call.width, [&](auto map, auto width) {
        using Walk = WalkOf<width>;
        launch<grad_keys_kernel<Walk, decltype(map)>, Walk, KeyMemory<Walk>>(arguments, call.batches * call.kv_heads, stream,
                                                                            "linear_causal_grad_keys launch");
    });
}

}  // namespace nearfar
