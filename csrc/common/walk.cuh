// Shared by the walks of causal linear attention: their traits, and the state that they carry.
//
// A block walks through a piece of a sequence in chunks of tokens. Tensors of a chunk lie as tiles in a stage of a pipeline in
// shared memory. Sixteen rows of a result belong to one warp, or each of kParts warps has some of its columns.
//
// The state, sum_j x_j y_j^T over earlier chunks, is in float32 in the registers of all warps, as c fragments of
// mma.cuh. After each chunk they round it into shared memory, where it is an operand of the products of the next chunk.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "check.h"
#include "features.cuh"
#include "fragments.cuh"
#include "occupancy.h"
#include "tensor.cuh"
#include "tile.cuh"

namespace nearfar {

using Number = __nv_bfloat16;  // of all tensors; sums of features exceed the range of float16

template <int kWidth_, int kChunk_, int kWarps_, int kStages_>
struct Walk {
    static constexpr int kWidth = kWidth_;    // of keys and of values
    static constexpr int kChunk = kChunk_;    // tokens
    static constexpr int kWarps = kWarps_;
    static constexpr int kStages = kStages_;  // of the pipeline
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kSteps = kWidth / 16;  // of a product whose inner dimension is the width
    static constexpr int kRowBytes = Tile<kWidth>::kRowBytes;
    static constexpr int kBlockBytes = 16 * kRowBytes;
    static constexpr int kTileBytes = kChunk * kRowBytes;
    static constexpr int kBlocks = kChunk / 16;        // of tokens
    static constexpr int kParts = kWarps / kBlocks;    // warps that share 16 rows
    static constexpr int kColumns = kWidth / kParts;   // of a warp's results
    static constexpr int kOwnRows = kChunk / kWarps;   // that a warp fetches and maps
    static constexpr int kRowsAtOnce = 32 / Tile<kWidth>::kChunks, kPasses = kOwnRows / kRowsAtOnce;  // in which it does
    static constexpr int kStateParts = kWarps / kSteps;  // warps that share 16 rows of the state
    static constexpr int kStateColumns = kWidth / kStateParts;
    static constexpr int kStateBytes = kWidth * kRowBytes;
    static_assert(kParts * kBlocks == kWarps && kStateParts * kSteps == kWarps, "every warp has its rows");
    static_assert(kOwnRows % 8 == 0, "they start where the permutation of a tile does");
};

// What a warp has to do in each chunk.
template <typename Walk>
struct Role {
    int lane, quad, pair, warp;
    int block, part;              // of the results
    int own;                      // first of the rows that it fetches
    int state_block, state_part;  // of the state

    __device__ explicit Role(int thread)
        : lane(thread % 32), quad(lane / 4), pair(lane % 4), warp(thread / 32), part(warp / Walk::kBlocks),
          state_block(warp % Walk::kSteps), state_part(warp / Walk::kSteps) {
        // The later a block, the more it pairs with. Warps i and i + 4, which share a scheduler, get a short and a long row.
        block = warp % Walk::kBlocks;
        if (warp / 4 % 2 == 1) block = (Walk::kBlocks <= 4 ? 3 : 11) - block;
        own = (block * Walk::kParts + part) * Walk::kOwnRows;
    }
};

// The tokens and the head of a block.
struct Piece {
    int index, head, batch;
    int begin, end;

    // That of this block. arguments.pieces: begins and then ends, or null for pieces of `piece_length` tokens.
    template <typename Arguments>
    __device__ explicit Piece(const Arguments& arguments)
        : Piece(blockIdx.x, arguments.pieces, arguments.num_pieces, arguments.heads, arguments.num_tokens,
                arguments.piece_length) {}
    __device__ Piece(int block, const int32_t* pieces, int num_pieces, int num_heads, int num_tokens, int length)
        : index(block % num_pieces), head(block / num_pieces % num_heads), batch(block / num_pieces / num_heads) {
        begin = pieces == nullptr ? index * length : pieces[index];
        end = pieces == nullptr ? min(begin + length, num_tokens) : pieces[num_pieces + index];
    }
    __device__ bool empty() const { return begin >= end; }
    __device__ int chunks(int tokens) const { return (end - begin + tokens - 1) / tokens; }
};

// A number as the sum of two, in one word.
__device__ __forceinline__ uint32_t as_two(float x) {
    const float high = __bfloat162float(__float2bfloat16(x));
    return pack<Number>(high, x - high);
}

// Divides rows quad and quad + 8 of acc by their sums of weights, norm in the first two columns, to be added up, and eps;
// store(row, inverse) by the four lanes that share the row.
template <int Tiles, typename Store>
__device__ __forceinline__ void normalise_rows(float (&acc)[Tiles][4], const float (&norm)[4], float eps, int lane,
                                               const Store& store) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = __shfl_sync(kWholeWarp, norm[2 * r] + norm[2 * r + 1], lane - lane % 4) + eps;
        const float factor = inverse_of(sum);
        store(lane / 4 + 8 * r, factor);
#pragma unroll
        for (int i = 0; i < 2 * Tiles; ++i) acc[i / 2][2 * r + i % 2] *= factor;
    }
}

