// Log-sum-exp, entropy and largest weight of each query, and the weight that each key receives, without any N x N object.
//
// Two walks over all pairs (pairs.cuh): queries visit the keys that they see; then keys visit the queries that see them, given
// each query's log-sum-exp. A lane keeps data of its own columns only; the lanes of a row are combined at the end.
#include "diagnostics/statistics.h"

#include <cstdint>

#include "common/pairs.cuh"
#include "common/pairs_launch.cuh"

namespace nearfar {
namespace {

struct Arguments {
    PairArguments<1> pairs;
    float *lse, *entropy, *max_weight;
    int64_t* max_key;
    float *mass, *levels;
    int padded_queries;
    float unit;  // of scores, in base 2
};

// What is known of the weights of a row, relative to 2^level. Entropy is log(total) - weighted / total with
// x = log(weight) <= 0: two terms of one sign, so that small entropies keep their digits.
struct Summary {
    float highest = -kInfinity;  // product
    float level = 0;             // highest * unit, rounded once
    int key = 0;                 // the first that has it
    float total = 0, weighted = 0;  // sums of w and of w x over this lane's columns, x in base 2

    __device__ __forceinline__ void raise(float new_highest, int new_key, float unit) {
        const float new_level = new_highest * unit;
        const float moved = highest == -kInfinity ? 0.0f : level - new_level, decay = exp2_approximate(moved);
        weighted = (weighted + total * moved) * decay;
        total *= decay;
        highest = new_highest, level = new_level, key = new_key;
    }
};

template <typename Traits>
struct StatisticsBody {
    static constexpr int kCount = Traits::kTile / 4;  // of a lane's columns
    float unit;
    Band band;
    int row, lane;  // the lane's first row; its second one is 8 further
    Summary summary[2];

    template <bool Edges>
    __device__ __forceinline__ void add(typename Traits::Products& products, int first, const float*) {
        const auto at = [&](int r, int i) -> float& { return products[0][i / 2 * 4 + 2 * r + i % 2]; };
        const auto column = [&](int i) { return product_column(lane, i / 2 * 4 + i % 2); };
        if (Edges) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int begin = band.begin(row + 8 * r) - first, end = band.end(row + 8 * r) - first;
#pragma unroll
                for (int i = 0; i < kCount; ++i)
                    if (column(i) < begin || column(i) >= end) at(r, i) = -kInfinity;
            }
        }
        // Several chains of maxima and sums side by side.
        float top[2][2] = {{-kInfinity, -kInfinity}, {-kInfinity, -kInfinity}};
#pragma unroll
        for (int i = 0; i < 2 * kCount; ++i) top[i % 2][i / 2 % 2] = fmaxf(top[i % 2][i / 2 % 2], at(i % 2, i / 2));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float highest = quad_max(fmaxf(top[r][0], top[r][1]));
            if (!__any_sync(kWholeWarp, highest > summary[r].highest)) continue;
            int found = Traits::kTile;
#pragma unroll
            for (int i = kCount - 1; i >= 0; --i)
                if (at(r, i) == highest) found = column(i);
            found = min(found, __shfl_xor_sync(kWholeWarp, found, 1));
            found = min(found, __shfl_xor_sync(kWholeWarp, found, 2));
            if (highest > summary[r].highest) summary[r].raise(highest, first + found, unit);
        }
        float total[2][2] = {}, weighted[2][2] = {};
#pragma unroll
        for (int i = 0; i < 2 * kCount; ++i) {
            const int r = i % 2, chain = i / 2 % 2;
            float x = fmaf(at(r, i / 2), unit, -summary[r].level);
            const float weight = exp2_approximate(x);
            if (Edges) x = fmaxf(x, -1e30f);  // as 0 * -inf is no number
            total[r][chain] += weight;
            weighted[r][chain] = fmaf(weight, x, weighted[r][chain]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            summary[r].total += total[r][0] + total[r][1];
            summary[r].weighted += weighted[r][0] + weighted[r][1];
        }
    }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) statistics_kernel(const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(1024) uint4 memory[];
    const Place place = arguments.pairs.of_queries(blockIdx.x);
    const Band& band = arguments.pairs.band;
    const int lane = threadIdx.x % 32, row = own_row<Traits>(place);
    StatisticsBody<Traits> body{arguments.unit, band, row, lane, {}};
    if (!for_each_tile<Traits>(arguments.pairs, place, nullptr, reinterpret_cast<char*>(memory), body)) return;

    const int64_t head = static_cast<int64_t>(place.batch) * arguments.pairs.heads + place.head;
    for (int r = 0; r < 2; ++r) {
        const Summary& mine = body.summary[r];
        const float total = quad_sum(mine.total), weighted = quad_sum(mine.weighted);
        const int query = row + 8 * r;
        if (lane % 4 > 0 || query >= band.num_rows) continue;
        const int64_t at = head * band.num_rows + query;
        const float bits_of_total = log2f(total), level = mine.level + bits_of_total;
        arguments.lse[at] = level * kLn2;
        const float entropy = (bits_of_total - weighted / total) * kLn2;
        arguments.entropy[at] = entropy < 0 ? 0.0f : entropy;  // NaN stays NaN
        arguments.max_weight[at] = total < 1 ? 1.0f : 1.0f / total;
        arguments.max_key[at] = mine.key;
        arguments.levels[head * arguments.padded_queries + query] = level;
    }
}

