// The largest scores of each query with their keys, and how near other keys come to the selected ones.
//
// Both kernels multiply the same rows with the same instructions, so a score has the same bits in both. A key is therefore
// selected exactly if it does not rank behind the last selected one. Each lane handles its own columns; the lanes of a row are
// combined at the end.
#include "diagnostics/geometry.h"

#include <cstdint>
#include <stdexcept>

#include "common/pairs.cuh"
#include "common/pairs_launch.cuh"

namespace nearfar {
namespace {

constexpr int kRound = 8;  // keys that `select` finds in one walk, or half as many

// The best entries of a row in a lane's columns, the largest score first, of equal ones the one that came first.
template <int kRound>
struct Ranking {
    float score[kRound];
    int key[kRound];

    __device__ Ranking() {
#pragma unroll
        for (int t = 0; t < kRound; ++t) score[t] = -kInfinity, key[t] = 0;
    }

    // A score that as many keys of the row have as are searched for, in all its lanes.
    __device__ __forceinline__ float reached() const {
        float least = score[kRound / 4 - 1], most = score[kRound - 1];
#pragma unroll
        for (int bits = 1; bits <= 2; bits *= 2) {
            least = fminf(least, __shfl_xor_sync(kWholeWarp, least, bits));
            most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, bits));
        }
        return fmaxf(least, most);
    }

    __device__ __forceinline__ void insert(float new_score, int new_key) {
#pragma unroll
        for (int t = kRound - 1; t >= 0; --t) {
            const bool here = new_score > score[t], before = t > 0 && new_score > score[t > 0 ? t - 1 : 0];
            if (here) {
                score[t] = before ? score[t > 0 ? t - 1 : 0] : new_score;
                key[t] = before ? key[t > 0 ? t - 1 : 0] : new_key;
            }
        }
    }

    __device__ __forceinline__ void drop_first() {
#pragma unroll
        for (int t = 0; t + 1 < kRound; ++t) score[t] = score[t + 1], key[t] = key[t + 1];
        score[kRound - 1] = -kInfinity, key[kRound - 1] = 0;
    }
};

// Whether (score, key) ranks behind another entry.
__device__ __forceinline__ bool follows(float score, int key, float last_score, int last_key) {
    return score < last_score || (score == last_score && key > last_key);
}

struct SelectArguments {
    PairArguments<1> pairs;
    float* scores;
    int32_t* chosen;
    int top_n, first_rank;
};

template <typename Traits, int kRound, bool Resumed>
struct SelectBody {
    static constexpr int kCount = Traits::kTile / 4;  // of a lane's columns
    Band band;
    int row, lane;
    float last_score[2];  // of the round before
    int last_key[2];
    Ranking<kRound> ranking[2];
    float reached[2] = {-kInfinity, -kInfinity};  // by the tiles before this one: only a higher score ranks

    template <bool Edges>
    __device__ __forceinline__ void add(typename Traits::Products& products, int first, const float*) {
        const auto at = [&](int r, int i) -> float& { return products[0][i / 2 * 4 + 2 * r + i % 2]; };
        const auto key = [&](int i) { return first + product_column(lane, i / 2 * 4 + i % 2); };
        float top[2][2] = {{-kInfinity, -kInfinity}, {-kInfinity, -kInfinity}};
#pragma unroll
        for (int i = 0; i < 2 * kCount; ++i) {
            const int r = i % 2;
            float& score = at(r, i / 2);
            bool candidate = !Edges || (key(i / 2) >= band.begin(row + 8 * r) && key(i / 2) < band.end(row + 8 * r));
            if (Resumed) candidate &= follows(score, key(i / 2), last_score[r], last_key[r]);
            if (Edges || Resumed) score = candidate ? score : -kInfinity;
            top[r][i / 2 % 2] = fmaxf(top[r][i / 2 % 2], score);
        }
        // Few rows find anything new in a tile, and those that do find little.
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float next = fmaxf(top[r][0], top[r][1]);
            if (!__any_sync(kWholeWarp, next > reached[r])) continue;
            while (next > reached[r] && next > ranking[r].score[kRound - 1]) {
                const float score = next;
                unsigned equal = 0;
                next = -kInfinity;
#pragma unroll
                for (int i = 0; i < kCount; ++i) {
                    equal |= at(r, i) == score ? 1u << i : 0;
                    next = fmaxf(next, at(r, i) < score ? at(r, i) : -kInfinity);
                }
                for (; equal != 0; equal &= equal - 1) {
                    const int i = __ffs(equal) - 1;
                    ranking[r].insert(score, key(i));
                }
            }
            __syncwarp();
            reached[r] = ranking[r].reached();
        }
    }
};

