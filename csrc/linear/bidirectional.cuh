// What the kernels of bidirectional linear attention share: sums over the rows of a piece, and the state of a whole sequence as
// an operand.
#pragma once

#include <cstdint>

#include "common/walk.cuh"

namespace nearfar {

// 16 rows of sum_i x_i y_i^T over the rows of a piece, in the registers of one warp: like State, but nothing reads it before it
// is complete.
template <typename Walk>
class Sums {
    static constexpr int kWidth = Walk::kWidth, kTiles = kWidth / 8;
    static_assert(Walk::kStateParts == 1, "a warp has all columns of its rows");
    const Role<Walk>& role_;
    const LaneOffsets<kWidth> rows_, columns_;
    float sum_[kTiles][4] = {};

   public:
    __device__ explicit Sums(const Role<Walk>& role) : role_(role), rows_(role.lane, role.warp), columns_(role.lane) {}

    // Adds the products of a chunk. feature(a, block) makes features of a fragment a of columns of x as they were loaded: its
    // rows are features, its columns the 16 tokens of a block.
    template <typename Feature>
    __device__ __forceinline__ void add(uint32_t x, uint32_t y, const Feature& feature) {
#pragma unroll
        for (int block = 0; block < Walk::kBlocks; ++block) {
            uint32_t a[4];
            load_matrices_transposed(a, rows_.across_at(x + block * Walk::kBlockBytes, 0));
            feature(a, block);
            multiply<Number, kWidth>(sum_, a, y + block * Walk::kBlockBytes, 0, columns_);
        }
    }

    // sums: (D, Dv) float32
    __device__ __forceinline__ void store(float* sums) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* const to = sums + (16 * role_.warp + role_.quad + 8 * r) * kWidth + 2 * role_.pair;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
                *reinterpret_cast<float2*>(to + 8 * tile) = make_float2(sum_[tile][2 * r], sum_[tile][2 * r + 1]);
        }
    }
};

// The state of a piece's sequence among those of a batch and its key heads. pieces: with sequences as its third row, or null
// for one state a head.
__device__ __forceinline__ int64_t state_index(const Piece& piece, int head, int num_heads, const int32_t* pieces,
                                               int num_pieces, int num_states) {
    const int sequence = pieces == nullptr ? 0 : pieces[2 * num_pieces + piece.index];
    return (static_cast<int64_t>(piece.batch) * num_heads + head) * num_states + sequence;
}

// A state (D, D), float32, rounded, as a tile in shared memory. All threads of the block, and a barrier after it.
template <typename Walk>
__device__ __forceinline__ void copy_state(char* tile, const float* state) {
    using Tile = Tile<Walk::kWidth>;
#pragma unroll
    for (int i = threadIdx.x; i < Walk::kWidth * Tile::kChunks; i += Walk::kThreads) {
        const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
        const float4* const from = reinterpret_cast<const float4*>(state + row * Walk::kWidth + 8 * chunk);
        const float4 x = from[0], y = from[1];
        *reinterpret_cast<uint4*>(tile + Tile::offset(row, chunk)) = {pack<Number>(x.x, x.y), pack<Number>(x.z, x.w),
                                                                      pack<Number>(y.x, y.y), pack<Number>(y.z, y.w)};
    }
}

// Starts copying a chunk of a tensor, from row `first` on, by all threads.
template <typename Walk>
__device__ __forceinline__ void copy_chunk(uint32_t to, const Number* x, int64_t stride, int first, int end) {
    copy_rows<Walk::kWidth, Walk::kChunk, Walk::kThreads>(to, x, stride, first, end, threadIdx.x);
}

}  // namespace nearfar
