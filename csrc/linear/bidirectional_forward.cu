// Bidirectional linear attention with one factor: sums over the keys of a piece, and queries that read those of all keys.
//
// Both pass rows through a pipeline in shared memory. For the sums, each warp of a block has 16 features, takes them
// from all rows of a chunk, and maps each once; there is one barrier per chunk. Queries read only the state of their sequence,
// which is in shared memory, so each warp has its own 16 rows of a chunk and needs no synchronisation.
#include "linear/bidirectional_forward.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "linear/bidirectional.cuh"

namespace nearfar {
namespace {

// --------------------------------------------------------------------------------------------------------------- sums

struct SumArguments {
    Tensor<const Number> k, v;
    float *partials, *partial_norms;
    const int32_t* pieces;
    int heads, num_tokens, num_pieces, piece_length;  // heads: of keys
};

template <typename Walk>
struct SumMemory {  // bytes from the start of shared memory: the pipeline
    static constexpr int kKeys = 0, kValues = Walk::kTileBytes;
    static constexpr int kSlotBytes = 2 * Walk::kTileBytes;
    static constexpr int kBytes = Walk::kStages * kSlotBytes;
};

template <typename Walk, int kResident, typename Map>
__global__ void __launch_bounds__(Walk::kThreads, kResident) sums_kernel(const __grid_constant__ SumArguments arguments) {
    using Memory = SumMemory<Walk>;
    extern __shared__ __align__(128) uint4 memory[];
    const uint32_t base = shared_address(memory);

    const Piece piece(arguments);
    if (piece.empty()) return;
    const int num_chunks = piece.chunks(Walk::kChunk);
    const Role<Walk> role(threadIdx.x);
    const Number* const k = arguments.k.at(piece.batch, piece.head);
    const Number* const v = arguments.v.at(piece.batch, piece.head);

    const auto fetch = [&](int chunk) {
        if (chunk < num_chunks) {
            const int first = piece.begin + chunk * Walk::kChunk;
            const uint32_t slot = base + chunk % Walk::kStages * Memory::kSlotBytes;
            copy_chunk<Walk>(slot + Memory::kKeys, k, arguments.k.row, first, piece.end);
            copy_chunk<Walk>(slot + Memory::kValues, v, arguments.v.row, first, piece.end);
        }
        commit_copies();
    };
    for (int chunk = 0; chunk < Walk::kStages - 1; ++chunk) fetch(chunk);

    Sums<Walk> sums(role);
    float norm[2] = {};  // of features quad and quad + 8, where pair == 0
#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        wait_for_groups<Walk::kStages - 2>();
        __syncthreads();
        fetch(chunk + Walk::kStages - 1);

        const uint32_t slot = base + chunk % Walk::kStages * Memory::kSlotBytes;
        const int rows_left = piece.end - (piece.begin + chunk * Walk::kChunk);
        float chunk_norm[4] = {};  // in the first column
        sums.add(slot + Memory::kKeys, slot + Memory::kValues, [&](uint32_t(&a)[4], int block) {
            // Values beyond the end are zero, features are not: so is what they are multiplied by for the norms.
            const int row = 16 * block + 2 * role.pair, count = role.quad == 0 ? rows_left : 0;
            const auto ones = [&](int i) { return pack<Number>(i < count ? 1.0f : 0.0f, i + 1 < count ? 1.0f : 0.0f); };
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = map_word<Map>(a[i]);
            mma<Number>(chunk_norm, a, ones(row), ones(row + 8));
        });
        norm[0] += chunk_norm[0], norm[1] += chunk_norm[2];
    }

