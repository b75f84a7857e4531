// Causal Hadamard attention with two factors: a block walks through a piece of a sequence with the state in registers.
//
// The order of things in a chunk is that of linear/causal_forward.cu.
#include "hadamard/causal_forward.h"

#include <cstdint>
#include <string>

#include "hadamard/causal_walk.cuh"

namespace nearfar {
namespace {

struct Arguments {
    Factors q, k;
    Tensor<const Number> v;
    Tensor<Number> o;
    const float *states, *norms;
    float* inverse;
    const int32_t* pieces;
    int heads, group, num_tokens, num_pieces, piece_length;
    float eps;
};

using ForwardWalk = HadamardWalk<3>;

// Bytes from the start of shared memory: the pipeline, and the states before this chunk and before the next.
struct Memory {
    static constexpr int kQueries = 0, kKeys = ForwardWalk::kFactorsBytes, kValues = 2 * ForwardWalk::kFactorsBytes;
    static constexpr int kSlotBytes = kValues + ForwardWalk::kValuesBytes;
    static constexpr int kStates = ForwardWalk::kStages * kSlotBytes;
    static constexpr int kBytes = kStates + 2 * ForwardWalk::kStateBytes;
};

template <typename Map>
__global__ void __launch_bounds__(ForwardWalk::kThreads, 1) hadamard_causal_forward_kernel(
    const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(128) uint4 memory[];
    char* const bytes = reinterpret_cast<char*>(memory);
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int num_chunks = piece.chunks(ForwardWalk::kChunk);
    const int kv_head = piece.head / arguments.group;
    const Role<ForwardWalk> role(threadIdx.x);
    const TileOffsets offsets(role.lane);
    const int own_factors = role.block * ForwardWalk::kFactorsBlock, own_values = role.block * ForwardWalk::kValuesBlock;

    const Number* const v = arguments.v.at(piece.batch, kv_head);
    Number* const o = arguments.o.at(piece.batch, piece.head);
    float* const inverse = arguments.inverse == nullptr ? nullptr : arguments.inverse +
        (static_cast<int64_t>(piece.batch) * arguments.heads + piece.head) * arguments.num_tokens;

    const auto fetch = [&](int chunk) {
        if (chunk < num_chunks) {
            const int first = piece.begin + chunk * ForwardWalk::kChunk + role.own;
            const uint32_t slot = base + chunk % ForwardWalk::kStages * Memory::kSlotBytes;
            arguments.k.copy_own_rows(slot + Memory::kKeys + own_factors, piece.batch, kv_head, first, piece.end, role.lane);
            arguments.q.copy_own_rows(slot + Memory::kQueries + own_factors, piece.batch, piece.head, first, piece.end,
                                      role.lane);
            copy_rows<kValueWidth, 16, 32>(slot + Memory::kValues + own_values, v, arguments.v.row, first, piece.end,
                                           role.lane);
        }
        commit_copies();
    };
    for (int chunk = 0; chunk < ForwardWalk::kStages - 1; ++chunk) fetch(chunk);

    HadamardState state(role);
    const auto state_at = [&](int chunk) { return Memory::kStates + chunk % 2 * ForwardWalk::kStateBytes; };
    if (arguments.states != nullptr) {
        const int64_t head = static_cast<int64_t>(piece.batch) * (arguments.heads / arguments.group) + kv_head;
        state.load(arguments.states, arguments.norms, head * arguments.num_pieces + piece.index);
    }
    state.store(bytes + state_at(0));
    const uint32_t one = role.quad == 0 ? pack<Number>(1.0f, 1.0f) : 0;  // in the first column of a fragment b

#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const int slot = chunk % ForwardWalk::kStages * Memory::kSlotBytes;
        uint32_t query[2][4];
        wait_for_groups<ForwardWalk::kStages - 2>();
        change_own_rows<OwnTile<2 * kFactor>>(bytes + slot + Memory::kKeys + own_factors, role.lane,
                                              [](uint32_t word, int) { return map_word<Map>(word); });
        __syncwarp();
        load_features<Map>(query, base + slot + Memory::kQueries + own_factors, offsets.factors);
        __syncthreads();
        fetch(chunk + ForwardWalk::kStages - 1);

        const uint32_t keys = base + slot + Memory::kKeys, values = base + slot + Memory::kValues;
        const uint32_t before = base + state_at(chunk);
        float acc[kValueWidth / 8][4] = {}, norm[4] = {};  // norm: in the first two columns, to be added up
        float at_first[2][4] = {};                         // sum_b x^2[b] z[a, b]
        read_state(acc, query, before, offsets.values, role.lane);
        add_first_norms(at_first, query, before + ForwardWalk::kStateNorms, offsets.factors);
        const auto add_pairs = [&](int block, bool diagonal) {
            float weights[2][2][4], weight[2][4];
            uint32_t a[4];
            similarities(weights, query, keys + block * ForwardWalk::kFactorsBlock, offsets.factors);
            multiply_elements(weight, weights[0], weights[1]);
            if (diagonal) mask_diagonal<false>(weight, role.quad, role.pair);
            round_to_fragment<Number>(a, weight);
            multiply<Number, kValueWidth>(acc, a, values + block * ForwardWalk::kValuesBlock, 0, offsets.values);
            mma<Number>(norm, a, one, one);
        };
#pragma unroll 2
        for (int block = 0; block < role.block; ++block) add_pairs(block, false);
        add_pairs(role.block, true);

        const int first_row = piece.begin + chunk * ForwardWalk::kChunk + 16 * role.block, rows_left = piece.end - first_row;
        if (inverse != nullptr) {
            float sum[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) sum[r] = role.pair == 0 ? norm[2 * r] + norm[2 * r + 1] : 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 outer = unpack<Number>(query[0][i]);
                const float* const at = at_first[i / 2] + i % 2 * 2;
                sum[i % 2] += outer.x * at[0] + outer.y * at[1];
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                sum[r] = quad_sum(sum[r]) + arguments.eps;
                const float factor = inverse_of(sum[r]);
                const int row = role.quad + 8 * r;
                if (role.pair == 0 && row < rows_left) inverse[first_row + row] = factor;
#pragma unroll
                for (int i = 0; i < kValueWidth / 4; ++i) acc[i / 2][2 * r + i % 2] *= factor;
            }
        }
        store_rows<Number, kValueWidth>(acc, 1.0f, role.lane, rows_left, arguments.o.row, o + first_row * arguments.o.row);