// Rows that lanes have fetched themselves by copy_rows, changed: change(word, pass). In each pass a lane has a chunk of row
// own_row(lane, pass).
template <typename Walk>
__device__ __forceinline__ int own_row(int lane, int pass) {
    return lane / Tile<Walk::kWidth>::kChunks + pass * Walk::kRowsAtOnce;
}

template <typename Walk, typename Change>
__device__ __forceinline__ void map_own_rows(char* to, char* from, int lane, const Change& change) {
    using Tile = Tile<Walk::kWidth>;
    const auto at = [&](int pass, char* rows) {
        return reinterpret_cast<uint4*>(rows + Tile::offset(own_row<Walk>(lane, pass), lane % Tile::kChunks));
    };
    uint4 x[Walk::kPasses];
#pragma unroll
    for (int pass = 0; pass < Walk::kPasses; ++pass) x[pass] = *at(pass, from);
#pragma unroll
    for (int pass = 0; pass < Walk::kPasses; ++pass)
        *at(pass, to) = {change(x[pass].x, pass), change(x[pass].y, pass), change(x[pass].z, pass), change(x[pass].w, pass)};
}

template <typename Walk, typename Change>
__device__ __forceinline__ void change_own_rows(char* rows, int lane, const Change& change) {
    map_own_rows<Walk>(rows, rows, lane, change);
}

// Two numbers, each as the sum of two, in a word of a fragment b: the rounded ones in column 0, what they lack in column 1.
__device__ __forceinline__ uint32_t as_sums(float2 x, int quad) {
    const uint32_t high = pack<Number>(x.x, x.y);
    const float2 rounded = unpack<Number>(high);
    return quad == 0 ? high : quad == 1 ? pack<Number>(x.x - rounded.x, x.y - rounded.y) : 0;
}

// Of a diagonal block: c becomes zero above (Upper: below) the diagonal.
template <bool Upper>
__device__ __forceinline__ void mask_diagonal(float (&c)[2][4], int quad, int pair) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int row = quad + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * pair + i % 2;
        if (Upper ? column < row : column > row) c[i / 4][i % 4] = 0;
    }
}

// Takes from each row of a diagonal block the mean of what mask_diagonal<false> leaves.
__device__ __forceinline__ void take_means(float (&c)[2][4], float (&mean)[2], int quad, int pair) {
    mask_diagonal<false>(c, quad, pair);
#pragma unroll
    for (int r = 0; r < 2; ++r)
        mean[r] = quad_sum(c[0][2 * r] + c[0][2 * r + 1] + c[1][2 * r] + c[1][2 * r + 1]) / (quad + 8 * r + 1);
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i / 4][i % 4] -= mean[i / 2 % 2];
    mask_diagonal<false>(c, quad, pair);
}

// -dO . o of a row, by w, which has it times the inverse.
__device__ __forceinline__ float shift_of(float weight, float inverse) { return inverse == 0 ? 0.0f : weight / inverse; }

// c *= factor phi'(x), with x the same rows of a tile; `lane` determines the columns.
template <typename Map, int Width, int Tiles>
__device__ __forceinline__ void multiply_by_slopes(float (&c)[Tiles][4], const float (&factor)[2], uint32_t rows,
                                                   const LaneOffsets<Width>& lane) {
#pragma unroll
    for (int step = 0; step < Tiles / 2; ++step) {
        uint32_t raw[4];
        load_matrices(raw, lane.normal_at(rows, step));
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // word i of a fragment a is row quad + i % 2 * 8 of the left or the right columns
            const float2 x = unpack<Number>(raw[i]);
            float(&at)[4] = c[2 * step + i / 2];
            at[i % 2 * 2] *= factor[i % 2] * Map::grad(x.x);
            at[i % 2 * 2 + 1] *= factor[i % 2] * Map::grad(x.y);
        }
    }
}

