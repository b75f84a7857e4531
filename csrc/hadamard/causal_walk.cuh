// What the walks of causal Hadamard attention share: two factors of 16 features each, values of 64 numbers.
//
// A block walks as in common/walk.cuh. Both factors of a token lie in one row of a tile, so that its two steps are the
// fragments x^1 and x^2. The features f[a, b] = x^1[a] x^2[b] of 16 tokens and one a are the fragment x^2 times a number a
// token: they are made where a product needs them, and never stored.
#pragma once

#include <cstdint>

#include "common/halves.cuh"
#include "common/scaled.cuh"
#include "common/walk.cuh"

namespace nearfar {

constexpr int kFactor = 16;    // features of a factor
constexpr int kValueWidth = 64;

template <int kStages_>
struct HadamardWalk {
    static constexpr int kChunk = 128;  // tokens
    static constexpr int kWarps = 8, kThreads = 32 * kWarps, kBlocks = kChunk / 16;
    static constexpr int kStages = kStages_;  // of the pipeline
    static constexpr int kParts = 1, kSteps = kWarps, kOwnRows = 16;  // for Role: a warp fetches the rows of its block
    static constexpr int kFactorsBlock = 16 * Tile<2 * kFactor>::kRowBytes, kValuesBlock = 16 * Tile<kValueWidth>::kRowBytes;
    static constexpr int kFactorsBytes = kBlocks * kFactorsBlock, kValuesBytes = kBlocks * kValuesBlock;
    // A state as an operand: rows (a, b), and after them the norms: row a has those of all b as the sum of two numbers.
    static constexpr int kStateNorms = kFactor * kValuesBlock;
    static constexpr int kStateBytes = kStateNorms + kFactorsBlock;
};

// Own rows for change_own_rows.
template <int Width>
struct OwnTile {
    static constexpr int kWidth = Width, kRowsAtOnce = 32 / Tile<Width>::kChunks, kPasses = 16 / kRowsAtOnce;
};

// Two tensors (B, H, N, 16), side by side in the rows of a tile. A lane always copies columns of the same one.
struct Factors {
    Tensor<const Number> first, second;

    __device__ __forceinline__ void copy_own_rows(uint32_t to, int batch, int head, int row, int num_rows, int lane) const {
        const bool right = lane % 4 >= 2;
        const Number* const x = right ? second.at(batch, head) - kFactor : first.at(batch, head);
        copy_rows<2 * kFactor, 16, 32>(to, x, right ? second.row : first.row, row, num_rows, lane);
    }
};

// Lanes' parts of tiles of both kinds.
struct TileOffsets {
    LaneOffsets<2 * kFactor> factors;
    LaneOffsets<kValueWidth> values;