    const int64_t to = (static_cast<int64_t>(piece.batch) * arguments.heads + piece.head) * arguments.num_pieces + piece.index;
    sums.store(arguments.partials + to * Walk::kWidth * Walk::kWidth);
    if (role.pair == 0) {
        float* const norms = arguments.partial_norms + to * Walk::kWidth + 16 * role.warp + role.quad;
        norms[0] = norm[0], norms[8] = norm[1];
    }
}

// --------------------------------------------------------------------------------------------------------------- read

struct ReadArguments {
    Tensor<const Number> q;
    Tensor<Number> o;
    const float *states, *norms;
    float* inverse;
    const int32_t* pieces;
    int heads, group, num_tokens, num_pieces, piece_length, num_states;
    float eps;
};

// Bytes from the start of shared memory: the pipeline, the state, and its norms as tiles of 8 columns, each norm as the sum of
// two numbers.
template <typename Walk>
struct ReadMemory {
    static constexpr int kSlotBytes = Walk::kTileBytes;
    static constexpr int kState = Walk::kStages * kSlotBytes;
    static constexpr int kNorms = kState + Walk::kStateBytes;
    static constexpr int kBytes = kNorms + 16 * Walk::kWidth;
};

template <typename Walk, int kResident, typename Map>
__global__ void __launch_bounds__(Walk::kThreads, kResident) read_kernel(const __grid_constant__ ReadArguments arguments) {
    constexpr int kWidth = Walk::kWidth, kBlockBytes = Walk::kBlockBytes;
    using Memory = ReadMemory<Walk>;
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
    const Number* const q = arguments.q.at(piece.batch, piece.head);
    Number* const o = arguments.o.at(piece.batch, piece.head);
    float* const inverse = arguments.inverse == nullptr ? nullptr : arguments.inverse +
        (static_cast<int64_t>(piece.batch) * arguments.heads + piece.head) * arguments.num_tokens;

    const auto slot_of = [&](int chunk) {
        return base + chunk % Walk::kStages * Memory::kSlotBytes + role.warp * kBlockBytes;
    };
    const auto fetch = [&](int chunk) {
        if (chunk < num_chunks)
            copy_rows<kWidth, 16, 32>(slot_of(chunk), q, arguments.q.row, first + chunk * Walk::kChunk, piece.end, role.lane);
        commit_copies();
    };
    for (int chunk = 0; chunk < Walk::kStages - 1; ++chunk) fetch(chunk);

    const int64_t state = state_index(piece, piece.head / arguments.group, arguments.heads / arguments.group, arguments.pieces,
                                      arguments.num_pieces, arguments.num_states);
    copy_state<Walk>(bytes + Memory::kState, arguments.states + state * kWidth * kWidth);
    if (threadIdx.x < kWidth) {
        const uint32_t norm = as_two(arguments.norms[state * kWidth + threadIdx.x]);
        *reinterpret_cast<uint4*>(bytes + Memory::kNorms + 16 * threadIdx.x) = {norm, 0, 0, 0};
    }
    __syncthreads();

#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        wait_for_groups<Walk::kStages - 2>();
        __syncwarp();
        fetch(chunk + Walk::kStages - 1);

        const uint32_t rows = slot_of(chunk), norms = base + Memory::kNorms + 16 * role.lane;
        float acc[kWidth / 8][4] = {}, norm[4] = {};  // norm: in the first two columns, to be added up
        uint32_t z[4];
#pragma unroll
        for (int step = 0; step < Walk::kSteps; ++step) {
            uint32_t query[4];
            load_matrices(query, whole.normal_at(rows, step));
#pragma unroll
            for (int i = 0; i < 4; ++i) query[i] = map_word<Map>(query[i]);
            multiply<Number, kWidth>(acc, query, base + Memory::kState + step * kBlockBytes, 0, whole);
            if (step % 2 == 0) load_matrices_transposed(z, norms + step * 16 * 16);
            mma<Number>(norm, query, z[step % 2 * 2], z[step % 2 * 2 + 1]);
        }

        const int first_row = first + chunk * Walk::kChunk, rows_left = piece.end - first_row;
        if (inverse != nullptr) {
            normalise_rows(acc, norm, arguments.eps, role.lane, [&](int row, float factor) {
                if (role.pair == 0 && row < rows_left) inverse[first_row + row] = factor;
            });
        }
        store_rows<Number, kWidth>(acc, 1.0f, role.lane, rows_left, arguments.o.row, o + first_row * arguments.o.row);
    }
}

template <int Width>
struct Config {
    static constexpr int kResident = Width == 64 ? 4 : 1;  // blocks on a multiprocessor
    using SumWalk = Walk<Width, 64, Width / 16, 3>;
    using ReadWalk = Walk<Width, Width, Width / 16, Width == 64 ? 4 : 3>;
    using Sum = SumMemory<SumWalk>;
    using Read = ReadMemory<ReadWalk>;
};

}  // namespace

int64_t linear_bidirectional_forward_shared_bytes(int64_t width) {
    return width == 64 ? std::max(Config<64>::Sum::kBytes, Config<64>::Read::kBytes)
                       : std::max(Config<128>::Sum::kBytes, Config<128>::Read::kBytes);
}

void linear_bidirectional_sums(const LinearBidirectionalSums& call, const std::string& feature_map, cudaStream_t stream) {
    const SumArguments arguments{input_tensor<Number>(call.k, call.k_strides), input_tensor<Number>(call.v, call.v_strides),
                                 call.partials, call.partial_norms, call.pieces,
                                 static_cast<int>(call.kv_heads), static_cast<int>(call.num_tokens),
                                 static_cast<int>(call.num_pieces), static_cast<int>(call.piece_length)};
    dispatch_walk(feature_map, call.width, [&](auto map, auto width) {
        using Config = Config<width>;
        using Walk = typename Config::SumWalk;
        launch_walk<sums_kernel<Walk, Config::kResident, decltype(map)>>(
            arguments, call.batches * call.kv_heads * call.num_pieces, Walk::kThreads, Config::Sum::kBytes, stream,
            "linear_bidirectional_sums launch");
    });
}

void linear_bidirectional_read(const LinearBidirectionalRead& call, const std::string& feature_map, cudaStream_t stream) {
    const ReadArguments arguments{input_tensor<Number>(call.q, call.q_strides), output_tensor<Number>(call.o, call.o_strides),
                                  call.states, call.norms, call.inverse, call.pieces,
                                  static_cast<int>(call.heads), static_cast<int>(call.heads / call.kv_heads),
                                  static_cast<int>(call.num_tokens), static_cast<int>(call.num_pieces),
                                  static_cast<int>(call.piece_length), static_cast<int>(call.num_states),
                                  static_cast<float>(call.eps)};
    dispatch_walk(feature_map, call.width, [&](auto map, auto width) {
        using Config = Config<width>;
        using Walk = typename Config::ReadWalk;
        launch_walk<read_kernel<Walk, Config::kResident, decltype(map)>>(
            arguments, call.batches * call.heads * call.num_pieces, Walk::kThreads, Config::Read::kBytes, stream,
            "linear_bidirectional_read launch");
    });
}

}  // namespace nearfar
