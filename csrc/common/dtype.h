// Element types of tensors, and the dispatch from a run-time type to a template argument.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace nearfar {

enum class DType { kFloat16, kBFloat16, kFloat32 };

inline DType parse_dtype(const std::string& name) {
    if (name == "float16") return DType::kFloat16;
    if (name == "bfloat16") return DType::kBFloat16;
    if (name == "float32") return DType::kFloat32;
    throw std::invalid_argument("dtype must be float16, bfloat16 or float32, not " + name);
}

// Calls `body` with a null `T*` whose type stands for `dtype`.
template <typename Body>
void dispatch_dtype(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::kFloat16: return body(static_cast<__half*>(nullptr));
        case DType::kBFloat16: return body(static_cast<__nv_bfloat16*>(nullptr));
        case DType::kFloat32: return body(static_cast<float*>(nullptr));
    }
}

// Calls `body` with a null `T*` and the head width as an integral constant, for the dtypes and widths that the products of
// mma.cuh and tile.cuh serve.
template <typename Body>
void dispatch_half_and_width(DType dtype, int64_t width, Body&& body) {
    const auto with_width = [&](auto* type) {
        switch (width) {
            case 32: return body(type, std::integral_constant<int, 32>());
            case 64: return body(type, std::integral_constant<int, 64>());
            case 128: return body(type, std::integral_constant<int, 128>());
            default: throw std::invalid_argument("width must be 32, 64 or 128");
        }
    };
    switch (dtype) {
        case DType::kFloat16: return with_width(static_cast<__half*>(nullptr));
        case DType::kBFloat16: return with_width(static_cast<__nv_bfloat16*>(nullptr));
        default: throw std::invalid_argument("dtype must be float16 or bfloat16");
    }
}

}  // namespace nearfar
