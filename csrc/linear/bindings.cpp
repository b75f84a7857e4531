#include <algorithm>
#include <string>

#include "common/binding.h"
#include "common/check.h"
#include "linear/bidirectional_backward.h"
#include "linear/bidirectional_forward.h"
#include "linear/causal_backward.h"
#include "linear/causal_forward.h"

namespace nearfar {
namespace {

int64_t shared_bytes(int64_t width, bool causal) {
    if (causal) return std::max(linear_causal_forward_shared_bytes(width), linear_causal_backward_shared_bytes(width));
    return std::max(linear_bidirectional_forward_shared_bytes(width), linear_bidirectional_backward_shared_bytes(width));
}

// Whether the current device runs the code that was compiled for sm_90a alone.
bool runs_hopper_code() {
    static const bool built = std::string(";" NEARFAR_CUDA_ARCHS ";").find(";90a;") != std::string::npos;
    int device = 0, major = 0;
    NEARFAR_CHECK(cudaGetDevice(&device));
    NEARFAR_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return built && major == 9;
}

void grad_queries(const LinearCausalGradQueries& call, const std::string& feature_map, cudaStream_t stream) {
    const bool hopper = call.width == 64 && runs_hopper_code();
    (hopper ? linear_causal_grad_queries_hopper : linear_causal_grad_queries)(call, feature_map, stream);
}

void grad_keys(const LinearCausalGradKeys& call, const std::string& feature_map, cudaStream_t stream) {
    const bool hopper = call.width == 64 && runs_hopper_code();
    (hopper ? linear_causal_grad_keys_hopper : linear_causal_grad_keys)(call, feature_map, stream);
}

}  // namespace

void bind_linear(py::module_& m) {
    m.def("linear_shared_bytes", &shared_bytes, py::arg("width"), py::arg("causal"),
          "Bytes of shared memory that a block of the linear_causal_ or linear_bidirectional_ kernels takes, at most.");
    bind_kernel(m, "linear_causal_forward", &linear_causal_forward, "Causal linear attention: fills o and inverse.");
    bind_kernel(m, "linear_causal_grad_queries", &grad_queries, "Fills dq and weights.");
    bind_kernel(m, "linear_causal_grad_keys", &grad_keys, "Fills dk and dv.");
    bind_kernel(m, "linear_bidirectional_sums", &linear_bidirectional_sums,
                "Bidirectional linear attention: fills partials and partial_norms, sums over the keys of each piece.");
    bind_kernel(m, "linear_bidirectional_read", &linear_bidirectional_read, "Fills o and inverse.");
    bind_kernel(m, "linear_bidirectional_grad_queries", &linear_bidirectional_grad_queries,
                "Fills dq, and partials and partial_norms with sums over the queries of each piece.");
    bind_kernel(m, "linear_bidirectional_grad_keys", &linear_bidirectional_grad_keys, "Fills dk and dv.");
}

}  // namespace nearfar
