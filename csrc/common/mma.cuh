// Products of 16 x 16 by 16 x 8 tiles on the tensor cores of one warp, from sm_80 on, and what feeds them.
//
// A lane stands at quad = lane / 4, pair = lane % 4. A fragment is what one lane holds of a tile, two neighbouring numbers
// of 16 bits a word:
//
//     a[4]    16 x 16     rows quad, quad + 8, quad, quad + 8; columns 2 pair (+ 1), words 2 and 3 in the right half
//     b0, b1  16 x 8      rows 2 pair (+ 1), and 8 more in b1; column quad
//     c[4]    16 x 8      c[0], c[1] in row quad, c[2], c[3] in row quad + 8; columns 2 pair, 2 pair + 1
//
// So two c of neighbouring columns, packed, are an a: results feed the next product without leaving the registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace nearfar {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// Two numbers rounded to T in one word, `first` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(first, second);
        return reinterpret_cast<const uint32_t&>(pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
        return reinterpret_cast<const uint32_t&>(pair);
    }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
    if constexpr (std::is_same_v<T, __half>) return __half22float2(reinterpret_cast<const __half2&>(word));
    else return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}

// 1 / x of a normal number, correctly rounded except for one case in millions. The operator `/` has branches for other numbers.
__device__ __forceinline__ float reciprocal(float x) {
    const float result = reciprocal_approximate(x);
    return fmaf(fmaf(-x, result, 1.0f), result, result);
}

// 1 / x, and 0 for 1 / 0: of a row whose weights sum to 0.
__device__ __forceinline__ float inverse_of(float x) { return x == 0.0f ? 0.0f : 1.0f / x; }

// The sum (maximum, minimum) over the four lanes that share a row of c.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kWholeWarp, x, 1);
    return x + __shfl_xor_sync(kWholeWarp, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 1));
    return fmaxf(x, __shfl_xor_sync(kWholeWarp, x, 2));
}

__device__ __forceinline__ float quad_min(float x) { return -quad_max(-x); }

}  // namespace nearfar
