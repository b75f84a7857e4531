// Feature maps of linear attention and their derivatives, as in triton_kernels/linear.py.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "constants.cuh"
#include "mma.cuh"

namespace nearfar {

__device__ __forceinline__ float fast_exp(float x) { return exp2_approximate(x * kLog2E); }

struct Identity {
    __device__ static float value(float x) { return x; }
    __device__ static float grad(float) { return 1.0f; }
};

struct Elu {  // elu(x) + 1
    __device__ static float value(float x) { return x > 0 ? x + 1.0f : fast_exp(x); }
    __device__ static float grad(float x) { return x > 0 ? 1.0f : fast_exp(x); }
};

struct Relu {
    __device__ static float value(float x) { return positive_or_nan(x); }
    __device__ static float grad(float x) { return x > 0 ? 1.0f : positive_or_nan(x); }
};

struct Softplus {
    __device__ static float value(float x) {
        const float small = fast_exp(-fabsf(x));
        // The logarithm of 1 + small forgets small where its series needs three terms only.
        const float series = small * (1.0f - small * (0.5f - small * (1.0f / 3)));
        return fmaxf(x, 0.0f) + (small < 0.01f ? series : __log2f(1.0f + small) * 0.6931471805599453f);
    }
    __device__ static float grad(float x) { return reciprocal_approximate(1.0f + fast_exp(-x)); }
};

struct Exp {
    __device__ static float value(float x) { return fast_exp(x); }
    __device__ static float grad(float x) { return fast_exp(x); }
};

// The features of two numbers in a word, times `factor`.
template <typename Map>
__device__ __forceinline__ uint32_t map_word(uint32_t word, float factor = 1.0f) {
    const float2 x = unpack<__nv_bfloat16>(word);
    return pack<__nv_bfloat16>(Map::value(x.x) * factor, Map::value(x.y) * factor);
}

// Calls `body` with a feature map, by its name in Python.
template <typename Body>
void dispatch_feature_map(const std::string& name, Body&& body) {
    if (name == "identity") return body(Identity());
    if (name == "elu") return body(Elu());
    if (name == "relu") return body(Relu());
    if (name == "softplus") return body(Softplus());
    if (name == "exp") return body(Exp());
    throw std::invalid_argument("there is no feature map " + name);
}

}  // namespace nearfar
