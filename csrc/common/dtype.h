// The element types that tensors come in, and the way from the type known at run time to a template argument.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

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

}  // namespace nearfar
