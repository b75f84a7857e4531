// Instructions that CUDA C++ has no name for, from sm_80 on. No other file has inline PTX: tests/emulation replaces this one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace nearfar {

// ---- copies from global to shared memory that run on while the thread computes

// The address that ldmatrix and cp.async take for something in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes, past the first-level cache. Without `wanted` it writes zeros and reads nothing.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(wanted ? 16 : 0)
                 : "memory");
}

// Waits for all copies that this thread started. Those of other threads are visible after a barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Makes a group of the copies that this thread has started since the last group; it may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the copies of all groups of this thread but the last `Pending`.
template <int Pending>
__device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory"); }

// ---- fragments of tiles, as mma.cuh describes them

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

// ---- numbers

// 2^x by one special-function instruction; results below 2^-126 flush to zero.
__device__ __forceinline__ float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1 / x likewise, to about one unit in the last place.
__device__ __forceinline__ float reciprocal_approximate(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// max(x, 0), and NaN where x is.
__device__ __forceinline__ float positive_or_nan(float x) {
    float result;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));
    return result;
}

// The square root of x >= 0 and its inverse likewise; x below 2^-126 is taken for zero.
__device__ __forceinline__ float sqrt_approximate(float x) {
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float rsqrt_approximate(float x) {
    float result;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// a b + c, but 0 below 2^-126 and where it is not a number, and at most 1: the bounds are free.
__device__ __forceinline__ float fma_saturated(float a, float b, float c) {
    float result;
    asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
    return result;
}

// Sets `first` (`second`) to -infinity unless the lower (upper) half of `x` exceeds that of `cut` or is not a number.
__device__ __forceinline__ void keep_exceeding(float& first, float& second, uint32_t x, uint32_t cut) {
    asm("{\n\t"
        ".reg .pred p, q;\n\t"
        "setp.gtu.f16x2 p|q, %2, %3;\n\t"
        "selp.f32 %0, %0, 0fFF800000, p;\n\t"
        "selp.f32 %1, %1, 0fFF800000, q;\n\t"
        "}"
        : "+f"(first), "+f"(second)
        : "r"(x), "r"(cut));
}

// Where key < limit: least = min(least, x), and count += 1 if x <= most.
__device__ __forceinline__ void count_below(float& least, int& count, float key, float limit, float x, float most) {
    asm("{\n\t"
        ".reg .pred p, q;\n\t"
        "setp.lt.f32 p, %2, %3;\n\t"
        "@p min.f32 %0, %0, %4;\n\t"
        "setp.le.and.f32 q, %4, %5, p;\n\t"
        "@q add.s32 %1, %1, 1;\n\t"
        "}"
        : "+f"(least), "+r"(count)
        : "f"(key), "f"(limit), "f"(x), "f"(most));
}

}  // namespace nearfar
