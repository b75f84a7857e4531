// Gradients of Krause attention over a window (krause/forward.cu), the selection held constant:
//
//     s_ij = (q_i.k_j - |k_j|^2 / 2) scale      P = 2^(s - lse)      dP = dO V^T      delta_i = dO_i.o_i
//     dS = P (dP - delta)
//     dq_i = scale sum_j dS_ij (k_j - c_i)
//     dk_j = scale (sum_i dS_ij q_i - k_j sum_i dS_ij)                dv_j = sum_i P_ij dO_i
//     d log(scale) = sum_ij dS_ij (s_ij - m_i)
//
// As dS sums to zero in a row, any c_i and m_i are correct, but delta contains the rounding error of o. With the key of
// greatest weight as c_i that error hardly matters, and with the mean score sum_j P_ij s_ij as m_i it cancels.
//
// Two kinds of blocks: one walks a strip of consecutive tiles of 64 queries and keeps the keys and values within reach in a
// ring of rows in shared memory; the other walks tiles of keys, with a ring of the queries that see them and their dO. A warp
// owns 16 rows of a tile, whose sums stay in registers, and takes the ring in blocks of 16 rows: those that its own rows
// reach and no others. Each row is fetched once a strip; nothing is added atomically.
//
// Both kinds read nearly the same tensors. Blocks of the two alternate in one grid, over the same stretch of tokens at about
// the same time, so what one fetches from memory the other finds in the second-level cache.
#include "krause/backward.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "common/check.h"
#include "common/occupancy.h"
#include "common/reduce.cuh"
#include "krause/backward_keys.cuh"
#include "krause/backward_queries.cuh"

namespace nearfar {
namespace {

template <typename T, int Width>
__global__ void __launch_bounds__(kThreads, Width <= 64 ? 3 : 1)
krause_backward_kernel(const __grid_constant__ Arguments<T> arguments) {
    extern __shared__ __align__(128) uint4 memory[];
    const Memory<Width> shared(memory);
    const int index = blockIdx.x / 2;
    if (blockIdx.x % 2 == 0) {
        grad_queries<T, Width>(arguments, shared, index / arguments.num_strips, index % arguments.num_strips);
    } else {
        const int num_strips = arguments.num_strips * arguments.group;
        grad_keys<T, Width>(arguments, shared, index / num_strips, index % num_strips, num_strips);
    }
}

// dsigma from the partial sums of grad_queries, in a fixed order: log(scale) = -2 log(sigma). One block a number, of which
// `share` consecutive partials of each batch are.
constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads)
grad_sigma_kernel(const float* partials, const float* sigma, float* dsigma, int batches, int share) {
    __shared__ float warp_total[kSumThreads / 32];
    float total = 0;
    for (int batch = 0; batch < batches; ++batch) {
        const float* const from = partials + (static_cast<int64_t>(batch) * gridDim.x + blockIdx.x) * share;
        for (int i = threadIdx.x; i < share; i += kSumThreads) total += from[i];
    }
    total = group_sum<32>(total);
    if (threadIdx.x % 32 == 0) warp_total[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x > 0) return;
    total = 0;
    for (const float part : warp_total) total += part;
    dsigma[blockIdx.x] = -2.0f * total / sigma[blockIdx.x];
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Strips of a query head. Short ones keep the two kinds of blocks at the same tokens, though each has to fill its ring first;
// yet shorter ones where the device would not be full otherwise.
int64_t strips(int64_t tiles, int64_t heads, int64_t resident) {
    return std::max(ceil_div(tiles, kStripTiles), std::clamp<int64_t>(resident / (2 * heads), 1, tiles));
}

template <typename T, int Width>
void launch(const KrauseBackward& call, cudaStream_t stream) {
    const int back = static_cast<int>(call.back), ahead = static_cast<int>(call.ahead), size = back + ahead + 1;
    const int num_queries = static_cast<int>(call.num_queries), num_keys = static_cast<int>(call.num_keys);
    const int num_blocks = std::max<int>(ceil_div(kRows + size - 1, kRows), kTileBlocks + 1);
    const int64_t heads = call.batches * call.heads;
    const int64_t tiles = ceil_div(std::max(num_queries, num_keys), kTileRows);
    constexpr auto kKernel = krause_backward_kernel<T, Width>;
    constexpr int kBytes = Memory<Width>::kBytes;
    const int64_t num_strips = strips(tiles, heads, resident_blocks<kKernel>(kThreads, kBytes));

    const auto input = input_tensor<T>;
    const auto output = output_tensor<T>;
    Arguments<T> arguments{
        input(call.q, call.q_strides), input(call.k, call.k_strides), input(call.v, call.v_strides),
        input(call.o, call.o_strides), input(call.grad_o, call.grad_o_strides),
        output(call.dq, call.dq_strides), output(call.dk, call.dk_strides), output(call.dv, call.dv_strides),
        call.sigma, call.lse, call.bits, call.partials, call.sigma_stride,
        Window{num_keys - num_queries, back, ahead, call.token_bounds, num_queries, num_keys},
        Window{num_queries - num_keys, ahead, back, call.token_bounds, num_keys, num_queries},
        static_cast<int>(call.heads), static_cast<int>(call.heads / call.kv_heads),
        static_cast<int>(ceil_div(num_queries, kTileRows)), static_cast<int>(ceil_div(num_keys, kTileRows)),
        static_cast<int>(num_strips), size <= 64 ? 2 : 4, num_blocks};
    void* parameters[] = {&arguments};
    check(cudaLaunchKernel(kKernel, dim3(static_cast<unsigned>(2 * heads * num_strips)), dim3(kThreads), parameters,
                           kBytes, stream),
          "krause_backward launch");

    const int64_t numbers = call.sigma_stride == 0 ? 1 : call.heads;
    int batches = static_cast<int>(call.batches), share = static_cast<int>(call.heads / numbers * num_strips);
    const float *partials = call.partials, *sigma = call.sigma;
    float* dsigma = call.dsigma;
    void* sum_parameters[] = {&partials, &sigma, &dsigma, &batches, &share};
    check(cudaLaunchKernel(grad_sigma_kernel, dim3(static_cast<unsigned>(numbers)), dim3(kSumThreads),
                           sum_parameters, 0, stream),
          "grad_sigma launch");
}

}  // namespace

int64_t krause_backward_shared_bytes(int64_t width) {
    return width == 32 ? Memory<32>::kBytes : width == 64 ? Memory<64>::kBytes : Memory<128>::kBytes;
}

void krause_backward(const KrauseBackward& call, DType dtype, cudaStream_t stream) {
    if (call.back < 0 || call.ahead < 0 || call.back + call.ahead + 1 > kKrauseWindow)
        throw std::invalid_argument("a window of 1 to 128 keys is served, back and ahead not negative");
    dispatch_half_and_width(dtype, call.width, [&](auto* type, auto width) {
        launch<std::remove_pointer_t<decltype(type)>, width>(call, stream);
    });
}

}  // namespace nearfar
