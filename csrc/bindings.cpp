// Module nearfar._C. It sees addresses, sizes, strides and streams, never a torch::Tensor: one build serves every
// PyTorch. The Python callers, which have the tensors, check the arguments.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "common/binding.h"
#include "common/check.h"
#include "common/row_sumsq.h"

namespace nearfar {

void bind_affine(py::module_& m);
void bind_diagnostics(py::module_& m);
void bind_hadamard(py::module_& m);
void bind_krause(py::module_& m);
void bind_linear(py::module_& m);
void bind_synchronization(py::module_& m);

namespace {

std::vector<std::string> architectures() {
    std::vector<std::string> names;
    std::string name;
    for (const char c : std::string(NEARFAR_CUDA_ARCHS ";")) {
        if (c != ';') name += c;
        else names.push_back(std::exchange(name, {}));
    }
    return names;
}

int cuda_runtime_version() {
    int version = 0;
    NEARFAR_CHECK(cudaRuntimeGetVersion(&version));
    return version;
}

py::list devices() {
    py::list result;
    int driver = 0;
    NEARFAR_CHECK(cudaDriverGetVersion(&driver));
    if (driver == 0) return result;  // No driver. One that is too old for this build is an error, raised below.

    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice) {
        cudaGetLastError();  // As in check(): not an error here, nor for the next launch.
        return result;
    }
    check(status, "cudaGetDeviceCount");
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties;
        NEARFAR_CHECK(cudaGetDeviceProperties(&properties, device));
        py::dict entry;
        entry["name"] = properties.name;
        entry["capability"] = py::make_tuple(properties.major, properties.minor);
        entry["multiprocessors"] = properties.multiProcessorCount;
        entry["total_memory"] = properties.totalGlobalMem;
        entry["l2_bytes"] = properties.l2CacheSize;
        entry["shared_memory_per_block_optin"] = properties.sharedMemPerBlockOptin;
        result.append(entry);
    }
    return result;
}

}  // namespace
}  // namespace nearfar

PYBIND11_MODULE(_C, m) {
    using namespace nearfar;
    m.doc() = "nearfar's CUDA kernels, called with raw device addresses. Use nearfar's Python functions instead. "
              "kernel(variant, tensors, **others) plans a launch, a function (addresses, device, stream): the addresses are "
              "those of `tensors`, by their names and in their order, 0 for none. variant is a dtype or a feature map. What "
              "the arguments mean is in the kernel's header in csrc/.";
    m.attr("ARGUMENTS") = py::dict();  // {kernel: {name: a value of its kind, None for a tensor}}

    m.def("version", [] { return NEARFAR_VERSION; }, "The nearfar version that this module was built from.");
    m.def("cuda_runtime_version", &cuda_runtime_version, "The CUDA runtime linked in, as 1000 * major + 10 * minor.");
    m.def("architectures", &architectures, "The GPU architectures compiled for, such as ['80', '90a'].");
    m.def("devices", &devices, "A dict of properties for each visible CUDA device; empty without a device or driver.");

    bind_kernel(m, "row_sumsq", &row_sumsq, "The sum of squares of each row: fills out.");
    bind_affine(m);
    bind_diagnostics(m);
    bind_hadamard(m);
    bind_krause(m);
    bind_linear(m);
    bind_synchronization(m);
}
