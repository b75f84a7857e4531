#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"

namespace nearfar {

// Selective synchronization attention for keys that are the queries, on the current device, a GPU of compute capability 9.0:
// the kernels `attend` and `grad_tokens` of triton_kernels/synchronization.py, which has the formulas.
//
// omega, v, grad_o and tensors of their shape (B, H, N, 64): float16 or bfloat16, with strides in numbers for the first three
// dimensions and 1 for the last; rows start at multiples of 16 bytes. All other tensors are contiguous and float32, except the
// lists. The kernels of locking.py compute squares and c (B, H, N) and, for each tile of rows, the cells of 64 tokens that it
// visits: lists (B, H, tiles, cells) and their lengths, counts (B, H, tiles), int32; tiles have kSynchronizationRows or
// kSynchronizationGradRows rows. From bit kSynchronizationMembers on, a list entry has one bit per cell of the tile: whether
// that cell needs the listed one. bandwidth: of each head, or of all with a stride of 0. counter: a workspace of one number.

inline constexpr int kSynchronizationWidth = 64;
inline constexpr int kSynchronizationRows = 192, kSynchronizationGradRows = 128;
inline constexpr int kSynchronizationMembers = 24;

// Fills o and total (B, H, N). causal: a token sees those up to itself.
struct SynchronizationForward {
    const void *omega, *v;
    const float *squares, *c, *bandwidth;
    void* o;
    float* total;
    const int32_t *lists, *counts;
    int32_t* counter;
    std::array<int64_t, 3> omega_strides, v_strides, o_strides;
    int64_t batches, heads, num_tokens, bandwidth_stride, causal;

    NEARFAR_MEMBERS(omega, v, squares, c, bandwidth, o, total, lists, counts, counter, omega_strides, v_strides, o_strides,
                    batches, heads, num_tokens, bandwidth_stride, causal)
};

// Fills dw, dv, dalpha and dradius (B, H, N). inverse and shift (B, H, N) are those of row_terms; c is one for each head.
struct SynchronizationBackward {
    const void *omega, *v;
    const float *squares, *c, *bandwidth;
    const void* grad_o;
    const float *inverse, *shift;
    void *dw, *dv;
    float *dalpha, *dradius;
    const int32_t *lists, *counts;
    int32_t* counter;
    std::array<int64_t, 3> omega_strides, v_strides, grad_o_strides, dw_strides, dv_strides;
    int64_t batches, heads, num_tokens, bandwidth_stride;
    double grad_floor;

    NEARFAR_MEMBERS(omega, v, squares, c, bandwidth, grad_o, inverse, shift, dw, dv, dalpha, dradius, lists, counts, counter,
                    omega_strides, v_strides, grad_o_strides, dw_strides, dv_strides, batches, heads, num_tokens,
                    bandwidth_stride, grad_floor)
};

void synchronization_forward(const SynchronizationForward& call, DType dtype, cudaStream_t stream);
void synchronization_backward(const SynchronizationBackward& call, DType dtype, cudaStream_t stream);

}  // namespace nearfar
