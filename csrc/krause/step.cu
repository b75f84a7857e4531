// A step of decoding with Krause attention: a block takes a key head of a sequence, reads its last keys and values once for all
// query heads that share them, and puts the new ones into their slot on the way.
//
// All that counts is to keep wide loads in flight: a row is read by D / 8 neighbouring lanes, 16 bytes each, four rows ahead.
// Scores wait in shared memory until a warp has searched those of a query head.
#include "krause/step.h"

#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>

#include "common/check.h"
#include "common/constants.cuh"
#include "common/reduce.cuh"
#include "krause/select.cuh"

namespace nearfar {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kAhead = 4;  // rows that a lane loads before it uses the first

struct Strides {
    int64_t batch, head;
};

template <typename T>
struct Arguments {
    const T *q, *k, *v;
    T *cached_k, *cached_v;
    const int32_t* length;
    const float* sigma;
    T* o;
    Strides q_strides, k_strides, v_strides, o_strides;
    int64_t sigma_stride;
    int kv_heads, group, window, top_k;
};

// Where the keys of a sequence lie in its cache.
struct CacheSlots {
    int window, count, oldest;

    // The slot of the key whose position is the rank-th smallest.
    __device__ int slot(int rank) const { return oldest + rank < window ? oldest + rank : oldest + rank - window; }
};

template <typename T>
__device__ __forceinline__ void unpack_eight(const uint4& bits, float (&numbers)[8]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(words[i]);
        numbers[2 * i] = pair.x;
        numbers[2 * i + 1] = pair.y;
    }
}

// Calls body(slot, row's eight numbers of this lane) for the slots up to count; all lanes of a warp call it equally often, for
// slots beyond with zeros.
template <typename T, int Width, typename Body>
__device__ __forceinline__ void walk(const T* rows, int count, Body&& body) {
    constexpr int kLanes = Width / 8, kRowsAtOnce = kThreads / kLanes;
    const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
    for (int first = row; first - row < count; first += kAhead * kRowsAtOnce) {
        uint4 bits[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int slot = first + i * kRowsAtOnce;
            bits[i] = uint4{0, 0, 0, 0};
            if (slot < count) bits[i] = *reinterpret_cast<const uint4*>(rows + slot * Width + 8 * lane);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            float numbers[8];
            unpack_eight<T>(bits[i], numbers);
            body(first + i * kRowsAtOnce, numbers);
        }
    }
}

// Adds up each of `Count` values over groups of `Lanes` lanes, handing half of what is left on at every step. A lane ends with
// the totals of max(1, Count / Lanes) values, from the one whose index it returns.
template <int Lanes, int Count>
__device__ __forceinline__ int scatter_sums(float (&values)[Count], int lane) {
    int mine = 0, left = Count;
#pragma unroll
    for (int offset = Lanes / 2; offset > 0; offset /= 2) {
        if (left == 1) {
            values[0] += __shfl_xor_sync(kWholeWarp, values[0], offset);
            continue;
        }
        left /= 2;
        const bool upper = lane & offset;
        mine += upper ? left : 0;
#pragma unroll
        for (int i = 0; i < Count / 2; ++i) {
            if (i >= left) break;
            const float kept = upper ? values[i + left] : values[i], given = upper ? values[i] : values[i + left];
            values[i] = kept + __shfl_xor_sync(kWholeWarp, given, offset);
        }
    }
    return mine;
}

// Integers in the order of scores; equal ones for equal scores, and the largest one for what is not a number.
__device__ __forceinline__ int key_of(float score) { return score == score ? ordered(score + 0.0f) : INT_MAX; }

// Fills scores[h * window + slot] with the key of q_h . k - |k|^2 / 2. It is scaled later, so that equal distances stay equal.
template <typename T, int Width, int Heads>
__device__ __forceinline__ void score_keys(const T* q, int64_t q_stride, int members, const T* keys, const CacheSlots& slots,
                                           int* scores) {
    constexpr int kLanes = Width / 8;
    const int lane = threadIdx.x % kLanes;
    float query[Heads][8];
#pragma unroll
    for (int h = 0; h < Heads; ++h)
        unpack_eight<T>(*reinterpret_cast<const uint4*>(q + min(h, members - 1) * q_stride + 8 * lane), query[h]);
    walk<T, Width>(keys, slots.count, [&](int slot, const float(&key)[8]) {
        float score[Heads] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
#pragma unroll
            for (int h = 0; h < Heads; ++h) score[h] = fmaf(key[e], fmaf(-0.5f, key[e], query[h][e]), score[h]);
        }
        const int first = scatter_sums<kLanes>(score, lane);
        constexpr int kSame = kLanes > Heads ? kLanes / Heads : 1;  // lanes that hold the same total
        if (slot < slots.count && lane % kSame == 0) {
#pragma unroll
            for (int i = 0; i < (Heads + kLanes - 1) / kLanes; ++i)
                scores[(first + i) * slots.window + slot] = key_of(score[i]);
        }
    });
}

