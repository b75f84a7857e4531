// Whole rows as fragments of mma.cuh: from shared memory, to global memory, and their products row by row.
#pragma once

#include <cstdint>

#include "mma.cuh"
#include "tile.cuh"

namespace nearfar {

// Where a lane's part of 16 rows of a tile begins: bytes from the start of the rows, which lies at a multiple of 128. The
// permutation of chunks is an exclusive or, so the parts of the following columns differ in a few bits of the address.
template <int Width>
struct LaneOffsets {
    uint32_t normal, across;

    // first: the step that stands for step 0, of a warp that has some of the columns.
    __device__ explicit LaneOffsets(int lane, int first = 0)
        : normal(Tile<Width>::offset(LaneNormal::row(lane), LaneNormal::chunk(lane)) ^ static_cast<uint32_t>(32 * first)),
          across(Tile<Width>::offset(LaneAcross::row(lane), LaneAcross::chunk(lane)) ^ static_cast<uint32_t>(32 * first)) {}

    // The part in columns 16 step on, of the rows that start at `rows`.
    __device__ uint32_t normal_at(uint32_t rows, int step) const { return (rows + normal) ^ static_cast<uint32_t>(32 * step); }
    __device__ uint32_t across_at(uint32_t rows, int step) const { return (rows + across) ^ static_cast<uint32_t>(32 * step); }
};

// 16 rows of a tile as the a fragments of their columns, 16 at a time.
template <int Width>
__device__ __forceinline__ void load_rows(uint32_t (&row)[Width / 16][4], uint32_t rows, const LaneOffsets<Width>& lane) {
#pragma unroll
    for (int step = 0; step < Width / 16; ++step) load_matrices(row[step], lane.normal_at(rows, step));
}

// c += a x^T, where x are 16 rows of a tile, `further` bytes behind `rows`: tiles at fixed distances share addresses.
template <typename T, int Width>
__device__ __forceinline__ void multiply_transposed(float (&c)[2][4], const uint32_t (&a)[Width / 16][4], uint32_t rows,
                                                    uint32_t further, const LaneOffsets<Width>& lane) {
#pragma unroll
    for (int step = 0; step < Width / 16; ++step) {
        uint32_t b[4];
        load_matrices(b, lane.across_at(rows, step) + further);
        mma<T>(c[0], a[step], b[0], b[1]);
        mma<T>(c[1], a[step], b[2], b[3]);
    }
}

// The same for 16 of the inner columns, those of `step`, and as many rows of x as c has columns.
template <typename T, int Width, int Tiles>
__device__ __forceinline__ void multiply_transposed_step(float (&c)[Tiles][4], const uint32_t (&a)[4], uint32_t rows, int step,
                                                         const LaneOffsets<Width>& lane) {
#pragma unroll
    for (int block = 0; block < Tiles / 2; ++block) {
        uint32_t b[4];
        load_matrices(b, lane.across_at(rows, step) + block * 16 * Tile<Width>::kRowBytes);
        mma<T>(c[2 * block], a, b[0], b[1]);
        mma<T>(c[2 * block + 1], a, b[2], b[3]);
    }
}

// c += a x, likewise, for as many columns of x as c has.
template <typename T, int Width, int Tiles>
__device__ __forceinline__ void multiply(float (&c)[Tiles][4], const uint32_t (&a)[4], uint32_t rows, uint32_t further,
                                         const LaneOffsets<Width>& lane) {
#pragma unroll
    for (int step = 0; step < Tiles / 2; ++step) {
        uint32_t b[4];
        load_matrices_transposed(b, lane.normal_at(rows, step) + further);
        mma<T>(c[2 * step], a, b[0], b[1]);
        mma<T>(c[2 * step + 1], a, b[2], b[3]);
    }
}

// 16 x 16 results, rounded to T, as a fragment a.
template <typename T>
__device__ __forceinline__ void round_to_fragment(uint32_t (&a)[4], const float (&c)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack<T>(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

// A warp's 16 rows of the products of a warp group, rounded to T, as the a fragments of their columns.
template <typename T, int Count>
__device__ __forceinline__ void round_products(uint32_t (&a)[Count / 8][4], const float (&c)[Count]) {
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) a[i / 4][i % 4] = pack<T>(c[2 * i], c[2 * i + 1]);
}

// x_i.y_i of rows quad and quad + 8, in every lane of the quad: the diagonal of the product of x with y transposed.
template <typename T, int Steps>
__device__ __forceinline__ float2 row_products(const uint32_t (&x)[Steps][4], const uint32_t (&y)[Steps][4], int lane) {
    float first[4] = {}, last[4] = {};  // rows 0-7 of y, in the upper half; its rows 8-15, in the lower half
#pragma unroll
    for (int step = 0; step < Steps; ++step) {
        mma<T>(first, x[step], y[step][0], y[step][2]);
        mma<T>(last, x[step], y[step][1], y[step][3]);
    }
    const bool odd = lane / 4 % 2;
    return {__shfl_sync(kWholeWarp, odd ? first[1] : first[0], lane / 8, 4),
            __shfl_sync(kWholeWarp, odd ? last[3] : last[2], lane / 8, 4)};
}

// Results by tiles of 8 columns, as store_rows takes them.
template <int Count>
__device__ __forceinline__ const float (&tiles_of(const float (&c)[Count]))[Count / 4][4] {
    return reinterpret_cast<const float(&)[Count / 4][4]>(c);
}

template <int Count>
__device__ __forceinline__ float (&tiles_of(float (&c)[Count]))[Count / 4][4] {
    return reinterpret_cast<float(&)[Count / 4][4]>(c);
}

// Rounds the first rows_left of 16 rows, times `factor`, to T. Neighbouring lanes swap words, so that each stores 8 bytes.
template <typename T, int Width>
__device__ __forceinline__ void store_rows(const float (&c)[Width / 8][4], float factor, int lane, int rows_left,
                                           int64_t stride, T* to) {
    const int quad = lane / 4, pair = lane % 4, odd = lane % 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = quad + 8 * r;
        T* const at = to + row * stride + 8 * odd + 2 * (pair - odd);
#pragma unroll
        for (int tile = 0; tile < Width / 8; tile += 2) {
            const uint32_t left = pack<T>(c[tile][2 * r] * factor, c[tile][2 * r + 1] * factor);
            const uint32_t right = pack<T>(c[tile + 1][2 * r] * factor, c[tile + 1][2 * r + 1] * factor);
            const uint32_t received = __shfl_xor_sync(kWholeWarp, odd ? left : right, 1);
            if (row < rows_left)
                *reinterpret_cast<uint2*>(at + 8 * tile) = odd ? make_uint2(received, right) : make_uint2(left, received);
        }
    }
}

}  // namespace nearfar
