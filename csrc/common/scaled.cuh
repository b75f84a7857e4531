// Left operands of products whose numbers are scaled on their way: what is multiplied with 64 rows of a right operand is
// fragments times numbers of their rows or of their columns.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace nearfar {

// The products of two numbers in a word each.
__device__ __forceinline__ uint32_t multiply_words(uint32_t x, uint32_t y) {
    const __nv_bfloat162 product =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(x), reinterpret_cast<const __nv_bfloat162&>(y));
    return reinterpret_cast<const uint32_t&>(product);
}

// Word i of fragment `step` times factor(step, i).
template <int Steps, typename Factor>
__device__ __forceinline__ void scale_fragments(uint32_t (&to)[Steps][4], const uint32_t (&from)[Steps][4],
                                                const Factor& factor) {
#pragma unroll
    for (int i = 0; i < 4 * Steps; ++i) to[i / 4][i % 4] = multiply_words(from[i / 4][i % 4], factor(i / 4, i % 4));
}

}  // namespace nearfar