template <typename Traits, int kRound, bool Resumed>
__global__ void __launch_bounds__(Traits::kThreads, 1) select_kernel(const __grid_constant__ SelectArguments arguments) {
    extern __shared__ __align__(1024) uint4 memory[];
    const Place place = arguments.pairs.of_queries(blockIdx.x);
    const int lane = threadIdx.x % 32, row = own_row<Traits>(place);
    const int64_t head = static_cast<int64_t>(place.batch) * arguments.pairs.heads + place.head;
    const Band& band = arguments.pairs.band;
    SelectBody<Traits, kRound, Resumed> body{band, row, lane, {}, {}, {}};
    const auto entry = [&](int r) { return (head * band.num_rows + row + 8 * r) * arguments.top_n + arguments.first_rank; };
    if (Resumed) {
        for (int r = 0; r < 2; ++r) {
            if (row + 8 * r >= band.num_rows) continue;
            body.last_score[r] = arguments.scores[entry(r) - 1];
            body.last_key[r] = arguments.chosen[entry(r) - 1];
        }
    }
    if (!for_each_tile<Traits>(arguments.pairs, place, nullptr, reinterpret_cast<char*>(memory), body)) return;

    const int count = min(kRound, arguments.top_n - arguments.first_rank);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        Ranking<kRound>& mine = body.ranking[r];
        for (int t = 0; t < count; ++t) {
            float score = mine.score[0];
            int key = mine.key[0];
            for (int bits = 1; bits <= 2; bits *= 2) {
                const float other = __shfl_xor_sync(kWholeWarp, score, bits);
                const int other_key = __shfl_xor_sync(kWholeWarp, key, bits);
                if (follows(score, key, other, other_key)) score = other, key = other_key;
            }
            if (lane % 4 == 0 && row + 8 * r < band.num_rows) {
                arguments.scores[entry(r) + t] = score;
                arguments.chosen[entry(r) + t] = score == -kInfinity ? 0 : key;
            }
            if (mine.score[0] == score && mine.key[0] == key) mine.drop_first();
        }
    }
}

struct SeparateArguments {
    PairArguments<2> pairs;
    const float *scores, *shift, *farthest, *excess, *squares;
    const int32_t* chosen;
    float *precision, *recall, *f_score;
    int top_n, padded_keys;
    float unit;
};

template <typename Traits>
struct SeparateBody {
    static constexpr int kCount = Traits::kTile / 4;
    float unit;
    Band band;
    int row, lane;
    float last_score[2], above_last[2], shift[2], farthest[2];  // above: the next number
    int last_key[2];
    float nearest[2];
    int intruders[2];

