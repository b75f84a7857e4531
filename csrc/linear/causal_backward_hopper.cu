// The gradients of causal linear attention with one factor of 64 features, by the products of Hopper.
//
// The walks are those of linear/causal_backward.cu: a block of eight warps goes from chunk to chunk of 128 tokens, and each
// warp fetches and maps its own rows. Here its two groups of four warps have 64 rows of the results each, and tiles are
// operands in shared memory. The group whose rows pair with only half of the chunk has the state.
#include <cstdint>
#include <string>

#include "common/hopper.cuh"
#include "common/pairs.cuh"
#include "common/walk.cuh"
#include "linear/causal_backward.cuh"

namespace nearfar {
namespace {

constexpr int kWidth = 64, kHalf = 64;  // features; tokens of half a chunk, as many as a group has rows
using HopperWalk = Walk<kWidth, 2 * kHalf, 8, 2>;
constexpr int kHalfBytes = kHalf * HopperWalk::kRowBytes;
using Products = float[kHalf / 2];  // of 64 rows with 64 columns

// Bytes from the start of shared memory, a multiple of 1,024: the pipeline, mapped keys beside the raw ones, the states behind
// this chunk and behind the next, their norms, and numbers of the tokens of this chunk and of the next.
struct Memory {
    static constexpr int kQueries = 0, kGrads = HopperWalk::kTileBytes, kKeys = 2 * HopperWalk::kTileBytes;
    static constexpr int kValues = 3 * HopperWalk::kTileBytes, kSlotBytes = 4 * HopperWalk::kTileBytes;
    static constexpr int kMapped = HopperWalk::kStages * kSlotBytes;
    static constexpr int kStates = kMapped + HopperWalk::kTileBytes;
    static constexpr int kNorms = kStates + 2 * HopperWalk::kStateBytes;
    static constexpr int kNumbers = kNorms + 2 * kWidth * 4;
    static constexpr int kBytes = kNumbers + 2 * HopperWalk::kChunk * 4;
};

// sum (+)= x y^T for 64 rows x and 64 rows y of tiles, and sum += weights y, as parts of a group.
__device__ __forceinline__ void put_rows_product(Products& sum, uint32_t x, uint32_t y, bool add) {
    put_tile_product<Number, kWidth, kHalf>(sum, x, 0, y, 0, add);
}
__device__ __forceinline__ void put_weighted_rows(Products& sum, const uint32_t (&weights)[4][4], uint32_t y) {
    put_weighted_sum<Number, kWidth, kHalf>(sum, weights, y, 0);
}

// What a thread has to do in each chunk.
struct Part {
    int lane, quad, pair, warp;
    int half;        // of the chunk, in which its rows are
    int own;         // first row of the chunk that its warp has, fetches and maps
    int first;       // row, in its half, of the products that it has; the other one is 8 further
    int state_warp;  // of the group that keeps the state: its rows there are from 16 state_warp on

    __device__ Part()
        : lane(threadIdx.x % 32), quad(lane / 4), pair(lane % 4), warp(threadIdx.x / 32),
          half(__shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / 128, 0)), own(16 * warp), first(own % kHalf + quad),
          state_warp(warp % 4) {}
    __device__ int column(int i) const { return product_column(lane, i); }
    __device__ int row(int i) const { return first + i / 2 % 2 * 8; }
};

// The state, in the registers of one group: 16 rows in each warp, as products lie there, and their norms.
class HopperState {
    const Part& part_;
    float sum_[1][kHalf / 2] = {}, norm_[2] = {};

   public:
    __device__ explicit HopperState(const Part& part) : part_(part) {}

    // states (.., 64, 64) and norms (.., 64), float32.
    __device__ void load(const float* states, const float* norms, int64_t index) {
        const int64_t row = index * kWidth + 16 * part_.state_warp + part_.quad;
#pragma unroll
        for (int i = 0; i < kHalf / 4; ++i) {
            const float2 x = *reinterpret_cast<const float2*>(states + (row + i % 2 * 8) * kWidth + part_.column(2 * i));
            sum_[0][2 * i] = x.x, sum_[0][2 * i + 1] = x.y;
        }
        for (int r = 0; r < 2; ++r) norm_[r] = norms[row + 8 * r];
    }