template <typename Combine>
__device__ __forceinline__ int over_warp(int value, Combine&& combine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(kWholeWarp, value, offset));
    return value;
}

// Turns the keys of a query head's scores into weights, as bits, 0 for what is not selected; returns their sum. A warp's work.
__device__ __forceinline__ float weigh(int* scores, const CacheSlots& slots, int top_k, float scale) {
    const int lane = threadIdx.x % 32;
    const auto count_above = [&](int cut) {
        int above = 0;
        for (int slot = lane; slot < slots.count; slot += 32) above += scores[slot] > cut;
        return over_warp(above, [](int x, int y) { return x + y; });
    };
    int lowest = INT_MAX, highest = INT_MIN;
    for (int slot = lane; slot < slots.count; slot += 32) {
        lowest = min(lowest, scores[slot]), highest = max(highest, scores[slot]);
    }
    lowest = over_warp(lowest, [](int x, int y) { return min(x, y); });
    highest = over_warp(highest, [](int x, int y) { return max(x, y); });

    // At least top_k keys exceed low, fewer exceed high; of those in between, only as many are selected as are needed.
    int low = lowest - 1, high = highest, above = slots.count, above_high = 0;
    if (top_k > 0) {
        while (above > top_k && static_cast<unsigned>(high) - static_cast<unsigned>(low) > 1) {
            const int middle = low + static_cast<int>((static_cast<unsigned>(high) - static_cast<unsigned>(low)) / 2);
            const int exceeding = count_above(middle);
            if (exceeding >= top_k) low = middle, above = exceeding;
            else high = middle, above_high = exceeding;
        }
    }
    const int needed = (above > top_k && top_k > 0 ? top_k : above) - above_high;

    const float shift = unordered(highest);
    float sum = 0.0f;
    int seen = 0;
    for (int first = 0; first < slots.count; first += 32) {
        const bool inside = first + lane < slots.count;
        const int slot = inside ? slots.slot(first + lane) : 0;
        const int key = inside ? scores[slot] : 0;
        const bool between = inside && key > low && key <= high;
        const unsigned others = __ballot_sync(kWholeWarp, between);
        const bool keep = inside && (key > high || (between && seen + __popc(others & ((1u << lane) - 1)) < needed));
        seen += __popc(others);
        const float weight = keep ? exp2_approximate((unordered(key) - shift) * scale) : 0.0f;
        if (inside) scores[slot] = __float_as_int(weight);
        sum += weight;
    }
    return group_sum<32>(sum);
}

// Adds up weights, given as bits, times values and stores the means of `members` query heads. Weights are overwritten.
template <typename T, int Width, int Heads>
__device__ __forceinline__ void average_values(const T* values, const CacheSlots& slots, int* weights, const float* totals,
                                               int members, T* o, int64_t o_stride) {
    constexpr int kLanes = Width / 8;
    float sum[Heads][8] = {};
    walk<T, Width>(values, slots.count, [&](int slot, const float(&value)[8]) {
        if (slot >= slots.count) return;
#pragma unroll
        for (int h = 0; h < Heads; ++h) {
            const float weight = __int_as_float(weights[h * slots.window + slot]);
#pragma unroll
            for (int e = 0; e < 8; ++e) sum[h][e] = fmaf(weight, value[e], sum[h][e]);
        }
    });
    __syncthreads();  // the sums of the warps take the place of the weights
    float* sums = reinterpret_cast<float*>(weights);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < Heads; ++h) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
#pragma unroll
            for (int offset = 16; offset >= kLanes; offset /= 2) sum[h][e] += __shfl_xor_sync(kWholeWarp, sum[h][e], offset);
            if (lane < kLanes) sums[(warp * Heads + h) * Width + 8 * lane + e] = sum[h][e];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < members * Width; i += kThreads) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += sums[w * Heads * Width + i];
        o[i / Width * o_stride + i % Width] = static_cast<T>(total / totals[i / Width]);
    }
}

// Bytes of shared memory: the scores, later overwritten by the sums of the warps, and a total for each query head.
template <int Width, int Heads>
constexpr int shared_bytes(int window) {
    return 4 * Heads * (std::max(window, kWarps * Width) + 1);
}