    template <bool Edges>
    __device__ __forceinline__ void add(typename Traits::Products& products, int first, const float* squares) {
        const auto inside = [&](int r, int key) {
            return !Edges || (key >= band.begin(row + 8 * r) && key < band.end(row + 8 * r));
        };
        // Keys with the score of the last selected key rank behind it if they come after it.
        float limit[2];
        bool mixed = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            limit[r] = first > last_key[r] ? above_last[r] : last_score[r];
            mixed = mixed || (first <= last_key[r] && last_key[r] < first + Traits::kTile);
        }
        visit(products, first, squares, [&](int r, int key, float score, float excess) {
            const float seen = inside(r, key) ? score : kInfinity;  // what is beyond a row's keys counts as selected
            count_below(nearest[r], intruders[r], seen, limit[r], excess, farthest[r]);
        });
        if (!mixed) return;
        visit(products, first, squares, [&](int r, int key, float score, float excess) {
            if (first > last_key[r] || score != last_score[r] || key <= last_key[r] || !inside(r, key)) return;
            nearest[r] = fminf(nearest[r], excess);
            intruders[r] += excess <= farthest[r];
        });
    }

   private:
    // Calls see(r, key, score, excess) for each pair of a row and a key: excess is that by which its distance to s ranks.
    template <typename See>
    __device__ __forceinline__ void visit(const typename Traits::Products& products, int first, const float* squares,
                                          const See& see) const {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const float2 square = *reinterpret_cast<const float2*>(squares + 8 * i + 2 * (lane % 4));
            const float half[2] = {0.5f * square.x, 0.5f * square.y};
#pragma unroll
            for (int element = 0; element < 4; ++element) {
                const int r = element / 2;
                const float score = products[0][4 * i + element], value = products[1][4 * i + element];
                const float weight = exp2_approximate(fmaf(score, unit, -shift[r]));
                see(r, first + product_column(lane, 4 * i + element), score, weight * fmaf(weight, half[element % 2], -value));
            }
        }
    }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) separate_kernel(const __grid_constant__ SeparateArguments arguments) {
    extern __shared__ __align__(1024) uint4 memory[];
    const Place place = arguments.pairs.of_queries(blockIdx.x);
    const Band& band = arguments.pairs.band;
    const int lane = threadIdx.x % 32, row = own_row<Traits>(place);
    const int64_t rows = (static_cast<int64_t>(place.batch) * arguments.pairs.heads + place.head) * band.num_rows;
    SeparateBody<Traits> body{arguments.unit, band, row, lane, {}, {}, {}, {}, {}, {kInfinity, kInfinity}, {}};
    for (int r = 0; r < 2; ++r) {
        const int64_t query = rows + min(row + 8 * r, band.num_rows - 1), last = (query + 1) * arguments.top_n - 1;
        body.last_score[r] = arguments.scores[last], body.last_key[r] = arguments.chosen[last];
        body.above_last[r] = nextafterf(body.last_score[r], kInfinity);
        body.shift[r] = arguments.shift[query], body.farthest[r] = arguments.farthest[query];
    }
    const int kv_heads = arguments.pairs.heads / arguments.pairs.group;
    const float* const squares =
        arguments.squares + (static_cast<int64_t>(place.batch) * kv_heads + place.other_head) * arguments.padded_keys;
    if (!for_each_tile<Traits>(arguments.pairs, place, squares, reinterpret_cast<char*>(memory), body)) return;

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float nearest = body.nearest[r];
        int intruders = body.intruders[r], separated = 0;
        for (int bits = 1; bits <= 2; bits *= 2) {
            nearest = fminf(nearest, __shfl_xor_sync(kWholeWarp, nearest, bits));
            intruders += __shfl_xor_sync(kWholeWarp, intruders, bits);
        }
        const int query = min(row + 8 * r, band.num_rows - 1);
        const float* const excess = arguments.excess + (rows + query) * arguments.top_n;
        for (int t = lane % 4; t < arguments.top_n; t += 4) separated += excess[t] < nearest;
        for (int bits = 1; bits <= 2; bits *= 2) separated += __shfl_xor_sync(kWholeWarp, separated, bits);
        if (lane % 4 > 0 || row + 8 * r >= band.num_rows) continue;
        const auto selected = static_cast<float>(min(arguments.top_n, band.end(query) - band.begin(query)));
        const float precision = selected / (selected + static_cast<float>(intruders));
        const float recall = nearest == kInfinity ? 1.0f : static_cast<float>(separated) / selected;
        const float f_score = 2 * precision * recall / (precision + recall), farthest = body.farthest[r];
        const bool sound = farthest == farthest;
        arguments.precision[rows + query] = sound ? precision : farthest;
        arguments.recall[rows + query] = sound ? recall : farthest;
        arguments.f_score[rows + query] = sound ? f_score : farthest;
    }
}

