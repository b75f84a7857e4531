#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>

#include "common/arguments.h"

namespace nearfar {

// Bidirectional linear attention with one factor, on the current device, between whose two kernels Triton's `combine` adds
// up pieces: o_i = sum_j A_ij v_j, and where there is `inverse` times inverse_i = 1 / (sum_j A_ij + eps), or 0 for 1 / 0, with
// A_ij = phi(q_i) . phi(k_j).
//
// q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, D), o (B, Hq, N, D): bfloat16, strides in numbers for the first three
// dimensions, 1 for the last; every row starts at a multiple of 16 bytes. D is 64 or 128. inverse: (B, Hq, N) float32,
// contiguous, or null.
//
// A block takes a piece of a head: `piece_length` tokens, the last piece fewer, or where there is `pieces`, (3 or more,
// num_pieces) int32, from its first to its second row, and the sequence in its third; empty ones are skipped. num_tokens, and
// num_pieces: of the keys or of the queries, whichever the kernel goes through.

// partials (B, Hkv, num_pieces, D, D) and partial_norms (B, Hkv, num_pieces, D), float32 and contiguous: sums of
// phi(k_j) v_j^T and of phi(k_j) over each piece.
struct LinearBidirectionalSums {
    const void *k, *v;
    float *partials, *partial_norms;
    const int32_t* pieces;
    std::array<int64_t, 3> k_strides, v_strides;
    int64_t batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states;

    NEARFAR_MEMBERS(k, v, partials, partial_norms, pieces, k_strides, v_strides, batches, heads, kv_heads, num_tokens, width,
                    num_pieces, piece_length, num_states)
};

// o and inverse. states (B, Hkv, num_states, D, D) and norms (B, Hkv, num_states, D), float32 and contiguous: the sums over
// each sequence.
struct LinearBidirectionalRead {
    const void* q;
    const float *states, *norms;
    void* o;
    float* inverse;
    const int32_t* pieces;
    std::array<int64_t, 3> q_strides, o_strides;
    int64_t batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states;
    double eps;

    NEARFAR_MEMBERS(q, states, norms, o, inverse, pieces, q_strides, o_strides, batches, heads, kv_heads, num_tokens, width,
                    num_pieces, piece_length, num_states, eps)
};

// Shared memory that a block takes for a head width: the larger of the two.
int64_t linear_bidirectional_forward_shared_bytes(int64_t width);

void linear_bidirectional_sums(const LinearBidirectionalSums& call, const std::string& feature_map, cudaStream_t stream);
void linear_bidirectional_read(const LinearBidirectionalRead& call, const std::string& feature_map, cudaStream_t stream);

}  // namespace nearfar
