#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "common/arguments.h"
#include "common/dtype.h"

namespace nearfar {

// out[b, h, n] = sum over d of x[b, h, n, d]^2, accumulated in float32, on the current device.
//
// x (B, H, N, D): strides in numbers for the first three dimensions, 1 for the last. out (B, H, N): contiguous.
struct RowSumsq {
    const void* x;
    float* out;
    std::array<int64_t, 3> x_strides;
    int64_t batches, heads, num_rows, width;

    NEARFAR_MEMBERS(x, out, x_strides, batches, heads, num_rows, width)
};

void row_sumsq(const RowSumsq& call, DType dtype, cudaStream_t stream);

}  // namespace nearfar