    __device__ explicit TileOffsets(int lane) : factors(lane), values(lane) {}
};

// Both fragments of 16 rows, mapped.
template <typename Map>
__device__ __forceinline__ void load_features(uint32_t (&x)[2][4], uint32_t rows, const LaneOffsets<2 * kFactor>& lane) {
    load_rows<2 * kFactor>(x, rows, lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i / 4][i % 4] = map_word<Map>(x[i / 4][i % 4]);
}

// sum += f S of 16 rows.
__device__ __forceinline__ void read_state(float (&sum)[kValueWidth / 8][4], const uint32_t (&x)[2][4], uint32_t state,
                                           const LaneOffsets<kValueWidth>& values, int lane) {
    const int first_lane = lane & ~3;  // of the quad
#pragma unroll
    for (int a = 0; a < kFactor; a += 2) {
        uint32_t scale[2];  // x^1[a] and x^1[a + 1] of rows quad and quad + 8
#pragma unroll
        for (int r = 0; r < 2; ++r) scale[r] = __shfl_sync(kWholeWarp, x[0][a / 8 * 2 + r], first_lane + a % 8 / 2);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            uint32_t f[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                f[i] = multiply_words(x[1][i], odd ? upper_twice(scale[i % 2]) : lower_twice(scale[i % 2]));
            multiply<Number, kValueWidth>(sum, f, state + (a + odd) * HadamardWalk<2>::kValuesBlock, 0, values);
        }
    }
}

// Of lane p in a quad, the sum over its lanes of x[p].
__device__ __forceinline__ float quad_sum_of_mine(const float (&x)[4], int pair) {
    const bool odd = pair % 2, right = pair / 2;
    const float first = (odd ? x[1] : x[0]) + __shfl_xor_sync(kWholeWarp, odd ? x[0] : x[1], 1);
    const float second = (odd ? x[3] : x[2]) + __shfl_xor_sync(kWholeWarp, odd ? x[2] : x[3], 1);
    return (right ? second : first) + __shfl_xor_sync(kWholeWarp, right ? first : second, 2);
}

// Adds what 16 rows of values take from a state: with s[a, b] = value . S[a, b],
// first[a] += sum_b x^2[b] s[a, b] and second[b] += sum_a x^1[a] s[a, b].
__device__ __forceinline__ void spread_state(float (&first)[2][4], float (&second)[2][4], const uint32_t (&x)[2][4],
                                             const uint32_t (&value)[kValueWidth / 16][4], uint32_t state,
                                             const LaneOffsets<kValueWidth>& values, int lane) {
    const int pair = lane % 4;
    float inner[2][4];  // x^2 as a result
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpack<Number>(x[1][i]);
        inner[i / 2][i % 2 * 2] = two.x, inner[i / 2][i % 2 * 2 + 1] = two.y;
    }
#pragma unroll
    for (int column = 0; column < 4; ++column) {  // of a lane's four in `first`: a is 8 (column / 2) + 2 pair + column % 2
        float part[2][4];
#pragma unroll
        for (int other = 0; other < 4; ++other) {
            const int a = column / 2 * 8 + 2 * other + column % 2;
            float s[2][4] = {};
            multiply_transposed<Number, kValueWidth>(s, value, state + a * HadamardWalk<2>::kValuesBlock, 0, values);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float2 two = unpack<Number>(__shfl_sync(kWholeWarp, x[0][column / 2 * 2 + r], lane - pair + other));
                const float outer = column % 2 ? two.y : two.x;
                part[r][other] = 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float at = s[i / 2][2 * r + i % 2];
                    part[r][other] = fmaf(inner[i / 2][2 * r + i % 2], at, part[r][other]);
                    second[i / 2][2 * r + i % 2] = fmaf(outer, at, second[i / 2][2 * r + i % 2]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) first[column / 2][2 * r + column % 2] += quad_sum_of_mine(part[r], pair);
    }
}

// What rows take from the norms z of a state likewise: first[a] += sum_b x^2[b] z[a, b].
__device__ __forceinline__ void add_first_norms(float (&first)[2][4], const uint32_t (&x)[2][4], uint32_t norms,
                                                const LaneOffsets<2 * kFactor>& factors) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        uint32_t b[4];
        load_matrices(b, factors.across_at(norms, part));
        mma<Number>(first[0], x[1], b[0], b[1]);
        mma<Number>(first[1], x[1], b[2], b[3]);
    }
}

// second[b] += sum_a x^1[a] z[a, b]
__device__ __forceinline__ void add_second_norms(float (&second)[2][4], const uint32_t (&x)[2][4], uint32_t norms,
                                                 const LaneOffsets<2 * kFactor>& factors) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        uint32_t b[4];
        load_matrices_transposed(b, factors.normal_at(norms, part));
        mma<Number>(second[0], x[0], b[0], b[1]);
        mma<Number>(second[1], x[0], b[2], b[3]);
    }
}

// The similarities x^r . y^r with 16 rows of the other side, factor by factor.
__device__ __forceinline__ void similarities(float (&c)[2][2][4], const uint32_t (&x)[2][4], uint32_t others,
                                             const LaneOffsets<2 * kFactor>& factors) {
#pragma unroll
    for (int factor = 0; factor < 2; ++factor) {
        uint32_t b[4];
        load_matrices(b, factors.across_at(others, factor));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            for (float& at : c[factor][half]) at = 0;
            mma<Number>(c[factor][half], x[factor], b[2 * half], b[2 * half + 1]);
        }
    }
}

__device__ __forceinline__ void multiply_elements(float (&c)[2][4], const float (&x)[2][4], const float (&y)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) c[i / 4][i % 4] = x[i / 4][i % 4] * y[i / 4][i % 4];
}

