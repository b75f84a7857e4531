#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

namespace nearfar {

// Bidirectional Hadamard linear attention with two factors through a state (triton_kernels/factored.py), on the current device,
// a GPU of compute capability 9.0. Numbers are bfloat16 where nothing else is said. Factors are 64 wide: P = 64 x 64 features,
// whose flat index has that of the first, the outer factor, ahead of that of the second, the inner one. Values and results are
// 64 or 128 wide. Factors, values and results have strides in numbers for the first three dimensions, 1 for the last, and rows
// that start at multiples of 16 bytes; all else is contiguous.

inline constexpr int kBidirectionalWidth = 64;
inline constexpr int kBidirectionalChunk = 64;  // tokens

// The features of tokens, as tiles that hadamard_bidirectional_accumulate copies: (B, H, ceil(N / kBidirectionalChunk), 64,
// 64), rows permuted as in common/tile.cuh. Tokens beyond the last are zeros.
//
// outer, inner (B, H, N, 64), to be mapped. factors, weights (B, H, N) float32, each null for ones. outer_tiles: features of
// the outer factor times `factors`, a row for each feature; weighted_tiles: those features times `weights`, not written where
// both are null, as they would be the same; inner_tiles: a row for each token.
struct HadamardBidirectionalFeatures {
    const void *outer, *inner;
    const float *factors, *weights;
    void *outer_tiles, *weighted_tiles, *inner_tiles;
    std::array<int64_t, 3> outer_strides, inner_strides;
    int64_t batches, heads, num_tokens;
};

// partials (B, Hs, pieces, P, Dv) and partial_norms (B, Hs, pieces, P), float32: sums over the tokens of a piece and the heads
// of a group, of f y^T with the outer features from outer_tiles, and of f with those from weighted_tiles.
//
// The tiles are those of hadamard_bidirectional_features, y (B, H, N, Dv), H a multiple of Hs. piece_length: a multiple of
// kBidirectionalChunk. counter: one int32, a workspace.
struct HadamardBidirectionalAccumulate {
    const void *outer_tiles, *weighted_tiles, *inner_tiles, *y;
    float *partials, *partial_norms;
    int32_t* counter;
    std::array<int64_t, 3> y_strides;
    int64_t batches, heads, state_heads, num_tokens, width, num_pieces, piece_length;
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
};

void hadamard_bidirectional_features(const HadamardBidirectionalFeatures& call, const std::string& feature_map,
                                     cudaStream_t stream);
void hadamard_bidirectional_accumulate(const HadamardBidirectionalAccumulate& call, cudaStream_t stream);
void hadamard_bidirectional_read(const HadamardBidirectionalRead& call, const std::string& feature_map, cudaStream_t stream);

}  // namespace nearfar
