// The instructions of csrc/common/ptx.cuh by plain C++ on emulated lanes, with checks of the addresses that they take.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <numeric>

#include "block.h"

namespace nearfar {

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulation::shared.begin);
}

inline void copy_async(uint32_t shared, const void* global, bool wanted) {
    emulation::check_shared(shared, "cp.async");
    if (wanted && reinterpret_cast<uintptr_t>(global) % 16) emulation::fail("cp.async: global address not a multiple of 16");
    const emulation::Copy copy{shared, wanted ? global : nullptr};
    if (emulation::late_copies) emulation::this_lane().copies.push_back(copy);
    else copy.land();
}

inline void wait_for_copies() {
    emulation::this_lane().land_copies(emulation::this_lane().copies.size());
    emulation::this_lane().groups.clear();
}

inline void commit_copies() {
    emulation::Lane& lane = emulation::this_lane();
    lane.groups.push_back(lane.copies.size() - std::accumulate(lane.groups.begin(), lane.groups.end(), size_t{0}));
}

template <int Pending>
void wait_for_groups() {
    emulation::Lane& lane = emulation::this_lane();
    while (lane.groups.size() > Pending) {
        lane.land_copies(lane.groups.front());
        lane.groups.erase(lane.groups.begin());
    }
}

// The numbers in the lower and upper half of a word.
template <typename T>
float half_of(uint32_t word, int upper) {
    const auto bits = static_cast<uint16_t>(word >> 16 * upper);
    T number;
    std::memcpy(static_cast<void*>(&number), &bits, sizeof bits);
    return static_cast<float>(number);
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Out {
        float c[4];
    };
    struct In {
        Out c;
        uint32_t a[4], b[2];
    };
    const In mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    const Out result = emulation::exchange<Out>(mine, [](const In(&in)[32], Out(&out)[32]) {
        float left[16][16], right[8][16];  // the second one transposed
        for (int lane = 0; lane < 32; ++lane) {
            const int quad = lane / 4, pair = lane % 4;
            for (int i = 0; i < 8; ++i)
                left[quad + i / 2 % 2 * 8][2 * pair + i % 2 + i / 4 * 8] = half_of<T>(in[lane].a[i / 2], i % 2);
            for (int i = 0; i < 4; ++i) right[quad][2 * pair + i % 2 + i / 2 * 8] = half_of<T>(in[lane].b[i / 2], i % 2);
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const float *x = left[lane / 4 + i / 2 * 8], *y = right[2 * (lane % 4) + i % 2];
                double sum = in[lane].c.c[i];
                for (int k = 0; k < 16; ++k) sum += static_cast<double>(x[k]) * y[k];
                out[lane].c[i] = static_cast<float>(sum);
            }
        }
    });
    std::memcpy(c, result.c, sizeof c);
}

// A lane reads the row that it names when it comes, before the others do: what they have yet to store it must not need.
template <bool Transposed>
void load_tiles(uint32_t (&word)[4], uint32_t address) {
    struct Row {
        uint16_t number[8];
    };
    struct Out {
        uint32_t word[4];
    };
    emulation::check_shared(address, "ldmatrix");
    Row mine;
    std::memcpy(&mine, emulation::shared.begin + address, sizeof mine);
    const Out result = emulation::exchange<Out>(mine, [](const Row(&row)[32], Out(&out)[32]) {
        for (int i = 0; i < 128; ++i) {
            const int lane = i / 4, tile = i % 4, quad = lane / 4, pair = lane % 4;
            const auto number = [&](int n) -> uint32_t {
                return Transposed ? row[8 * tile + 2 * pair + n].number[quad] : row[8 * tile + quad].number[2 * pair + n];
            };
            out[lane].word[tile] = number(0) | number(1) << 16;
        }
    });
    std::memcpy(word, result.word, sizeof word);
}

inline void load_matrices(uint32_t (&word)[4], uint32_t address) { load_tiles<false>(word, address); }
inline void load_matrices_transposed(uint32_t (&word)[4], uint32_t address) { load_tiles<true>(word, address); }

inline float exp2_approximate(float x) {
    const float result = exp2f(x);
    return result < 0x1p-126f ? 0.0f : result;
}

inline float reciprocal_approximate(float x) { return 1.0f / x; }

inline float positive_or_nan(float x) { return x < 0 ? 0.0f : x; }

inline float sqrt_approximate(float x) { return x < 0x1p-126f ? 0.0f : sqrtf(x); }
inline float rsqrt_approximate(float x) { return 1.0f / sqrt_approximate(x); }

inline float fma_saturated(float a, float b, float c) {
    const float result = fmaf(a, b, c);
    return result < 0x1p-126f || std::isnan(result) ? 0.0f : fminf(result, 1.0f);
}

inline void keep_exceeding(float& first, float& second, uint32_t x, uint32_t cut) {
    if (half_of<__half>(x, 0) <= half_of<__half>(cut, 0)) first = -INFINITY;
    if (half_of<__half>(x, 1) <= half_of<__half>(cut, 1)) second = -INFINITY;
}

inline void count_below(float& least, int& count, float key, float limit, float x, float most) {
    if (!(key < limit)) return;
    least = fminf(least, x);
    count += x <= most;
}

}  // namespace nearfar