template <typename T, int Width, int Heads>
__global__ void __launch_bounds__(kThreads) krause_step_kernel(const Arguments<T> arguments) {
    extern __shared__ uint4 memory[];
    float* totals = reinterpret_cast<float*>(memory);
    int* scores = reinterpret_cast<int*>(totals + Heads);

    const int head = blockIdx.x % arguments.kv_heads, window = arguments.window;
    const int64_t batch = blockIdx.x / arguments.kv_heads, ring_start = static_cast<int64_t>(blockIdx.x) * window * Width;
    const int position = max(arguments.length[batch], 0), slot = position % window;
    const bool full = position >= window - 1;
    const CacheSlots slots{window, full ? window : position + 1, full && slot + 1 < window ? slot + 1 : 0};
    T *keys = arguments.cached_k + ring_start, *values = arguments.cached_v + ring_start;

    constexpr int kChunks = Width / 8;
    if (threadIdx.x < 2 * kChunks) {
        const bool of_key = threadIdx.x < kChunks;
        const Strides strides = of_key ? arguments.k_strides : arguments.v_strides;
        const T* from = (of_key ? arguments.k : arguments.v) + batch * strides.batch + head * strides.head;
        const int column = 8 * (threadIdx.x % kChunks);
        *reinterpret_cast<uint4*>((of_key ? keys : values) + slot * Width + column) =
            *reinterpret_cast<const uint4*>(from + column);
    }
    __syncthreads();

    const int warp = threadIdx.x / 32;
    for (int first = 0; first < arguments.group; first += Heads) {
        const int members = min(Heads, arguments.group - first), query_head = head * arguments.group + first;
        score_keys<T, Width, Heads>(arguments.q + batch * arguments.q_strides.batch + query_head * arguments.q_strides.head,
                                    arguments.q_strides.head, members, keys, slots, scores);
        __syncthreads();
        for (int h = warp; h < members; h += kWarps) {
            const float sigma = arguments.sigma[(query_head + h) * arguments.sigma_stride];
            const float scale = sigma > 0.0f ? kLog2E / (sigma * sigma) : NAN;  // not checked on the host: poison the head
            const float total = weigh(scores + h * window, slots, arguments.top_k, scale);
            if (threadIdx.x % 32 == 0) totals[h] = total;
        }
        __syncthreads();
        average_values<T, Width, Heads>(values, slots, scores, totals, members,
                                        arguments.o + batch * arguments.o_strides.batch + query_head * arguments.o_strides.head,
                                        arguments.o_strides.head);
        __syncthreads();  // the next heads' scores take the place of the sums
    }
}

template <typename T, int Width, int Heads>
void launch(const KrauseStep& call, cudaStream_t stream) {
    static_assert(shared_bytes<Width, Heads>(kKrauseStepWindow) <= 48 * 1024, "what a kernel may use unasked");
    const auto strides = [](const std::array<int64_t, 2>& s) { return Strides{s[0], s[1]}; };
    Arguments<T> arguments{static_cast<const T*>(call.q), static_cast<const T*>(call.k), static_cast<const T*>(call.v),
                           static_cast<T*>(call.cached_k), static_cast<T*>(call.cached_v), call.length, call.sigma,
                           static_cast<T*>(call.o), strides(call.q_strides), strides(call.k_strides),
                           strides(call.v_strides), strides(call.o_strides), call.sigma_stride,
                           static_cast<int>(call.kv_heads), static_cast<int>(call.heads / call.kv_heads),
                           static_cast<int>(call.window), static_cast<int>(call.top_k)};
    void* parameters[] = {&arguments};
    const size_t bytes = shared_bytes<Width, Heads>(arguments.window);
    check(cudaLaunchKernel(krause_step_kernel<T, Width, Heads>, dim3(static_cast<unsigned>(call.batches * call.kv_heads)),
                           dim3(kThreads), parameters, bytes, stream),
          "krause_step launch");
}

// Processes the query heads that share a key head together, up to eight.
template <typename T, int Width>
void launch_heads(const KrauseStep& call, cudaStream_t stream) {
    const int64_t group = call.heads / call.kv_heads;
    if (group == 1) launch<T, Width, 1>(call, stream);
    else if (group <= 4) launch<T, Width, 4>(call, stream);
    else launch<T, Width, 8>(call, stream);
}

}  // namespace

void krause_step(const KrauseStep& call, DType dtype, cudaStream_t stream) {
    if (call.window < 1 || call.window > kKrauseStepWindow)
        throw std::invalid_argument("a cache of 1 to 1024 slots is served");
    dispatch_half_and_width(dtype, call.width, [&](auto* type, auto width) {
        launch_heads<std::remove_pointer_t<decltype(type)>, width>(call, stream);
    });
}

}  // namespace nearfar
