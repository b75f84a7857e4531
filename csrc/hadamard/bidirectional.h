#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/arguments.h"

namespace nearfar {

// Bidirectional Hadamard linear attention with two factors through a state (triton_kernels/linear_tiles.py), on the current device,
// a GPU of compute capability 9.0. Numbers are bfloat16 where nothing else is said. Factors are 64 wide: P = 64 x 64 features,
// whose flat index has that of the first, the outer factor, ahead of that of the second, the inner one. Values and results are
// 64 or 128 wide. Factors, values and results have strides in numbers for the first three dimensions, 1 for the last, and rows
// that start at multiples of 16 bytes; all else is contiguous.

inline constexpr int kBidirectionalWidth = 64;
inline constexpr int kBidirectionalChunk = 64;  // tokens

// partials (B, Hs, pieces, P, Dv) and partial_norms (B, Hs, pieces, P), float32: sums over the tokens of a piece and the heads
// of a group, of f y^T and of f. Two kernels: the first writes the features of tokens as tiles, which the second copies.
//
// outer, inner (B, H, N, 64), to be mapped; y (B, H, N, Dv), H a multiple of Hs. factors, weights (B, H, N) float32, each null
// for ones: the outer features are times `factors` in the sums of f y^T, times `weights` in those of f. piece_length: a
// multiple of kBidirectionalChunk.
//
// Workspaces: counter, one int32, and tiles (B, H, ceil(N / kBidirectionalChunk), 64, 64), rows permuted as in common/tile.cuh,
// zeros for tokens beyond the last. outer_tiles: outer features times `factors`, a row for each feature; weighted_tiles:
// those features times `weights`, null where both are null, as they would be the same; inner_tiles: a row for each token.
struct HadamardBidirectionalAccumulate {
    const void *outer, *inner, *y;
    const float *factors, *weights;
    float *partials, *partial_norms;
    void *outer_tiles, *inner_tiles, *weighted_tiles;
    int32_t* counter;
    std::array<int64_t, 3> outer_strides, inner_strides, y_strides;
    int64_t batches, heads, state_heads, num_tokens, width, num_pieces, piece_length;

    NEARFAR_MEMBERS(outer, inner, y, factors, weights, partials, partial_norms, outer_tiles, inner_tiles, weighted_tiles,
                    counter, outer_strides, inner_strides, y_strides, batches, heads, state_heads, num_tokens, width,
                    num_pieces, piece_length)
};

// out = f(x) S, divided by f(x) z + eps, whose inverse (B, H, N) float32 is kept, if that is given.
//
// outer, inner (B, H, N, 64), to be mapped; states (B, Hs, P, Dv), norms (B, Hs, P) float32; out (B, H, N, Dv), H a multiple of
// Hs. Workspaces: counter, one int32, and with `inverse` norm_tiles (B, Hs, 2, 64, 64).
struct HadamardBidirectionalRead {
    const void *outer, *inner, *states;
    const float* norms;
    void* out;
    float* inverse;
    int32_t* counter;
    void* norm_tiles;
    std::array<int64_t, 3> outer_strides, inner_strides, out_strides;
    int64_t batches, heads, state_heads, num_tokens, width;
    double eps;

    NEARFAR_MEMBERS(outer, inner, states, norms, out, inverse, counter, norm_tiles, outer_strides, inner_strides, out_strides,
                    batches, heads, state_heads, num_tokens, width, eps)
};

void hadamard_bidirectional_features(const HadamardBidirectionalAccumulate& call, const std::string& feature_map,
                                     cudaStream_t stream);
void hadamard_bidirectional_accumulate(const HadamardBidirectionalAccumulate& call, cudaStream_t stream);
void hadamard_bidirectional_read(const HadamardBidirectionalRead& call, const std::string& feature_map, cudaStream_t stream);

}  // namespace nearfar
