// Exact top-k selection among scores that lie in the registers of one warp, as the c fragments of mma.cuh.
//
// Most of the search works on halves, two to a word: each row maps its scores to halves by a monotone x -> half(a x + b) and
// bisects for a cut that exactly k of them exceed. A comparison leaves ones and zeros in the layout of an a fragment, so the
// tensor cores count them: a matrix of ones sums a row over its lanes too. When the bisection has narrowed the bracket, the
// map is stretched over the remaining bracket, which separates all scores except a few in a thousand rows.
//
// The remaining scores are bisected themselves, as integers in the same order, and column decides between equal scores at the
// cut. The maps affect only the number of steps: the result is exact.
#pragma once

#include <cfloat>
#include <cstdint>

#include "common/halves.cuh"
#include "common/mma.cuh"

namespace nearfar {

constexpr int kZooms = 3;   // maps tried before the scores themselves
constexpr int kSteps = 14;  // of the bisection in one map

// Maps floats to integers in the same order (-0 below 0), and back.
__device__ __forceinline__ int ordered(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float unordered(int key) { return __int_as_float(key ^ (key >> 31 & 0x7fffffff)); }

// half(x * factor + shift): monotone in x, and -infinity for -infinity. factor is a power of two, so that only the last
// operation rounds.
struct HalfMap {
    float factor, shift;

    // Takes the middle of [low, high] to 0, and its ends to +-reach, between 2^14 and 2^15.
    __device__ static HalfMap over(float low, float high, float& reach) {
        const float center = low <= high ? 0.5f * low + 0.5f * high : 0.0f;
        const float radius = 0.5f * high - 0.5f * low;
        const int exponent = max(__float_as_int(radius) & 0x7f800000, 27 << 23);
        const float factor = __int_as_float(((254 + 14) << 23) - exponent);
        reach = radius * factor;
        return {factor, -center * factor};
    }
    __device__ float operator()(float x) const { return fmaf(x, factor, shift); }
    // A number that x exceeds if its half exceeds `half`, and one that x does not exceed unless its half exceeds `half`.
    __device__ float below(float half) const { return __fadd_rd(-shift * inverse(), half * inverse()); }
    __device__ float above(float half) const {
        const float next = half + fabsf(half) * 0x1p-10f + 0x1p-24f;  // or beyond
        return __fadd_ru(-shift * inverse(), next * inverse());
    }
    __device__ float inverse() const { return __int_as_float((254 << 23) - __float_as_int(factor)); }
};

// Keeps the top_k largest scores of each row, of equal ones the first columns, and sets the others to -infinity. A lane has
// rows quad (row 0) and quad + 8 (row 1) of `Blocks` times 16 columns.
template <int Blocks>
class TopK {
   public:
    // count: candidates of each row, whose scores are from lowest to highest; all other scores are -infinity.
    __device__ TopK(float (&score)[2 * Blocks][4], const int (&count)[2], const float (&lowest)[2], const float (&highest)[2],
                    int top_k)
        : score_(score), top_k_(top_k) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            open_[r] = count[r] > top_k;
            low_[r] = lowest[r] - fabsf(lowest[r]) * 0x1p-22f - FLT_MIN;
            high_[r] = highest[r];
        }
        zoom(true, true);
        if (any_open()) search();
        drop_losers();
    }

    // 1.0 for the selected columns, as a fragments.
    __device__ const uint32_t (&kept(int block) const)[4] { return half_[block]; }

   private:
    __device__ bool any_open() const { return __any_sync(kWholeWarp, open_[0] || open_[1]); }

    __device__ __forceinline__ void search() {
        const HalfMap whole[2] = {map_[0], map_[1]};
        bisect_halves();
        for (int i = 1; i < kZooms && any_open(); ++i) {
            zoom(open_[0], open_[1]);
            bisect_halves();
        }
        if (!any_open()) return;
        cut_exactly();
        keep_all(open_[0], open_[1]);
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (open_[r]) map_[r] = whole[r];
        to_halves();
    }

    // Maps what is left of the brackets of some rows to halves, with brackets of halves around it. A row that has its cut,
    // or needs none, keeps low = high there.
    __device__ __forceinline__ void zoom(bool first, bool second) {
        const uint32_t rows = (first ? 0xffff : 0) | (second ? 0xffff0000 : 0);
        float reach[2] = {};
        if (first) map_[0] = HalfMap::over(low_[0], high_[0], reach[0]);
        if (second) map_[1] = HalfMap::over(low_[1], high_[1], reach[1]);
        const uint32_t edge = pack<__half>(reach[0] * (1 + 0x1p-9f), reach[1] * (1 + 0x1p-9f));
        low_halves_ = select(rows, edge ^ 0x80008000, low_halves_);
        high_halves_ = select(rows, edge, high_halves_);
        keep_all(!open_[0] && first, !open_[1] && second);
        to_halves();
    }

    __device__ void keep_all(bool first, bool second) {
        const uint32_t rows = (first ? 0xffff : 0) | (second ? 0xffff0000 : 0);
        low_halves_ = select(rows, kHalfLowest, low_halves_);
        high_halves_ = select(rows, kHalfLowest, high_halves_);
    }

    __device__ void to_halves() {
#pragma unroll
        for (int i = 0; i < 4 * Blocks; ++i) {
            const int tile = i / 2, r = i % 2;
            half_[i / 4][i % 4] = pack<__half>(map_[r](score_[tile][2 * r]), map_[r](score_[tile][2 * r + 1]));
        }
    }

