// The features of two factors as tiles for hadamard_bidirectional_accumulate, whose blocks each need them for many tiles of the
// state.
#include <cuda_bf16.h>

#include <cstdint>
#include <string>

#include "common/check.h"
#include "common/features.cuh"
#include "common/tensor.cuh"
#include "common/tile.cuh"
#include "hadamard/bidirectional.h"

namespace nearfar {
namespace {

using Number = __nv_bfloat16;
using FeatureTile = Tile<kBidirectionalWidth>;

constexpr int kThreads = 128, kRowsAtOnce = kThreads / FeatureTile::kChunks;
constexpr int kNumbers = kBidirectionalChunk * kBidirectionalWidth;  // of a tile

struct Arguments {
    Tensor<const Number> outer, inner;
    const float *factors, *weights;
    Number *outer_tiles, *weighted_tiles, *inner_tiles;
    int heads, num_tokens, chunks;
};

// Eight numbers of a tile that is stored row by row.
__device__ __forceinline__ uint4& tile_at(Number* tile, int row, int chunk) {
    return *reinterpret_cast<uint4*>(reinterpret_cast<char*>(tile) + FeatureTile::offset(row, chunk));
}

template <typename Map>
__device__ __forceinline__ void map_numbers(float (&x)[8], const uint4& from, bool inside) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<Number>(words[i]);
        x[2 * i] = inside ? Map::value(pair.x) : 0.0f, x[2 * i + 1] = inside ? Map::value(pair.y) : 0.0f;
    }
}

// Each thread has a chunk of some tokens. The outer factor is turned around in shared memory, whose rows of 65 numbers put what
// the lanes of a warp read into different banks.
template <typename Map>
__global__ void __launch_bounds__(kThreads) hadamard_bidirectional_features_kernel(
    const __grid_constant__ Arguments arguments) {
    __shared__ Number columns[2][kBidirectionalChunk][kBidirectionalWidth + 1];
    const int block = blockIdx.x, first = block % arguments.chunks * kBidirectionalChunk;
    const int index = block / arguments.chunks, batch = index / arguments.heads, head = index % arguments.heads;
    const int row = threadIdx.x / FeatureTile::kChunks, chunk = threadIdx.x % FeatureTile::kChunks;
    const bool weighted = arguments.factors != nullptr || arguments.weights != nullptr;
    const int64_t vector = static_cast<int64_t>(index) * arguments.num_tokens, tile = static_cast<int64_t>(block) * kNumbers;

    uint4 outer[kBidirectionalChunk / kRowsAtOnce], inner[kBidirectionalChunk / kRowsAtOnce];
#pragma unroll
    for (int pass = 0; pass < kBidirectionalChunk / kRowsAtOnce; ++pass) {
        const int token = min(first + row + pass * kRowsAtOnce, arguments.num_tokens - 1);
        const auto load = [&](const Tensor<const Number>& x) {
            return *reinterpret_cast<const uint4*>(x.at(batch, head) + token * x.row + 8 * chunk);
        };
        outer[pass] = load(arguments.outer);
        inner[pass] = load(arguments.inner);
    }
#pragma unroll
    for (int pass = 0; pass < kBidirectionalChunk / kRowsAtOnce; ++pass) {
        const int own = row + pass * kRowsAtOnce, token = first + own;
        const bool inside = token < arguments.num_tokens;
        float x[8];
        map_numbers<Map>(x, inner[pass], inside);
        tile_at(arguments.inner_tiles + tile, own, chunk) = {pack<Number>(x[0], x[1]), pack<Number>(x[2], x[3]),
                                                            pack<Number>(x[4], x[5]), pack<Number>(x[6], x[7])};
        map_numbers<Map>(x, outer[pass], inside);
        const auto put = [&](Number(&column)[kBidirectionalChunk][kBidirectionalWidth + 1], const float* factors) {
            const float factor = factors == nullptr || !inside ? 1.0f : factors[vector + token];
#pragma unroll
            for (int i = 0; i < 8; ++i) column[own][8 * chunk + i] = __float2bfloat16(x[i] * factor);
        };
        put(columns[0], arguments.factors);
        if (weighted) put(columns[1], arguments.weights);
    }
    __syncthreads();

    const auto store = [&](Number* tiles, const Number(&column)[kBidirectionalChunk][kBidirectionalWidth + 1]) {
#pragma unroll
        for (int pass = 0; pass < kBidirectionalWidth / kRowsAtOnce; ++pass) {
            const int feature = row + pass * kRowsAtOnce;
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const __nv_bfloat162 pair{column[8 * chunk + 2 * i][feature], column[8 * chunk + 2 * i + 1][feature]};
                words[i] = reinterpret_cast<const uint32_t&>(pair);
            }
            tile_at(tiles + tile, feature, chunk) = {words[0], words[1], words[2], words[3]};
        }
    };
    store(arguments.outer_tiles, columns[0]);
    if (weighted) store(arguments.weighted_tiles, columns[1]);
}

}  // namespace

void hadamard_bidirectional_features(const HadamardBidirectionalAccumulate& call, const std::string& feature_map,
                                     cudaStream_t stream) {
    const int64_t chunks = (call.num_tokens + kBidirectionalChunk - 1) / kBidirectionalChunk;
    Arguments arguments{input_tensor<Number>(call.outer, call.outer_strides),
                        input_tensor<Number>(call.inner, call.inner_strides), call.factors, call.weights,
                        static_cast<Number*>(call.outer_tiles), static_cast<Number*>(call.weighted_tiles),
                        static_cast<Number*>(call.inner_tiles), static_cast<int>(call.heads),
                        static_cast<int>(call.num_tokens), static_cast<int>(chunks)};
    void* parameters[] = {&arguments};
    const auto blocks = static_cast<unsigned>(call.batches * call.heads * chunks);
    dispatch_feature_map(feature_map, [&](auto map) {
        constexpr auto kKernel = hadamard_bidirectional_features_kernel<decltype(map)>;
        check(cudaLaunchKernel(kKernel, dim3(blocks), dim3(kThreads), parameters, 0, stream),
              "hadamard_bidirectional_features launch");
    });
}

}  // namespace nearfar