    // Adds sum_j x_j y_j^T over the chunk, and to the norms sum_j x_j w_j; weights(block) as State has it.
    template <typename Weights>
    __device__ __forceinline__ void add(uint32_t x, uint32_t y, const LaneOffsets<kWidth>& offsets, const Weights& weights) {
        float sum[1][kHalf / 2] = {}, norm[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t rows[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int block = 4 * half + i;
                load_matrices_transposed(rows[i], offsets.across_at(x + block * HopperWalk::kBlockBytes, part_.state_warp));
                const uint2 b = weights(block);
                mma<Number>(norm, rows[i], b.x, b.y);
            }
            begin_products();
            put_weighted_rows(sum[0], rows, y + half * kHalfBytes);
            commit_products();
            wait_for_products<0>(sum);
        }
#pragma unroll
        for (int i = 0; i < kHalf / 2; ++i) sum_[0][i] += sum[0][i];
        norm_[0] += norm[0] + norm[1];
        norm_[1] += norm[2] + norm[3];
    }

    // The state, rounded, as a tile, and its norms.
    __device__ __forceinline__ void store(char* tile, float* norms) const {
        const int row = 16 * part_.state_warp + part_.quad;
#pragma unroll
        for (int i = 0; i < kHalf / 4; ++i)
            *reinterpret_cast<uint32_t*>(tile + Tile<kWidth>::offset(row + i % 2 * 8, i / 2) + 4 * part_.pair) =
                pack<Number>(sum_[0][2 * i], sum_[0][2 * i + 1]);
        if (part_.pair > 0) return;
        for (int r = 0; r < 2; ++r) norms[row + 8 * r] = norm_[r];
    }
};

// ------------------------------------------------------------------------------------------------------------ queries

// Fragments of ones for a group's rows and 64 columns: for columns up to the row's own, or for all.
__device__ __forceinline__ void ones_fragments(uint32_t (&a)[4][4], bool diagonal, const Part& part) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int column = 16 * (i / 4) + 2 * part.pair + i / 2 % 2 * 8, row = part.first + i % 2 * 8;
        a[i / 4][i % 4] = pack<Number>(!diagonal || column <= row ? 1.0f : 0.0f, !diagonal || column < row ? 1.0f : 0.0f);
    }
}

template <typename Map>
__global__ void __launch_bounds__(HopperWalk::kThreads, 1) grad_queries_kernel(
    const __grid_constant__ QueryArguments arguments) {
    extern __shared__ __align__(1024) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int num_chunks = piece.chunks(HopperWalk::kChunk);
    const int kv_head = piece.head / arguments.group;
    const Part part;
    const LaneOffsets<kWidth> offsets(part.lane);
    const int own_rows = part.own * HopperWalk::kRowBytes, my_half = part.half * kHalfBytes;
    const bool normalised = arguments.inverse != nullptr, keeps_state = part.half == 0;

    const Number* const q = arguments.q.at(piece.batch, piece.head);
    const Number* const k = arguments.k.at(piece.batch, kv_head);
    const Number* const v = arguments.v.at(piece.batch, kv_head);
    const Number* const grad_o = arguments.grad_o.at(piece.batch, piece.head);
    Number* const dq = arguments.dq.at(piece.batch, piece.head);
    const int64_t row_offset = (static_cast<int64_t>(piece.batch) * arguments.heads + piece.head) * arguments.num_tokens;

    const auto fetch = [&](int chunk) {
        if (chunk < num_chunks) {
            const int first = piece.begin + chunk * HopperWalk::kChunk + part.own;
            const uint32_t slot = base + chunk % HopperWalk::kStages * Memory::kSlotBytes + own_rows;
            const auto rows = [&](int tile, const Number* x, int64_t stride) {
                copy_rows<kWidth, 16, 32>(slot + tile, x, stride, first, piece.end, part.lane);
            };
            rows(Memory::kKeys, k, arguments.k.row);
            rows(Memory::kGrads, grad_o, arguments.grad_o.row);
            rows(Memory::kValues, v, arguments.v.row);
            rows(Memory::kQueries, q, arguments.q.row);
        }
        commit_copies();
    };
    for (int chunk = 0; chunk < HopperWalk::kStages - 1; ++chunk) fetch(chunk);

    HopperState state(part);
    float* const norms = reinterpret_cast<float*>(bytes + Memory::kNorms);
    const auto store_state = [&](int chunk) {
        state.store(bytes + Memory::kStates + chunk % 2 * HopperWalk::kStateBytes, norms + chunk % 2 * kWidth);
    };
    if (keeps_state) {
        if (arguments.states != nullptr) {
            const int64_t head = static_cast<int64_t>(piece.batch) * (arguments.heads / arguments.group) + kv_head;
            state.load(arguments.states, arguments.norms, head * arguments.num_pieces + piece.index);
        }
        store_state(0);
    }

#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const int first_row = piece.begin + chunk * HopperWalk::kChunk + part.own, rows_left = piece.end - first_row;
        const int slot = chunk % HopperWalk::kStages * Memory::kSlotBytes;
        float factor[2] = {1.0f, 1.0f}, common[2] = {}, rest[2] = {};  // as in linear/causal_backward.cu
        if (normalised) {
            for (int r = 0; r < 2; ++r) {
                const int row = part.quad + 8 * r;
                factor[r] = row < rows_left ? arguments.inverse[row_offset + first_row + row] : 0.0f;
            }
        }
        wait_for_groups<HopperWalk::kStages - 2>();
        change_own_rows<HopperWalk>(bytes + slot + Memory::kKeys + own_rows, part.lane,
                                    [](uint32_t word, int) { return map_word<Map>(word); });
        publish_to_products();
        __syncthreads();
        fetch(chunk + HopperWalk::kStages - 1);

        const uint32_t keys = base + slot + Memory::kKeys, values = base + slot + Memory::kValues;
        const uint32_t grads = base + slot + Memory::kGrads + my_half;
        const float* const norm = norms + chunk % 2 * kWidth;
        // u_i = sum_{j <= i} (dO_i . v_j - c_i) phi(k_j) and z_i = sum_{j <= i} phi(k_j), c_i the mean of dO . v in its half
        float sums[2][kHalf / 2];
#pragma unroll
        for (int i = 0; i < kHalf / 2; ++i) sums[1][i] = norm[part.column(i)];
        float slopes[1][kHalf / 2];
        const auto start_slopes = [&](int block) {
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i) slopes[0][i] = -common[i / 2 % 2];
            begin_products();
            put_rows_product(slopes[0], grads, values + block * kHalfBytes, true);
            commit_products();
        };
        const auto add_block = [&](int block, bool diagonal) {
            uint32_t slope[4][4], ones[4][4];
            round_products<Number>(slope, slopes[0]);
            ones_fragments(ones, diagonal, part);
            begin_products();
            put_weighted_rows(sums[0], slope, keys + block * kHalfBytes);
            put_weighted_rows(sums[1], ones, keys + block * kHalfBytes);
            commit_products();
            wait_for_products<0>(sums);
        };
        start_slopes(part.half);
        put_rows_product(sums[0], grads, base + Memory::kStates + chunk % 2 * HopperWalk::kStateBytes, false);
        commit_products();
        wait_for_products<1>(slopes);
        const auto mask = [&] {
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i)
                if (part.column(i) > part.row(i)) slopes[0][i] = 0;
        };
        mask();
        if (normalised) {
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i) common[i / 2 % 2] += slopes[0][i];
            for (int r = 0; r < 2; ++r) common[r] = quad_sum(common[r]) / (part.first + 8 * r + 1);
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i) slopes[0][i] -= common[i / 2 % 2];
            mask();
        }
        wait_for_products<0>(sums);
