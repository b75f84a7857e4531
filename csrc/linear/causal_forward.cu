// Causal linear attention with one factor: a block walks through a piece of a sequence with the state in registers.
//
// In each chunk a warp reads the state before the chunk with 16 queries, pairs them with the keys of the chunk up to their own,
// and adds its part of the chunk to the state. A key's features are computed once, by the warp that fetched it, and replace
// it in shared memory; those of queries stay in registers. There is one barrier per chunk: before it warps map the rows that
// they fetched; after it they only read tiles, fetch into the slot that the last chunk released, and store the next state.
#include "linear/causal_forward.h"

#include <cstdint>
#include <string>

#include "common/walk.cuh"

namespace nearfar {
namespace {

struct Arguments {
    Tensor<const Number> q, k, v;
    Tensor<Number> o;
    const float *states, *norms;
    float* inverse;
    const int32_t* pieces;
    int heads, group, num_tokens, num_pieces, piece_length;
    float eps;
};

// Bytes from the start of shared memory: the pipeline, the states before this chunk and before the next, and their norms as
// tiles of 8 columns, each norm as the sum of two numbers.
template <typename Walk>
struct Memory {
    static constexpr int kQueries = 0, kKeys = Walk::kTileBytes, kValues = 2 * Walk::kTileBytes;
    static constexpr int kSlotBytes = 3 * Walk::kTileBytes;
    static constexpr int kStates = Walk::kStages * kSlotBytes;
    static constexpr int kNorms = kStates + 2 * Walk::kStateBytes;
    static constexpr int kNormBytes = 16 * Walk::kWidth;
    static constexpr int kBytes = kNorms + 2 * kNormBytes;
};

template <typename Walk, typename Map>
__global__ void __launch_bounds__(Walk::kThreads, 1) linear_causal_forward_kernel(const __grid_constant__ Arguments arguments) {
    constexpr int kWidth = Walk::kWidth, kBlockBytes = Walk::kBlockBytes;
    using Memory = Memory<Walk>;
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

    const Number* const q = arguments.q.at(piece.batch, piece.head);
    const Number* const k = arguments.k.at(piece.batch, kv_head);
    const Number* const v = arguments.v.at(piece.batch, kv_head);
    Number* const o = arguments.o.at(piece.batch, piece.head) + role.part * Walk::kColumns;
    float* const inverse = arguments.inverse == nullptr ? nullptr : arguments.inverse +
        (static_cast<int64_t>(piece.batch) * arguments.heads + piece.head) * arguments.num_tokens;

    const auto fetch = [&](int chunk) {
        if (chunk < num_chunks) {
            const int first = piece.begin + chunk * Walk::kChunk + role.own;
            const uint32_t slot = base + chunk % Walk::kStages * Memory::kSlotBytes + own_rows;
            const auto rows = [&](int tile, const Number* x, int64_t stride) {
                copy_rows<kWidth, Walk::kOwnRows, 32>(slot + tile, x, stride, first, piece.end, role.lane);
            };
            rows(Memory::kKeys, k, arguments.k.row);
            rows(Memory::kQueries, q, arguments.q.row);
            rows(Memory::kValues, v, arguments.v.row);
        }
        commit_copies();
    };
    for (int chunk = 0; chunk < Walk::kStages - 1; ++chunk) fetch(chunk);

    State<Walk> state(role);
    const auto store_state = [&](int parity) {
        state.store(bytes + Memory::kStates + parity * Walk::kStateBytes);
        state.store_norms([&](int row, float norm) {
            char* const to = bytes + Memory::kNorms + parity * Memory::kNormBytes + 16 * row;
            *reinterpret_cast<uint4*>(to) = {as_two(norm), 0, 0, 0};
        });
    };
    if (arguments.states != nullptr) {
        const int64_t head = static_cast<int64_t>(piece.batch) * (arguments.heads / arguments.group) + kv_head;
        state.load(arguments.states, arguments.norms, head * arguments.num_pieces + piece.index);
    }
    store_state(0);
    const uint32_t one = role.quad == 0 ? pack<Number>(1.0f, 1.0f) : 0;  // in the first column of a fragment b

#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const int slot = chunk % Walk::kStages * Memory::kSlotBytes;
        uint32_t query[Walk::kSteps][4];
        const auto load_queries = [&] {
            load_rows<kWidth>(query, base + slot + Memory::kQueries + my_rows, whole);
#pragma unroll
            for (int i = 0; i < 4 * Walk::kSteps; ++i) query[i / 4][i % 4] = map_word<Map>(query[i / 4][i % 4]);
        };
        wait_for_groups<Walk::kStages - 2>();
        change_own_rows<Walk>(bytes + slot + Memory::kKeys + own_rows, role.lane,
                              [](uint32_t word, int) { return map_word<Map>(word); });
        if (Walk::kParts == 1) {  // nobody else has fetched any of them
            __syncwarp();
            load_queries();
        }
        __syncthreads();
        fetch(chunk + Walk::kStages - 1);
        if (Walk::kParts > 1) load_queries();

        const uint32_t keys = base + slot + Memory::kKeys, values = base + slot + Memory::kValues;
        const uint32_t before = base + Memory::kStates + chunk % 2 * Walk::kStateBytes;
        const uint32_t norms = base + Memory::kNorms + chunk % 2 * Memory::kNormBytes + 16 * role.lane;
        float acc[Walk::kColumns / 8][4] = {}, norm[4] = {};  // norm: in the first two columns, to be added up
#pragma unroll
        for (int step = 0; step < Walk::kSteps; ++step)
            multiply<Number, kWidth>(acc, query[step], before + step * kBlockBytes, 0, mine);
#pragma unroll
        for (int step = 0; step < Walk::kSteps; step += 2) {
            uint32_t b[4];
            load_matrices_transposed(b, norms + step * 16 * 16);
            mma<Number>(norm, query[step], b[0], b[1]);
            mma<Number>(norm, query[step + 1], b[2], b[3]);
        }
        const auto add_pairs = [&](int block, bool diagonal) {
            float weight[2][4] = {};
            uint32_t a[4];
            multiply_transposed<Number, kWidth>(weight, query, keys + block * kBlockBytes, 0, whole);
            if (diagonal) mask_diagonal<false>(weight, role.quad, role.pair);
            round_to_fragment<Number>(a, weight);
            multiply<Number, kWidth>(acc, a, values + block * kBlockBytes, 0, mine);
            mma<Number>(norm, a, one, one);
        };
#pragma unroll 2
        for (int block = 0; block < role.block; ++block) add_pairs(block, false);
        add_pairs(role.block, true);

        const int first_row = piece.begin + chunk * Walk::kChunk + 16 * role.block, rows_left = piece.end - first_row;
        if (inverse != nullptr) {
            normalise_rows(acc, norm, arguments.eps, role.lane, [&](int row, float factor) {
                if (role.part == 0 && role.pair == 0 && row < rows_left) inverse[first_row + row] = factor;
            });
        }
        store_rows<Number, Walk::kColumns>(acc, 1.0f, role.lane, rows_left, arguments.o.row, o + first_row * arguments.o.row);

        if (chunk + 1 < num_chunks) {
            state.add(keys, values, [&](int) { return uint2{one, one}; });
            store_state((chunk + 1) % 2);
        }
    }
}

template <int Width>
using WalkOf = Walk<Width, Width == 64 ? 128 : 64, 8, 3>;

template <int Width, typename Map>
void launch(const LinearCausalForward& call, cudaStream_t stream) {
    using Walk = WalkOf<Width>;
    constexpr auto kKernel = linear_causal_forward_kernel<Walk, Map>;
    constexpr int kBytes = Memory<Walk>::kBytes;
    Arguments arguments{input_tensor<Number>(call.q, call.q_strides), input_tensor<Number>(call.k, call.k_strides),
                        input_tensor<Number>(call.v, call.v_strides), output_tensor<Number>(call.o, call.o_strides),
                        call.states, call.norms, call.inverse, call.pieces,
                        static_cast<int>(call.heads), static_cast<int>(call.heads / call.kv_heads),
                        static_cast<int>(call.num_tokens), static_cast<int>(call.num_pieces),
                        static_cast<int>(call.piece_length), static_cast<float>(call.eps)};
    launch_walk<kKernel>(arguments, call.batches * call.heads * call.num_pieces, Walk::kThreads, kBytes, stream,
                         "linear_causal_forward launch");
}

}  // namespace

int64_t linear_causal_forward_shared_bytes(int64_t width) {
    return width == 64 ? Memory<WalkOf<64>>::kBytes : Memory<WalkOf<128>>::kBytes;
}

void linear_causal_forward(const LinearCausalForward& call, const std::string& feature_map, cudaStream_t stream) {
    dispatch_walk(feature_map, call.width,
                  [&](auto map, auto width) { launch<width, decltype(map)>(call, stream); });
}

}  // namespace nearfar