// sum += weights y, for one factor of 16 rows of the other side.
__device__ __forceinline__ void add_factor(float (&sum)[2][4], const float (&weights)[2][4], uint32_t others, int factor,
                                           const LaneOffsets<2 * kFactor>& factors) {
    uint32_t a[4], b[4];
    round_to_fragment<Number>(a, weights);
    load_matrices_transposed(b, factors.normal_at(others, factor));
    mma<Number>(sum[0], a, b[0], b[1]);
    mma<Number>(sum[1], a, b[2], b[3]);
}

// The part of a state that one warp keeps, as the class of that name in common/walk.cuh: the rows of two a, 2 warp + i.
class HadamardState {
    static constexpr int kTiles = kValueWidth / 8;
    using Walk = HadamardWalk<2>;
    const int warp_, lane_, quad_, pair_;
    float sum_[2][kTiles][4] = {};
    float norm_[2][2] = {};  // of b = quad and quad + 8, where pair == 0

   public:
    template <typename Walk>
    __device__ explicit HadamardState(const Role<Walk>& role)
        : warp_(role.warp), lane_(role.lane), quad_(role.quad), pair_(role.pair) {}

    // states (.., 256, 64) and norms (.., 256), float32.
    __device__ void load(const float* states, const float* norms, int64_t index) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int64_t row = (index * kFactor + 2 * warp_ + i) * kFactor + quad_ + 8 * r;
                const float* const from = states + row * kValueWidth + 2 * pair_;
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    const float2 x = *reinterpret_cast<const float2*>(from + 8 * tile);
                    sum_[i][tile][2 * r] = x.x, sum_[i][tile][2 * r + 1] = x.y;
                }
                norm_[i][r] = norms[row];
            }
    }

    // Adds sum_j f_j y_j^T over a chunk, and to the norms sum_j f_j w_j; weights as in common/walk.cuh.
    template <typename Weights>
    __device__ __forceinline__ void add(uint32_t x, uint32_t y, const TileOffsets& offsets, const Weights& weights) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int a = 2 * warp_ + i, source = a % 8 * 4 + pair_;
            float sum[kTiles][4] = {}, norm[4] = {};
#pragma unroll 2
            for (int block = 0; block < Walk::kBlocks; ++block) {
                uint32_t outer[4], inner[4], f[4];
                load_matrices_transposed(outer, offsets.factors.across_at(x + block * Walk::kFactorsBlock, 0));
                load_matrices_transposed(inner, offsets.factors.across_at(x + block * Walk::kFactorsBlock, 1));
#pragma unroll
                for (int half = 0; half < 2; ++half) {  // of the tokens
                    const uint32_t scale = __shfl_sync(kWholeWarp, a < 8 ? outer[2 * half] : outer[2 * half + 1], source);
#pragma unroll
                    for (int r = 0; r < 2; ++r) f[2 * half + r] = multiply_words(inner[2 * half + r], scale);
                }
                multiply<Number, kValueWidth>(sum, f, y + block * Walk::kValuesBlock, 0, offsets.values);
                const uint2 b = weights(block);
                mma<Number>(norm, f, b.x, b.y);
            }
#pragma unroll
            for (int at = 0; at < 4 * kTiles; ++at) sum_[i][at / 4][at % 4] += sum[at / 4][at % 4];
            norm_[i][0] += norm[0] + norm[1];
            norm_[i][1] += norm[2] + norm[3];
        }
    }

    // The state as an operand.
    __device__ __forceinline__ void store(char* to) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int a = 2 * warp_ + i;
#pragma unroll
            for (int at = 0; at < 2 * kTiles; ++at)
                *reinterpret_cast<uint32_t*>(to + Tile<kValueWidth>::offset(kFactor * a + quad_ + at % 2 * 8, at / 2) +
                                             4 * pair_) =
                    pack<Number>(sum_[i][at / 2][at % 2 * 2], sum_[i][at / 2][at % 2 * 2 + 1]);
            if (pair_ > 0) continue;
            for (int r = 0; r < 2; ++r) {
                const auto norm_at = [&](int part) {
                    const uint32_t chunk = Tile<2 * kFactor>::offset(a, 2 * part + r);
                    return reinterpret_cast<Number*>(to + Walk::kStateNorms + chunk) + quad_;
                };
                const Number high = __float2bfloat16(norm_[i][r]);
                *norm_at(0) = high;
                *norm_at(1) = __float2bfloat16(norm_[i][r] - __bfloat162float(high));
            }
        }
    }
};

}  // namespace nearfar