#pragma unroll
        for (int i = 0; i < kHalf / 2; ++i) sums[0][i] -= common[i / 2 % 2] * sums[1][i];
        add_block(part.half, true);
        if (part.half == 1) {
            start_slopes(0);
            wait_for_products<0>(slopes);
            add_block(0, false);
        }

        float(&u)[kWidth / 8][4] = tiles_of(sums[0]);
        const uint32_t rows = base + slot + Memory::kQueries + own_rows;
        if (normalised) {
#pragma unroll
            for (int step = 0; step < kWidth / 16; ++step) {
                uint32_t raw[4];
                load_matrices(raw, offsets.normal_at(rows, step));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 x = unpack<Number>(raw[i]);
                    const float* const at = u[2 * step + i / 2] + i % 2 * 2;
                    rest[i % 2] += Map::value(x.x) * at[0] + Map::value(x.y) * at[1];
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) rest[r] = (quad_sum(rest[r]) - common[r] * arguments.eps) * factor[r];
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i) sums[0][i] -= rest[i / 2 % 2] * sums[1][i];
        }
        for (int r = 0; r < 2; ++r) {
            const int row = part.quad + 8 * r;
            if (part.pair == 0 && row < rows_left)
                arguments.weights[row_offset + first_row + row] = -(common[r] + rest[r]) * factor[r];
        }
        multiply_by_slopes<Map>(u, factor, rows, offsets);
        store_rows<Number, kWidth>(u, 1.0f, part.lane, rows_left, arguments.dq.row, dq + first_row * arguments.dq.row);

        if (keeps_state && chunk + 1 < num_chunks) {
            state.add(keys, values, offsets, [&](int) {
                const uint32_t one = part.quad == 0 ? pack<Number>(1.0f, 1.0f) : 0;
                return uint2{one, one};
            });
            store_state(chunk + 1);
        }
    }
}

