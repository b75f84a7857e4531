// Errors of the CUDA runtime become std::runtime_error, which pybind11 raises as Python's RuntimeError.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace nearfar {

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // Forget it: the next launch's check must report that launch, not this failure again.
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                             ")");
}

}  // namespace nearfar

// Checks a call of the runtime and names it in the message. After a launch: nearfar::check(cudaGetLastError(), "name").
#define NEARFAR_CHECK(call) ::nearfar::check((call), #call)
