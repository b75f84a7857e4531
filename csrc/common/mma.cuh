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

namespace nearfar {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// c += a b
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16-bit numbers only");
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Four 8 x 8 tiles of 16-bit numbers from shared memory. Lane l names the 16 bytes of row l % 8 of tile l / 8; the lane
// receives row quad, columns 2 pair and 2 pair + 1, of tile i in word i.
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
}

// The same with each tile transposed: rows 2 pair and 2 pair + 1, column quad.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&word)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(address)
                 : "memory");
}

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

// 2^x by one special-function instruction; results below 2^-126 flush to zero.
__device__ __forceinline__ float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1 / x of a normal number, correctly rounded but for one case in millions; the operator `/` branches to serve all others.
__device__ __forceinline__ float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return fmaf(fmaf(-x, result, 1.0f), result, result);
}

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
