#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"

namespace nearfar {

// Tokens of a tile of the kernels.
constexpr int64_t kKrauseTile = 64;

// Gradients of krause_forward (krause/forward.h says what its tensors are), on the current device.
//
// o and lse are those of the forward, bits too, or null if it did not select. dO has the shape of o; dq, dk, dv are filled,
// each with strides of its own, and rows that start at multiples of 16 bytes. dsigma: float32, contiguous, of one number for
// each query head, or one in all if sigma_stride is 0. partials: workspace of B Hq ceil(max(N, M) / kKrauseTile) float32.
struct KrauseBackward {
    const void *q, *k, *v, *o, *grad_o;
    const float *sigma, *lse;
    const int32_t *bits, *token_bounds;
    void *dq, *dk, *dv;
    float *dsigma, *partials;
    std::array<int64_t, 3> q_strides, k_strides, v_strides, o_strides, grad_o_strides, dq_strides, dk_strides, dv_strides;
    int64_t sigma_stride, batches, heads, kv_heads, num_queries, num_keys, width, back, ahead;

    NEARFAR_MEMBERS(q, k, v, o, grad_o, sigma, lse, bits, token_bounds, dq, dk, dv, dsigma, partials, q_strides, k_strides,
                    v_strides, o_strides, grad_o_strides, dq_strides, dk_strides, dv_strides, sigma_stride, batches, heads,
                    kv_heads, num_queries, num_keys, width, back, ahead)
};

void krause_backward(const KrauseBackward& call, DType dtype, cudaStream_t stream);

// Bytes of shared memory that a block takes.
int64_t krause_backward_shared_bytes(int64_t width);

}  // namespace nearfar