// The part of a state that one warp keeps.
template <typename Walk>
class State {
    static constexpr int kWidth = Walk::kWidth, kTiles = Walk::kStateColumns / 8;
    const Role<Walk>& role_;
    const LaneOffsets<kWidth> rows_, columns_;
    float sum_[kTiles][4] = {};
    float norm_[2] = {};  // of rows quad and quad + 8, where state_part == 0 and pair == 0

   public:
    __device__ explicit State(const Role<Walk>& role)
        : role_(role), rows_(role.lane, role.state_block),
          columns_(role.lane, role.state_part * Walk::kStateColumns / 16) {}

    // states (.., D, Dv) and norms (.., D), float32.
    __device__ void load(const float* states, const float* norms, int64_t index) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = 16 * role_.state_block + role_.quad + 8 * r;
            const int column = role_.state_part * Walk::kStateColumns + 2 * role_.pair;
            const float* const from = states + (index * kWidth + row) * kWidth + column;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const float2 x = *reinterpret_cast<const float2*>(from + 8 * tile);
                sum_[tile][2 * r] = x.x, sum_[tile][2 * r + 1] = x.y;
            }
            norm_[r] = norms[index * kWidth + row];
        }
    }

    // Adds sum_j x_j y_j^T over a chunk, and to the norms sum_j x_j w_j: weights(block) is the fragment b with w in columns 0
    // and 1, to be added up. The sum of a chunk is added to that of all chunks before it, so that this is rounded once a chunk.
    template <typename Weights>
    __device__ __forceinline__ void add(uint32_t x, uint32_t y, const Weights& weights) {
        float sum[kTiles][4] = {}, norm[4] = {};
#pragma unroll
        for (int block = 0; block < Walk::kBlocks; ++block) {
            uint32_t a[4];
            load_matrices_transposed(a, rows_.across_at(x + block * Walk::kBlockBytes, 0));
            multiply<Number, kWidth>(sum, a, y + block * Walk::kBlockBytes, 0, columns_);
            const uint2 b = weights(block);
            mma<Number>(norm, a, b.x, b.y);
        }
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) sum_[i / 4][i % 4] += sum[i / 4][i % 4];
        norm_[0] += norm[0] + norm[1];
        norm_[1] += norm[2] + norm[3];
    }

    // The state, rounded, as a tile.
    __device__ __forceinline__ void store(char* tile) const {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
            const int row = 16 * role_.state_block + role_.quad + i % 2 * 8;
            const int chunk = role_.state_part * kTiles + i / 2;
            *reinterpret_cast<uint32_t*>(tile + Tile<kWidth>::offset(row, chunk) + 4 * role_.pair) =
                pack<Number>(sum_[i / 2][i % 2 * 2], sum_[i / 2][i % 2 * 2 + 1]);
        }
    }

    // store(row, norm) by one lane for each row.
    template <typename Store>
    __device__ __forceinline__ void store_norms(const Store& store) const {
        if (role_.state_part > 0 || role_.pair > 0) return;
        for (int r = 0; r < 2; ++r) store(16 * role_.state_block + role_.quad + 8 * r, norm_[r]);
    }
};

// Calls `body` with a feature map, by its name in Python, and the width as an integral constant.
template <typename Body>
void dispatch_walk(const std::string& feature_map, int64_t width, const Body& body) {
    dispatch_feature_map(feature_map, [&](auto map) {
        switch (width) {
            case 64: return body(map, std::integral_constant<int, 64>());
            case 128: return body(map, std::integral_constant<int, 128>());
            default: throw std::invalid_argument("width must be 64 or 128");
        }
    });
}

// A launch of a kernel whose only parameter is `arguments`.
template <auto kKernel, typename Arguments>
void launch_walk(Arguments arguments, int64_t blocks, int threads, int bytes, cudaStream_t stream, const char* name) {
    resident_blocks<kKernel>(threads, bytes);
    void* parameters[] = {&arguments};
    if (blocks == 0) return;
    check(cudaLaunchKernel(kKernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), parameters, bytes, stream), name);
}

}  // namespace nearfar