// --------------------------------------------------------------------------------------------------- keys and values

template <typename Map>
__global__ void __launch_bounds__(HopperWalk::kThreads, 1) grad_keys_kernel(const __grid_constant__ KeyArguments arguments) {
    extern __shared__ __align__(1024) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int group = arguments.group, num_chunks = piece.chunks(HopperWalk::kChunk);
    const Part part;
    const LaneOffsets<kWidth> offsets(part.lane);
    const int own_rows = part.own * HopperWalk::kRowBytes, my_half = part.half * kHalfBytes;
    const bool keeps_state = part.half == 1;

    const Number* const k = arguments.k.at(piece.batch, piece.head);
    const Number* const v = arguments.v.at(piece.batch, piece.head);
    Number* const dk = arguments.dk.at(piece.batch, piece.head);
    Number* const dv = arguments.dv.at(piece.batch, piece.head);

    // A step of the pipeline is a chunk, the last one first, with one query head of the group.
    struct Step {
        int first, head;
    };
    const auto step_at = [&](int step) {
        return Step{piece.begin + (num_chunks - 1 - step / group) * HopperWalk::kChunk, piece.head * group + step % group};
    };
    const int num_steps = num_chunks * group;
    const auto fetch = [&](int index) {
        if (index < num_steps) {
            const Step step = step_at(index);
            const uint32_t slot = base + index % HopperWalk::kStages * Memory::kSlotBytes + own_rows;
            const auto rows = [&](int tile, const Number* x, int64_t stride) {
                copy_rows<kWidth, 16, 32>(slot + tile, x, stride, step.first + part.own, piece.end, part.lane);
            };
            rows(Memory::kQueries, arguments.q.at(piece.batch, step.head), arguments.q.row);
            rows(Memory::kGrads, arguments.grad_o.at(piece.batch, step.head), arguments.grad_o.row);
            rows(Memory::kKeys, k, arguments.k.row);
            rows(Memory::kValues, v, arguments.v.row);
        }
        commit_copies();
    };
    // In lane i, of the warp's own query i, as in linear/causal_backward.cu.
    float next_factor = 1, next_shift = 0;
    const auto fetch_numbers = [&](int index) {
        if (index >= num_steps || part.lane >= 16) return;
        const Step step = step_at(index);
        const int row = step.first + part.own + part.lane;
        const int64_t head = static_cast<int64_t>(piece.batch) * arguments.heads * group + step.head;
        const int64_t at = head * arguments.num_tokens + row;
        if (arguments.inverse != nullptr) next_factor = row < piece.end ? arguments.inverse[at] : 0.0f;
        next_shift = row < piece.end ? shift_of(arguments.weights[at], next_factor) : 0.0f;
    };
    fetch_numbers(0);
    for (int step = 0; step < HopperWalk::kStages - 1; ++step) fetch(step);

    HopperState state(part);
    float* const norms = reinterpret_cast<float*>(bytes + Memory::kNorms);
    float* const numbers = reinterpret_cast<float*>(bytes + Memory::kNumbers);
    const auto store_state = [&](int chunk) {
        state.store(bytes + Memory::kStates + chunk % 2 * HopperWalk::kStateBytes, norms + chunk % 2 * kWidth);
    };
    if (keeps_state) {
        if (arguments.states != nullptr) {
            const int64_t head = static_cast<int64_t>(piece.batch) * arguments.heads + piece.head;
            state.load(arguments.states, arguments.norms, head * arguments.num_pieces + piece.index);
        }
        store_state(0);
    }

    float sums[2][kHalf / 2];  // of dk and of dv
#pragma unroll 1
    for (int index = 0; index < num_steps; ++index) {
        const int slot = index % HopperWalk::kStages * Memory::kSlotBytes;
        const int chunk = index / group, member = index - chunk * group;
        float factor[HopperWalk::kPasses];
        for (int pass = 0; pass < HopperWalk::kPasses; ++pass)
            factor[pass] = __shfl_sync(kWholeWarp, next_factor, own_row<HopperWalk>(part.lane, pass));
        wait_for_groups<HopperWalk::kStages - 2>();
        __syncwarp();  // all lanes have read the keys that were mapped before
        change_own_rows<HopperWalk>(bytes + slot + Memory::kQueries + own_rows, part.lane,
                                    [&](uint32_t word, int pass) { return map_word<Map>(word, factor[pass]); });
        if (member == 0)
            map_own_rows<HopperWalk>(bytes + Memory::kMapped + own_rows, bytes + slot + Memory::kKeys + own_rows, part.lane,
                                     [](uint32_t word, int) { return map_word<Map>(word); });
        float* const shifts = numbers + index % 2 * HopperWalk::kChunk;
        if (part.lane < 16) shifts[part.own + part.lane] = next_shift;
        publish_to_products();
        __syncthreads();
        fetch(index + HopperWalk::kStages - 1);
        fetch_numbers(index + 1);

        const uint32_t queries = base + slot + Memory::kQueries, grads = base + slot + Memory::kGrads;
        const uint32_t keys = base + Memory::kMapped + my_half, values = base + slot + Memory::kValues + my_half;
        float products[2][kHalf / 2];  // dA, and weights of pairs
        const auto start_pairs = [&](int block) {
            const float* const shift = shifts + kHalf * block;
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i) products[0][i] = shift[part.column(i)];
            begin_products();
            put_rows_product(products[0], values, grads + block * kHalfBytes, true);
            put_rows_product(products[1], keys, queries + block * kHalfBytes, false);
            commit_products();
        };
        const auto start_sums = [&](int block) {
            uint32_t slope[4][4], similarity[4][4];
            round_products<Number>(slope, products[0]);
            round_products<Number>(similarity, products[1]);
            begin_products();
            put_weighted_rows(sums[0], slope, queries + block * kHalfBytes);
            put_weighted_rows(sums[1], similarity, grads + block * kHalfBytes);
            commit_products();
            wait_for_products<0>(sums);
        };
        start_pairs(part.half);
        if (member == 0) {  // the queries of later chunks
            const uint32_t after = base + Memory::kStates + chunk % 2 * HopperWalk::kStateBytes;
            const float* const z = norms + chunk % 2 * kWidth;
            uint32_t key[4][4];
            load_rows<kWidth>(key, base + Memory::kMapped + own_rows, offsets);
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i) sums[0][i] = z[part.column(i)], sums[1][i] = 0;
            begin_products();
            put_rows_product(sums[0], values, after, true);
            put_weighted_rows(sums[1], key, after);
            commit_products();
            wait_for_products<1>(products);
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i)
                if (part.column(i) < part.row(i)) products[0][i] = products[1][i] = 0;
            wait_for_products<0>(sums);
        } else {
            wait_for_products<0>(products);
#pragma unroll
            for (int i = 0; i < kHalf / 2; ++i)
                if (part.column(i) < part.row(i)) products[0][i] = products[1][i] = 0;
        }
        start_sums(part.half);
        if (part.half == 0) {
            start_pairs(1);
            wait_for_products<0>(products);
            start_sums(1);
        }

        if (member == group - 1) {
            const int first_row = step_at(index).first + part.own, rows_left = piece.end - first_row;
            const float one[2] = {1.0f, 1.0f};
            multiply_by_slopes<Map>(tiles_of(sums[0]), one, base + slot + Memory::kKeys + own_rows, offsets);
            const auto store = [&](Products& sum, Number* to, int64_t stride) {
                store_rows<Number, kWidth>(tiles_of(sum), 1.0f, part.lane, rows_left, stride, to + first_row * stride);
            };
            store(sums[0], dk, arguments.dk.row);
            store(sums[1], dv, arguments.dv.row);
        }
        if (keeps_state && chunk + 1 < num_chunks) {
            state.add(queries, grads, offsets, [&](int block) {
                const float2* const two = reinterpret_cast<const float2*>(shifts + 16 * block + 2 * part.pair);
                return uint2{as_sums(two[0], part.quad), as_sums(two[4], part.quad)};
            });
            if (member == group - 1) store_state(chunk + 1);
        }
    }
}

}  // namespace

void linear_causal_grad_queries_hopper(const LinearCausalGradQueries& call, const std::string& feature_map,
                                       cudaStream_t stream) {
    const QueryArguments arguments = query_arguments(call);
    dispatch_feature_map(feature_map, [&](auto map) {
        constexpr auto kKernel = grad_queries_kernel<decltype(map)>;
        launch_walk<kKernel>(arguments, call.batches * call.heads * call.num_pieces, HopperWalk::kThreads, Memory::kBytes,
                             stream, "linear_causal_grad_queries launch");
    });
}

void linear_causal_grad_keys_hopper(const LinearCausalGradKeys& call, const std::string& feature_map, cudaStream_t stream) {
    const KeyArguments arguments = key_arguments(call);
    dispatch_feature_map(feature_map, [&](auto map) {
        constexpr auto kKernel = grad_keys_kernel<decltype(map)>;
        launch_walk<kKernel>(arguments, call.batches * call.kv_heads * call.num_pieces, HopperWalk::kThreads, Memory::kBytes,
                             stream, "linear_causal_grad_keys launch");
    });
}

}  // namespace nearfar
