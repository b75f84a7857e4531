// Reductions in an order that only the template arguments decide, so that equal inputs give equal bits.
#pragma once

namespace nearfar {

// The sum of `value` over each aligned group of `Lanes` neighbouring lanes, in every one of them. All 32 lanes call it.
template <int Lanes>
__device__ __forceinline__ float group_sum(float value) {
    static_assert(Lanes >= 1 && Lanes <= 32 && (Lanes & (Lanes - 1)) == 0, "a group is a power of two within a warp");
#pragma unroll
    for (int offset = Lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

}  // namespace nearfar