template <typename Traits>
struct MassBody {
    static constexpr int kCount = Traits::kTile / 4;
    float unit;
    Band band;
    int row, lane;
    float total[2];

    template <bool Edges>
    __device__ __forceinline__ void add(typename Traits::Products& products, int first, const float* levels) {
        float sum[2][2] = {};
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const float2 level = *reinterpret_cast<const float2*>(levels + 8 * i + 2 * (lane % 4));
#pragma unroll
            for (int element = 0; element < 4; ++element) {
                const int r = element / 2, query = first + product_column(lane, 4 * i + element);
                const float weight =
                    exp2_approximate(fmaf(products[0][4 * i + element], unit, element % 2 == 0 ? -level.x : -level.y));
                const bool inside = !Edges || (query >= band.begin(row + 8 * r) && query < band.end(row + 8 * r));
                sum[r][element % 2] += inside ? weight : 0.0f;
            }
        }
        total[0] += sum[0][0] + sum[0][1];
        total[1] += sum[1][0] + sum[1][1];
    }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) key_mass_kernel(const __grid_constant__ Arguments arguments) {
    extern __shared__ __align__(1024) uint4 memory[];
    const Place place = arguments.pairs.of_keys(blockIdx.x);
    const Band& band = arguments.pairs.band;
    const int lane = threadIdx.x % 32, row = own_row<Traits>(place);
    const int64_t head = static_cast<int64_t>(place.batch) * arguments.pairs.heads + place.other_head;
    MassBody<Traits> body{arguments.unit, band, row, lane, {}};
    const float* const levels = arguments.levels + head * arguments.padded_queries;
    if (!for_each_tile<Traits>(arguments.pairs, place, levels, reinterpret_cast<char*>(memory), body)) return;
    for (int r = 0; r < 2; ++r) {
        const float total = quad_sum(body.total[r]);
        const int key = row + 8 * r;
        if (lane % 4 == 0 && key < band.num_rows) arguments.mass[head * band.num_rows + key] = total;
    }
}

template <typename Number, int Width>
void statistics_of(const Statistics& call, cudaStream_t stream) {
    using Traits = PairTraits<Number, Width, 1, 4, kDiagnosticsTile, 4>;
    const Rows q{call.q, {call.batches, call.heads, call.num_queries, Width}, call.q_strides};
    const Rows k{call.k, {call.batches, call.kv_heads, call.num_keys, Width}, call.k_strides};
    const Sight sight{call.num_queries, call.num_keys, call.left, call.right};
    Arguments arguments{{}, call.lse, call.entropy, call.max_weight, call.max_key, call.mass, call.levels,
                        static_cast<int>(whole_tiles(call.num_queries, kDiagnosticsTile)),
                        static_cast<float>(call.scale) * kLog2E};
    arguments.pairs = pair_arguments<Traits>({q}, {k}, sight.of_queries(), call.heads, call.kv_heads);
    launch_pairs<statistics_kernel<Traits>, Traits>(arguments, call.batches * call.heads, stream, "statistics launch");
    arguments.pairs = pair_arguments<Traits>({k}, {q}, sight.of_keys(), call.heads, call.kv_heads);
    launch_pairs<key_mass_kernel<Traits>, Traits>(arguments, call.batches * call.heads, stream, "key_mass launch");
}

}  // namespace

void statistics(const Statistics& call, DType dtype, cudaStream_t stream) {
    dispatch_hopper(dtype, call.width, [&](auto* type, auto width) {
        statistics_of<std::remove_pointer_t<decltype(type)>, width>(call, stream);
    });
}

}  // namespace nearfar
