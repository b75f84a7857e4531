// Squared norm of every row: |x|^2 for scores that depend on distances. It reads x once and does little else, so all
// that matters is to keep enough wide loads in flight.
#include "common/row_sumsq.h"

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/reduce.cuh"

namespace nearfar {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerGroup = 4;     // FoldedRows whose loads do not wait for one another.
constexpr int64_t kMaxGrid = 65535;  // The hardware's limit in y. Beyond it, in x too, the blocks stride on.

// What is left of (B, H, N) after folding: outer index o = b * H + h, rows n within it.
struct FoldedRows {
    int64_t batches, heads, length;
    int64_t stride_batch, stride_head, stride_row;  // In elements.
};

template <typename T, int Elements>
struct alignas(sizeof(T) * Elements) Pack {
    T element[Elements];
};

template <typename T, int Elements>
__device__ __forceinline__ Pack<T, Elements> load(const Pack<T, Elements>* address) {
    if constexpr (sizeof(*address) == sizeof(uint4)) {
        const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
        return reinterpret_cast<const Pack<T, Elements>&>(bits);
    } else {
        return *address;
    }
}

// A group of `Lanes` lanes takes kRowsPerGroup rows at a time; each row is `packs` packs of `Elements` elements. Lane l
// adds up packs l, l + Lanes, ... in that order, then the group's lanes are added pairwise.
template <typename T, int Elements, int Lanes>
__global__ void __launch_bounds__(kThreads)
row_sumsq_kernel(const T* __restrict__ x, float* __restrict__ out, FoldedRows rows, int64_t packs) {
    constexpr int kGroups = kThreads / Lanes;
    constexpr int kTile = kGroups * kRowsPerGroup;
    const int lane = threadIdx.x % Lanes;
    const int group = threadIdx.x / Lanes;

    for (int64_t outer = blockIdx.y; outer < rows.batches * rows.heads; outer += gridDim.y) {
        const T* x_outer = x + outer / rows.heads * rows.stride_batch + outer % rows.heads * rows.stride_head;
        float* out_outer = out + outer * rows.length;
        for (int64_t tile = blockIdx.x; tile * kTile < rows.length; tile += gridDim.x) {
            const int64_t first = tile * kTile + group;
            float sum[kRowsPerGroup] = {};
            for (int64_t p = lane; p < packs; p += Lanes) {
                Pack<T, Elements> pack[kRowsPerGroup] = {};
#pragma unroll
                for (int i = 0; i < kRowsPerGroup; ++i) {
                    const int64_t n = first + i * kGroups;
                    if (n < rows.length)
                        pack[i] = load(reinterpret_cast<const Pack<T, Elements>*>(x_outer + n * rows.stride_row) + p);
                }
#pragma unroll
                for (int i = 0; i < kRowsPerGroup; ++i) {
#pragma unroll
                    for (int e = 0; e < Elements; ++e) {
                        const float value = static_cast<float>(pack[i].element[e]);
                        sum[i] = fmaf(value, value, sum[i]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kRowsPerGroup; ++i) {
                const int64_t n = first + i * kGroups;
                const float total = group_sum<Lanes>(sum[i]);
                if (lane == 0 && n < rows.length) out_outer[n] = total;
            }
        }
    }
}

template <typename T, int Elements, int Lanes>
void launch(const T* x, float* out, const FoldedRows& rows, int64_t packs, cudaStream_t stream) {
    constexpr int64_t kTile = kThreads / Lanes * kRowsPerGroup;
    const dim3 grid(static_cast<unsigned>(std::min((rows.length + kTile - 1) / kTile, kMaxGrid)),
                    static_cast<unsigned>(std::min(rows.batches * rows.heads, kMaxGrid)));
    row_sumsq_kernel<T, Elements, Lanes><<<grid, kThreads, 0, stream>>>(x, out, rows, packs);
    check(cudaGetLastError(), "row_sumsq launch");
}

// One lane for each pack of a row, as far as a warp goes.
template <typename T, int Elements>
void launch_lanes(const T* x, float* out, const FoldedRows& rows, int64_t width, cudaStream_t stream) {
    const int64_t packs = width / Elements;
    if (packs <= 2) return launch<T, Elements, 2>(x, out, rows, packs, stream);
    if (packs <= 4) return launch<T, Elements, 4>(x, out, rows, packs, stream);
    if (packs <= 8) return launch<T, Elements, 8>(x, out, rows, packs, stream);
    if (packs <= 16) return launch<T, Elements, 16>(x, out, rows, packs, stream);
    return launch<T, Elements, 32>(x, out, rows, packs, stream);
}

// Drops sizes of 1 and joins dimensions that step as one, so that short sequences still fill the blocks.
FoldedRows fold(int64_t batches, int64_t heads, int64_t length, int64_t stride_batch, int64_t stride_head,
                int64_t stride_row) {
    const auto joins = [](int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride) {
        return outer == 1 || inner == 1 || outer_stride == inner * inner_stride;
    };
    for (int pass = 0; pass < 2 && joins(heads, stride_head, length, stride_row); ++pass) {
        if (length == 1) stride_row = stride_head;
        length *= heads;
        heads = batches, stride_head = stride_batch;
        batches = 1;
    }
    return {batches, heads, length, stride_batch, stride_head, stride_row};
}

}  // namespace

void row_sumsq(const RowSumsq& call, DType dtype, cudaStream_t stream) {
    if (call.batches == 0 || call.heads == 0 || call.num_rows == 0) return;
    const auto [batch_stride, head_stride, row_stride] = call.x_strides;
    const FoldedRows rows = fold(call.batches, call.heads, call.num_rows, batch_stride, head_stride, row_stride);

    dispatch_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int kElements = 16 / sizeof(T);
        const bool aligned = reinterpret_cast<uintptr_t>(call.x) % 16 == 0 && call.width % kElements == 0 &&
                             (rows.batches == 1 || rows.stride_batch % kElements == 0) &&
                             (rows.heads == 1 || rows.stride_head % kElements == 0) &&
                             (rows.length == 1 || rows.stride_row % kElements == 0);
        const T* const x = static_cast<const T*>(call.x);
        if (aligned) launch_lanes<T, kElements>(x, call.out, rows, call.width, stream);
        else launch_lanes<T, 1>(x, call.out, rows, call.width, stream);
    });
}

}  // namespace nearfar