// Queries, keys and what belongs to them.
struct Tensors {
    Rows q, k, v, s;
    Sight sight;

    explicit Tensors(const Geometry& call)
        : q{call.q, {call.batches, call.heads, call.num_queries, call.width}, call.q_strides},
          k{call.k, {call.batches, call.kv_heads, call.num_keys, call.width}, call.k_strides},
          v{call.v, {call.batches, call.kv_heads, call.num_keys, call.width}, call.v_strides},
          s{call.s, q.sizes, {call.heads * call.num_queries * call.width, call.num_queries * call.width, call.width}},
          sight{call.num_queries, call.num_keys, call.left, call.right} {}
};

template <auto kKernel>
using Constant = std::integral_constant<decltype(kKernel), kKernel>;

template <typename Number, int Width>
void select_of(const Geometry& call, cudaStream_t stream) {
    using Traits = PairTraits<Number, Width, 1, 4, kDiagnosticsTile, 4>;
    const Tensors tensors(call);
    const auto band = tensors.sight.of_queries();
    SelectArguments arguments{pair_arguments<Traits>({tensors.q}, {tensors.k}, band, call.heads, call.kv_heads),
                              call.scores, call.chosen, static_cast<int>(call.top_n), 0};
    for (; arguments.first_rank < arguments.top_n; arguments.first_rank += kRound) {
        const int64_t heads = call.batches * call.heads;
        const auto launch = [&](auto kernel) {
            launch_pairs<kernel.value, Traits>(arguments, heads, stream, "select launch");
        };
        if (arguments.first_rank > 0) launch(Constant<select_kernel<Traits, kRound, true>>());
        else if (arguments.top_n > kRound / 2) launch(Constant<select_kernel<Traits, kRound, false>>());
        else launch(Constant<select_kernel<Traits, kRound / 2, false>>());
    }
}

template <typename Number, int Width>
void separate_of(const Geometry& call, cudaStream_t stream) {
    using Traits = PairTraits<Number, Width, 2, 3, kDiagnosticsTile / 2, Width == 64 ? 4 : 3>;
    const Tensors tensors(call);
    const auto band = tensors.sight.of_queries();
    SeparateArguments arguments{
        pair_arguments<Traits>({tensors.q, tensors.s}, {tensors.k, tensors.v}, band, call.heads, call.kv_heads),
        call.scores, call.shift, call.farthest, call.excess, call.squares, call.chosen,
        call.precision, call.recall, call.f_score, static_cast<int>(call.top_n),
        static_cast<int>(whole_tiles(call.num_keys, kDiagnosticsTile)), static_cast<float>(call.scale) * kLog2E};
    launch_pairs<separate_kernel<Traits>, Traits>(arguments, call.batches * call.heads, stream, "separate launch");
}

}  // namespace

void geometry_select(const Geometry& call, DType dtype, cudaStream_t stream) {
    dispatch_hopper(dtype, call.width, [&](auto* type, auto width) {
        select_of<std::remove_pointer_t<decltype(type)>, width>(call, stream);
    });
}

void geometry_separate(const Geometry& call, DType dtype, cudaStream_t stream) {
    dispatch_hopper(dtype, call.width, [&](auto* type, auto width) {
        separate_of<std::remove_pointer_t<decltype(type)>, width>(call, stream);
    });
}

}  // namespace nearfar