        if (chunk + 1 < num_chunks) {
            state.add(keys, values, offsets, [&](int) { return uint2{one, one}; });
            state.store(bytes + state_at(chunk + 1));
        }
    }
}

}  // namespace

int64_t hadamard_causal_forward_shared_bytes() { return Memory::kBytes; }

void hadamard_causal_forward(const HadamardCausalForward& call, const std::string& feature_map, cudaStream_t stream) {
    const auto input = input_tensor<Number>;
    Arguments arguments{{input(call.q1, call.q1_strides), input(call.q2, call.q2_strides)},
                        {input(call.k1, call.k1_strides), input(call.k2, call.k2_strides)},
                        input(call.v, call.v_strides), output_tensor<Number>(call.o, call.o_strides),
                        call.states, call.norms, call.inverse, call.pieces,
                        static_cast<int>(call.heads), static_cast<int>(call.heads / call.kv_heads),
                        static_cast<int>(call.num_tokens), static_cast<int>(call.num_pieces),
                        static_cast<int>(call.piece_length), static_cast<float>(call.eps)};
    dispatch_feature_map(feature_map, [&](auto map) {
        constexpr auto kKernel = hadamard_causal_forward_kernel<decltype(map)>;
        launch_walk<kKernel>(arguments, call.batches * call.heads * call.num_pieces, ForwardWalk::kThreads, Memory::kBytes,
                             stream, "hadamard_causal_forward launch");
    });
}

}  // namespace nearfar