    // How many halves of each row exceed its cut, as halves. Three sums run side by side, as each waits for its last product.
    __device__ uint32_t count_halves(uint32_t cuts) const {
        const uint32_t cut[2] = {lower_twice(cuts), upper_twice(cuts)};
        float sum[3][4] = {};
#pragma unroll
        for (int block = 0; block < Blocks; ++block) {
            const uint32_t mask[4] = {exceeds(half_[block][0], cut[0]), exceeds(half_[block][1], cut[1]),
                                      exceeds(half_[block][2], cut[0]), exceeds(half_[block][3], cut[1])};
            mma<__half>(sum[block % 3], mask, kHalfOnes, kHalfOnes);
        }
        return pack<__half>(sum[0][0] + sum[1][0] + sum[2][0], sum[0][2] + sum[1][2] + sum[2][2]);
    }

    // Keeps: at least top_k halves exceed low, fewer exceed high, or exactly top_k exceed both, which are equal then.
    __device__ __forceinline__ void bisect_halves() {
        const float k = static_cast<float>(top_k_);
        const uint32_t wanted = pack<__half>(k, k);
        for (int step = 0; step < kSteps; ++step) {
            const uint32_t middle = half_way(low_halves_, high_halves_);
            const uint32_t inside = where_greater(middle, low_halves_) & where_less(middle, high_halves_);
            if (!__any_sync(kWholeWarp, inside)) break;
            const uint32_t count = count_halves(middle);
            low_halves_ = select(inside & ~where_less(count, wanted), middle, low_halves_);
            high_halves_ = select(inside & ~where_greater(count, wanted), middle, high_halves_);
        }
        const float2 low = unpack<__half>(low_halves_), high = unpack<__half>(high_halves_);
        narrow(0, low.x, high.x);
        narrow(1, low.y, high.y);
    }

    __device__ void narrow(int r, float low, float high) {
        open_[r] = open_[r] && low != high;
        low_[r] = fmaxf(low_[r], map_[r].below(low));
        high_[r] = fminf(high_[r], map_[r].above(high));
    }

    // How many scores of each row exceed its threshold.
    __device__ void count_scores(const float (&threshold)[2], int (&above)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int mine = 0;
#pragma unroll
            for (int tile = 0; tile < 2 * Blocks; ++tile)
                mine += (score_[tile][2 * r] > threshold[r]) + (score_[tile][2 * r + 1] > threshold[r]);
            above[r] = static_cast<int>(quad_sum(static_cast<float>(mine)));
        }
    }

    // Sets the losers of open rows to -infinity.
    __device__ void cut_exactly() {
        int low[2], high[2], above[2];
        bool searching[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            low[r] = ordered(low_[r]);
            high[r] = ordered(high_[r]);
            searching[r] = open_[r];
        }
        while (true) {
            int middle[2];
            float threshold[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const unsigned gap = static_cast<unsigned>(high[r]) - static_cast<unsigned>(low[r]);
                middle[r] = low[r] + static_cast<int>(gap / 2);
                threshold[r] = unordered(middle[r]);
                searching[r] = searching[r] && high[r] > low[r] && gap > 1;
            }
            if (!__any_sync(kWholeWarp, searching[0] || searching[1])) break;
            count_scores(threshold, above);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (!searching[r]) continue;
                if (above[r] >= top_k_) low[r] = middle[r];
                else high[r] = middle[r];
                searching[r] = above[r] != top_k_;
            }
        }
        // Either k scores exceed low, or high is the next number: then those equal to it fill up what exceeds it.
        const float edge[2] = {unordered(high[0]), unordered(high[1])};
        count_scores(edge, above);
        const int needed[2] = {top_k_ - above[0], top_k_ - above[1]};
        int seen[2] = {0, 0};
        const int lane = threadIdx.x % 32, quad = lane & ~3;
        const unsigned before = (1u << lane % 4) - 1;
#pragma unroll
        for (int i = 0; i < 4 * Blocks; ++i) {
            const int tile = i / 2, r = i % 2;
            float &first = score_[tile][2 * r], &second = score_[tile][2 * r + 1];
            const float bottom = unordered(low[r]);
            const bool tied_first = first > bottom && first <= edge[r], tied_second = second > bottom && second <= edge[r];
            const unsigned firsts = __ballot_sync(kWholeWarp, tied_first) >> quad & 15;
            const unsigned seconds = __ballot_sync(kWholeWarp, tied_second) >> quad & 15;
            const int rank = seen[r] + __popc(firsts & before) + __popc(seconds & before);
            seen[r] += __popc(firsts) + __popc(seconds);
            if (!open_[r]) continue;
            if (first <= bottom || (tied_first && rank >= needed[r])) first = -INFINITY;
            if (second <= bottom || (tied_second && rank + tied_first >= needed[r])) second = -INFINITY;
        }
    }

    __device__ void drop_losers() {
        const uint32_t cut[2] = {lower_twice(low_halves_), upper_twice(low_halves_)};
#pragma unroll
        for (int i = 0; i < 4 * Blocks; ++i) {
            const int tile = i / 2, r = i % 2;
            uint32_t& half = half_[i / 4][i % 4];
            keep_exceeding(score_[tile][2 * r], score_[tile][2 * r + 1], half, cut[r]);
            half = exceeds_or_nan(half, cut[r]);
        }
    }

    float (&score_)[2 * Blocks][4];
    const int top_k_;
    uint32_t half_[Blocks][4];           // of the scores, as a fragments; in the end the mask
    HalfMap map_[2];
    uint32_t low_halves_ = 0, high_halves_ = 0;  // brackets of the cuts of rows 0 and 1, in the lower and the upper half
    float low_[2], high_[2];             // at least top_k scores exceed low, fewer exceed high
    bool open_[2];                       // the row has no cut yet and needs one
};

}  // namespace nearfar
