// Module nearfar._C. It sees addresses, sizes, strides and streams, never a torch::Tensor: one build serves every
// PyTorch. Arguments are checked by the Python callers, which know the tensors.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "affine/backward.h"
#include "affine/forward.h"
#include "common/check.h"
#include "common/device_guard.h"
#include "common/dtype.h"
#include "common/row_sumsq.h"
#include "diagnostics/geometry.h"
#include "diagnostics/statistics.h"
#include "hadamard/bidirectional.h"
#include "hadamard/causal_backward.h"
#include "hadamard/causal_forward.h"
#include "krause/backward.h"
#include "krause/forward.h"
#include "krause/step.h"
#include "linear/bidirectional_backward.h"
#include "linear/bidirectional_forward.h"
#include "linear/causal_backward.h"
#include "linear/causal_forward.h"
#include "synchronization/synchronization.h"

namespace py = pybind11;

namespace nearfar {
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

// Whether the device runs the code that was compiled for sm_90a alone.
bool runs_hopper_code(int device) {
    static const bool built = [] {
        const auto names = architectures();
        return std::find(names.begin(), names.end(), "90a") != names.end();
    }();
    int major = 0;
    NEARFAR_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return built && major == 9;
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

// A binding that takes what is `fixed` in a kernel's call and returns a launch (tensors, device, stream), made once for many
// calls: reading sizes and strides takes longer than the rest of a launch.
template <typename Tensors, typename... Fixed>
auto made_once(void (*call)(const Tensors&, int, cudaStream_t, Fixed...)) {
    return [call](std::decay_t<Fixed>... fixed) {
        return py::cpp_function([=](const Tensors& tensors, int device, uintptr_t stream) {
            const DeviceGuard guard(device);
            call(tensors, device, reinterpret_cast<cudaStream_t>(stream), fixed...);
        });
    };
}

}  // namespace
}  // namespace nearfar

PYBIND11_MODULE(_C, m) {
    using namespace nearfar;
    m.doc() = "nearfar's CUDA kernels, called with raw device addresses. Use nearfar's Python functions instead. "
              "Those that take no tensors make a launch for many calls, a function (tensors, device, stream).";

    m.def("version", [] { return NEARFAR_VERSION; }, "The nearfar version that this module was built from.");
    m.def("cuda_runtime_version", &cuda_runtime_version, "The CUDA runtime linked in, as 1000 * major + 10 * minor.");
    m.def("architectures", &architectures, "The GPU architectures compiled for, such as ['80', '90a'].");
    m.def("devices", &devices, "A dict of properties for each visible CUDA device; empty without a device or driver.");

    m.def(
        "row_sumsq",
        [](uintptr_t x, uintptr_t out, const std::string& dtype, const std::array<int64_t, 4>& sizes,
           const std::array<int64_t, 3>& strides, int device, uintptr_t stream) {
            const DeviceGuard guard(device);
            row_sumsq(reinterpret_cast<const void*>(x), reinterpret_cast<float*>(out), parse_dtype(dtype), sizes,
                      strides, reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("x"), py::arg("out"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("device"),
        py::arg("stream"),
        "Writes the float32 sum of squares of each row of x (B, H, N, D), last stride 1, to contiguous out (B, H, N).");

    m.attr("KRAUSE_WINDOW") = kKrauseWindow;
    m.attr("KRAUSE_TILE") = kKrauseTile;
    m.def("krause_forward_shared_bytes", &krause_forward_shared_bytes, py::arg("width"), py::arg("window"),
          "Bytes of shared memory that a block of krause_forward takes.");
    m.def(
        "krause_forward",
        made_once(+[](const std::array<uintptr_t, 8>& tensors, int, cudaStream_t stream, const std::string& dtype,
                      const std::array<int64_t, 6>& sizes, const std::array<std::array<int64_t, 3>, 4>& strides,
                      int64_t sigma_stride, int64_t left, int64_t right, int64_t top_k) {
            const auto [q, k, v, sigma, token_bounds, o, lse, bits] = tensors;
            const auto& [q_strides, k_strides, v_strides, o_strides] = strides;
            const auto [batches, heads, kv_heads, num_queries, num_keys, width] = sizes;
            KrauseForward call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                               reinterpret_cast<const void*>(v), reinterpret_cast<const float*>(sigma),
                               reinterpret_cast<const int32_t*>(token_bounds), reinterpret_cast<void*>(o),
                               reinterpret_cast<float*>(lse), reinterpret_cast<int32_t*>(bits),
                               q_strides, k_strides, v_strides, o_strides, sigma_stride,
                               batches, heads, kv_heads, num_queries, num_keys, width, left, right, top_k};
            krause_forward(call, parse_dtype(dtype), stream);
        }),
        py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("sigma_stride"), py::arg("left"), py::arg("right"),
        py::arg("top_k"),
        "Krause attention: fills o, lse and, with top_k > 0, bits. tensors: q, k, v, sigma, token_bounds, o, lse, bits; "
        "strides: of q, k, v, o; sizes: B, Hq, Hkv, N, M, D. More in csrc/krause/forward.h.");

    m.def("krause_backward_shared_bytes", &krause_backward_shared_bytes, py::arg("width"),
          "Bytes of shared memory that a block of krause_backward takes.");
    m.def(
        "krause_backward",
        made_once(+[](const std::array<uintptr_t, 14>& tensors, int, cudaStream_t stream, const std::string& dtype,
                      const std::array<int64_t, 6>& sizes, const std::array<std::array<int64_t, 3>, 8>& strides,
                      int64_t sigma_stride, int64_t left, int64_t right) {
            const auto [q, k, v, o, grad_o, sigma, lse, bits, token_bounds, dq, dk, dv, dsigma, partials] = tensors;
            const auto& [q_strides, k_strides, v_strides, o_strides, grad_o_strides, dq_strides, dk_strides, dv_strides] =
                strides;
            const auto [batches, heads, kv_heads, num_queries, num_keys, width] = sizes;
            KrauseBackward call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                                reinterpret_cast<const void*>(v), reinterpret_cast<const void*>(o),
                                reinterpret_cast<const void*>(grad_o), reinterpret_cast<const float*>(sigma),
                                reinterpret_cast<const float*>(lse), reinterpret_cast<const int32_t*>(bits),
                                reinterpret_cast<const int32_t*>(token_bounds), reinterpret_cast<void*>(dq),
                                reinterpret_cast<void*>(dk), reinterpret_cast<void*>(dv),
                                reinterpret_cast<float*>(dsigma), reinterpret_cast<float*>(partials),
                                q_strides, k_strides, v_strides, o_strides, grad_o_strides, dq_strides, dk_strides,
                                dv_strides, sigma_stride, batches, heads, kv_heads, num_queries, num_keys, width, left,
                                right};
            krause_backward(call, parse_dtype(dtype), stream);
        }),
        py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("sigma_stride"), py::arg("left"), py::arg("right"),
        "Its gradients. tensors: q, k, v, o, do, sigma, lse, bits, token_bounds, dq, dk, dv, dsigma, "
        "workspace; strides: of q, k, v, o, do, dq, dk, dv. More in csrc/krause/backward.h.");

    m.attr("KRAUSE_STEP_WINDOW") = kKrauseStepWindow;
    m.def(
        "krause_step",
        [](const std::array<uintptr_t, 8>& tensors, const std::string& dtype, const std::array<int64_t, 5>& sizes,
           const std::array<std::array<int64_t, 2>, 4>& strides, int64_t sigma_stride, int64_t top_k, int device,
           uintptr_t stream) {
            const DeviceGuard guard(device);
            const auto [q, k, v, cached_k, cached_v, length, sigma, o] = tensors;
            const auto& [q_strides, k_strides, v_strides, o_strides] = strides;
            const auto [batches, heads, kv_heads, window, width] = sizes;
            KrauseStep call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                            reinterpret_cast<const void*>(v), reinterpret_cast<void*>(cached_k),
                            reinterpret_cast<void*>(cached_v), reinterpret_cast<const int32_t*>(length),
                            reinterpret_cast<const float*>(sigma), reinterpret_cast<void*>(o),
                            q_strides, k_strides, v_strides, o_strides, sigma_stride,
                            batches, heads, kv_heads, window, width, top_k};
            krause_step(call, parse_dtype(dtype), reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("tensors"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("sigma_stride"), py::arg("top_k"),
        py::arg("device"), py::arg("stream"),
        "A decoding step of Krause attention: fills o and a slot of the cache. tensors: q, k, v, cached k and v, length, "
        "sigma, o; strides: of q, k, v, o; sizes: B, Hq, Hkv, W, D. More in csrc/krause/step.h.");

    m.def("linear_shared_bytes",
          [](int64_t width, bool causal) {
              return causal ? std::max(linear_causal_forward_shared_bytes(width), linear_causal_backward_shared_bytes(width))
                            : std::max(linear_bidirectional_forward_shared_bytes(width), linear_bidirectional_backward_shared_bytes(width));
          },
          py::arg("width"), py::arg("causal"),
          "Bytes of shared memory that a block of the linear_ kernels takes, at most; of the linear_bidirectional_ ones if not causal.");
    m.def(
        "linear_causal_forward",
        made_once(+[](const std::array<uintptr_t, 8>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 7>& sizes, const std::array<std::array<int64_t, 3>, 4>& strides, double eps) {
            const auto [q, k, v, states, norms, o, inverse, pieces] = tensors;
            const auto& [q_strides, k_strides, v_strides, o_strides] = strides;
            const auto [batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length] = sizes;
            LinearCausalForward call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                               reinterpret_cast<const void*>(v), reinterpret_cast<const float*>(states),
                               reinterpret_cast<const float*>(norms), reinterpret_cast<void*>(o),
                               reinterpret_cast<float*>(inverse), reinterpret_cast<const int32_t*>(pieces),
                               q_strides, k_strides, v_strides, o_strides,
                               batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, eps};
            linear_causal_forward(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"), py::arg("eps"),
        "Causal linear attention: fills o and inverse. tensors: q, k, v, states, norms, o, inverse, pieces; strides: of q, k, "
        "v, o; sizes: B, Hq, Hkv, N, D, pieces, their length. More in csrc/linear/causal_forward.h.");
    m.def(
        "linear_causal_grad_queries",
        made_once(+[](const std::array<uintptr_t, 10>& tensors, int device, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 7>& sizes, const std::array<std::array<int64_t, 3>, 5>& strides) {
            const auto [q, k, v, grad_o, inverse, states, norms, dq, weights, pieces] = tensors;
            const auto& [q_strides, k_strides, v_strides, grad_o_strides, dq_strides] = strides;
            const auto [batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length] = sizes;
            LinearCausalGradQueries call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                                   reinterpret_cast<const void*>(v), reinterpret_cast<const void*>(grad_o),
                                   reinterpret_cast<const float*>(inverse),
                                   reinterpret_cast<const float*>(states), reinterpret_cast<const float*>(norms),
                                   reinterpret_cast<void*>(dq), reinterpret_cast<float*>(weights),
                                   reinterpret_cast<const int32_t*>(pieces),
                                   q_strides, k_strides, v_strides, grad_o_strides, dq_strides,
                                   batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length};
            const bool hopper = width == 64 && runs_hopper_code(device);
            const auto launch = hopper ? linear_causal_grad_queries_hopper : linear_causal_grad_queries;
            launch(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"),
        "Fills dq and weights. tensors: q, k, v, do, inverse, states, norms, dq, weights, pieces; strides: of q, k, v, do, "
        "dq; sizes as for linear_causal_forward. More in csrc/linear/causal_backward.h.");
    m.def(
        "linear_causal_grad_keys",
        made_once(+[](const std::array<uintptr_t, 11>& tensors, int device, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 7>& sizes, const std::array<std::array<int64_t, 3>, 6>& strides) {
            const auto [k, v, q, grad_o, inverse, weights, states, norms, dk, dv, pieces] = tensors;
            const auto& [k_strides, v_strides, q_strides, grad_o_strides, dk_strides, dv_strides] = strides;
            const auto [batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length] = sizes;
            LinearCausalGradKeys call{reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v),
                                reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(grad_o),
                                reinterpret_cast<const float*>(inverse), reinterpret_cast<const float*>(weights),
                                reinterpret_cast<const float*>(states), reinterpret_cast<const float*>(norms),
                                reinterpret_cast<void*>(dk), reinterpret_cast<void*>(dv),
                                reinterpret_cast<const int32_t*>(pieces),
                                k_strides, v_strides, q_strides, grad_o_strides, dk_strides, dv_strides,
                                batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length};
            const bool hopper = width == 64 && runs_hopper_code(device);
            const auto launch = hopper ? linear_causal_grad_keys_hopper : linear_causal_grad_keys;
            launch(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"),
        "Fills dk and dv. tensors: k, v, q, do, inverse, weights, states, norms, dk, dv, pieces; strides: of k, v, q, do, dk, "
        "dv; sizes as for linear_causal_forward. More in csrc/linear/causal_backward.h.");
    m.def(
        "linear_bidirectional_sums",
        made_once(+[](const std::array<uintptr_t, 5>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 8>& sizes, const std::array<std::array<int64_t, 3>, 2>& strides) {
            const auto [k, v, partials, partial_norms, pieces] = tensors;
            const auto& [k_strides, v_strides] = strides;
            const auto [batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states] = sizes;
            LinearBidirectionalSums call{reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v),
                                reinterpret_cast<float*>(partials), reinterpret_cast<float*>(partial_norms),
                                reinterpret_cast<const int32_t*>(pieces), k_strides, v_strides,
                                batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states};
            linear_bidirectional_sums(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"),
        "Bidirectional linear attention: fills sums over the keys of each piece. tensors: k, v, partials, partial_norms, "
        "pieces; strides: of k and v; sizes: B, Hq, Hkv, tokens, D, pieces, their length, states. More in "
        "csrc/linear/bidirectional_forward.h.");
    m.def(
        "linear_bidirectional_read",
        made_once(+[](const std::array<uintptr_t, 6>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 8>& sizes, const std::array<std::array<int64_t, 3>, 2>& strides, double eps) {
            const auto [q, states, norms, o, inverse, pieces] = tensors;
            const auto& [q_strides, o_strides] = strides;
            const auto [batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states] = sizes;
            LinearBidirectionalRead call{reinterpret_cast<const void*>(q), reinterpret_cast<const float*>(states),
                                reinterpret_cast<const float*>(norms), reinterpret_cast<void*>(o),
                                reinterpret_cast<float*>(inverse), reinterpret_cast<const int32_t*>(pieces),
                                q_strides, o_strides,
                                batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states, eps};
            linear_bidirectional_read(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"), py::arg("eps"),
        "Fills o and inverse. tensors: q, states, norms, o, inverse, pieces; strides: of q and o; sizes as for "
        "linear_bidirectional_sums. More in csrc/linear/bidirectional_forward.h.");
    m.def(
        "linear_bidirectional_grad_queries",
        made_once(+[](const std::array<uintptr_t, 9>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 8>& sizes, const std::array<std::array<int64_t, 3>, 3>& strides) {
            const auto [q, grad_o, inverse, states, norms, dq, partials, partial_norms, pieces] = tensors;
            const auto& [q_strides, grad_o_strides, dq_strides] = strides;
            const auto [batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states] = sizes;
            LinearBidirectionalGradQueries call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(grad_o),
                                       reinterpret_cast<const float*>(inverse), reinterpret_cast<const float*>(states),
                                       reinterpret_cast<const float*>(norms), reinterpret_cast<void*>(dq),
                                       reinterpret_cast<float*>(partials), reinterpret_cast<float*>(partial_norms),
                                       reinterpret_cast<const int32_t*>(pieces), q_strides, grad_o_strides, dq_strides,
                                       batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states};
            linear_bidirectional_grad_queries(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"),
        "Fills dq and sums over the queries of each piece. tensors: q, do, inverse, states, norms, dq, partials, "
        "partial_norms, pieces; strides: of q, do, dq; sizes as for linear_bidirectional_sums. More in csrc/linear/bidirectional_backward.h.");
    m.def(
        "linear_bidirectional_grad_keys",
        made_once(+[](const std::array<uintptr_t, 7>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 8>& sizes, const std::array<std::array<int64_t, 3>, 4>& strides) {
            const auto [k, v, states, norms, dk, dv, pieces] = tensors;
            const auto& [k_strides, v_strides, dk_strides, dv_strides] = strides;
            const auto [batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states] = sizes;
            LinearBidirectionalGradKeys call{reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v),
                                    reinterpret_cast<const float*>(states), reinterpret_cast<const float*>(norms),
                                    reinterpret_cast<void*>(dk), reinterpret_cast<void*>(dv),
                                    reinterpret_cast<const int32_t*>(pieces), k_strides, v_strides, dk_strides, dv_strides,
                                    batches, heads, kv_heads, num_tokens, width, num_pieces, piece_length, num_states};
            linear_bidirectional_grad_keys(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"),
        "Fills dk and dv. tensors: k, v, states, norms, dk, dv, pieces; strides: of k, v, dk, dv; sizes as for "
        "linear_bidirectional_sums. More in csrc/linear/bidirectional_backward.h.");

    m.def("hadamard_shared_bytes",
          [] { return std::max(hadamard_causal_forward_shared_bytes(), hadamard_causal_backward_shared_bytes()); },
          "Bytes of shared memory that a block of the hadamard_ kernels takes, at most.");
    m.def(
        "hadamard_causal_forward",
        made_once(+[](const std::array<uintptr_t, 10>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 6>& sizes, const std::array<std::array<int64_t, 3>, 6>& strides, double eps) {
            const auto [q1, q2, k1, k2, v, states, norms, o, inverse, pieces] = tensors;
            const auto& [q1_strides, q2_strides, k1_strides, k2_strides, v_strides, o_strides] = strides;
            const auto [batches, heads, kv_heads, num_tokens, num_pieces, piece_length] = sizes;
            HadamardCausalForward call{reinterpret_cast<const void*>(q1), reinterpret_cast<const void*>(q2),
                                 reinterpret_cast<const void*>(k1), reinterpret_cast<const void*>(k2),
                                 reinterpret_cast<const void*>(v), reinterpret_cast<const float*>(states),
                                 reinterpret_cast<const float*>(norms), reinterpret_cast<void*>(o),
                                 reinterpret_cast<float*>(inverse), reinterpret_cast<const int32_t*>(pieces),
                                 q1_strides, q2_strides, k1_strides, k2_strides, v_strides, o_strides,
                                 batches, heads, kv_heads, num_tokens, num_pieces, piece_length, eps};
            hadamard_causal_forward(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"), py::arg("eps"),
        "Causal Hadamard attention: fills o and inverse. tensors: q1, q2, k1, k2, v, states, norms, o, inverse, pieces; "
        "strides: of q1, q2, k1, k2, v, o; sizes: B, Hq, Hkv, N, pieces, their length. More in csrc/hadamard/causal_forward.h.");
    m.def(
        "hadamard_causal_grad_queries",
        made_once(+[](const std::array<uintptr_t, 13>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 6>& sizes, const std::array<std::array<int64_t, 3>, 8>& strides) {
            const auto [q1, q2, k1, k2, v, grad_o, inverse, states, norms, dq1, dq2, weights, pieces] = tensors;
            const auto [batches, heads, kv_heads, num_tokens, num_pieces, piece_length] = sizes;
            HadamardCausalGradQueries call{reinterpret_cast<const void*>(q1), reinterpret_cast<const void*>(q2),
                                     reinterpret_cast<const void*>(k1), reinterpret_cast<const void*>(k2),
                                     reinterpret_cast<const void*>(v), reinterpret_cast<const void*>(grad_o),
                                     reinterpret_cast<const float*>(inverse), reinterpret_cast<const float*>(states),
                                     reinterpret_cast<const float*>(norms), reinterpret_cast<void*>(dq1),
                                     reinterpret_cast<void*>(dq2), reinterpret_cast<float*>(weights),
                                     reinterpret_cast<const int32_t*>(pieces),
                                     strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], strides[6],
                                     strides[7], batches, heads, kv_heads, num_tokens, num_pieces, piece_length};
            hadamard_causal_grad_queries(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"),
        "Fills dq1, dq2 and weights. tensors: q1, q2, k1, k2, v, do, inverse, states, norms, dq1, dq2, weights, pieces; "
        "strides: of q1, q2, k1, k2, v, do, dq1, dq2; sizes as for hadamard_causal_forward. More in csrc/hadamard/causal_backward.h.");
    m.def(
        "hadamard_causal_grad_keys",
        made_once(+[](const std::array<uintptr_t, 14>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 6>& sizes, const std::array<std::array<int64_t, 3>, 9>& strides) {
            const auto [k1, k2, v, q1, q2, grad_o, inverse, weights, states, norms, dk1, dk2, dv, pieces] = tensors;
            const auto [batches, heads, kv_heads, num_tokens, num_pieces, piece_length] = sizes;
            HadamardCausalGradKeys call{reinterpret_cast<const void*>(k1), reinterpret_cast<const void*>(k2),
                                  reinterpret_cast<const void*>(v), reinterpret_cast<const void*>(q1),
                                  reinterpret_cast<const void*>(q2), reinterpret_cast<const void*>(grad_o),
                                  reinterpret_cast<const float*>(inverse), reinterpret_cast<const float*>(weights),
                                  reinterpret_cast<const float*>(states), reinterpret_cast<const float*>(norms),
                                  reinterpret_cast<void*>(dk1), reinterpret_cast<void*>(dk2), reinterpret_cast<void*>(dv),
                                  reinterpret_cast<const int32_t*>(pieces),
                                  strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], strides[6],
                                  strides[7], strides[8], batches, heads, kv_heads, num_tokens, num_pieces, piece_length};
            hadamard_causal_grad_keys(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"),
        "Fills dk1, dk2 and dv. tensors: k1, k2, v, q1, q2, do, inverse, weights, states, norms, dk1, dk2, dv, pieces; "
        "strides: of k1, k2, v, q1, q2, do, dk1, dk2, dv; sizes as for hadamard_causal_forward. More in csrc/hadamard/causal_backward.h.");

    m.attr("DIAGNOSTICS_TILE") = kDiagnosticsTile;
    m.def(
        "statistics",
        [](const std::array<uintptr_t, 8>& tensors, const std::string& dtype, const std::array<int64_t, 6>& sizes,
           const std::array<std::array<int64_t, 3>, 2>& strides, int64_t left, int64_t right, double scale, int device,
           uintptr_t stream) {
            const DeviceGuard guard(device);
            const auto [q, k, lse, entropy, max_weight, max_key, mass, levels] = tensors;
            const auto& [q_strides, k_strides] = strides;
            const auto [batches, heads, kv_heads, num_queries, num_keys, width] = sizes;
            Statistics call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                            reinterpret_cast<float*>(lse), reinterpret_cast<float*>(entropy),
                            reinterpret_cast<float*>(max_weight), reinterpret_cast<int64_t*>(max_key),
                            reinterpret_cast<float*>(mass), reinterpret_cast<float*>(levels), q_strides, k_strides,
                            batches, heads, kv_heads, num_queries, num_keys, width, left, right, scale};
            statistics(call, parse_dtype(dtype), reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("tensors"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("left"), py::arg("right"),
        py::arg("scale"), py::arg("device"), py::arg("stream"),
        "Attention statistics. tensors: q, k, lse, entropy, max_weight, max_key, mass, levels; sizes: B, Hq, Hkv, N, M, D; "
        "strides: of q and k. More in csrc/diagnostics/statistics.h.");

    const auto define_geometry = [&](const char* name, auto kernel, const char* description) {
        m.def(
            name,
            [kernel](const std::array<uintptr_t, 13>& tensors, const std::string& dtype, const std::array<int64_t, 7>& sizes,
                     const std::array<std::array<int64_t, 3>, 3>& strides, int64_t left, int64_t right, double scale,
                     int device, uintptr_t stream) {
                const DeviceGuard guard(device);
                const auto [q, k, v, scores, chosen, s, shift, farthest, excess, squares, precision, recall, f_score] =
                    tensors;
                const auto& [q_strides, k_strides, v_strides] = strides;
                const auto [batches, heads, kv_heads, num_queries, num_keys, width, top_n] = sizes;
                Geometry call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                              reinterpret_cast<const void*>(v), q_strides, k_strides, v_strides,
                              batches, heads, kv_heads, num_queries, num_keys, width, left, right, top_n, scale,
                              reinterpret_cast<float*>(scores), reinterpret_cast<int32_t*>(chosen),
                              reinterpret_cast<const void*>(s), reinterpret_cast<const float*>(shift),
                              reinterpret_cast<const float*>(farthest), reinterpret_cast<const float*>(excess),
                              reinterpret_cast<const float*>(squares), reinterpret_cast<float*>(precision),
                              reinterpret_cast<float*>(recall), reinterpret_cast<float*>(f_score)};
                kernel(call, parse_dtype(dtype), reinterpret_cast<cudaStream_t>(stream));
            },
            py::arg("tensors"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("left"), py::arg("right"),
            py::arg("scale"), py::arg("device"), py::arg("stream"), description);
    };
    define_geometry("geometry_select", &geometry_select,
                    "Fills scores and chosen. tensors: q, k, v, scores, chosen, s, shift, farthest, excess, squares, "
                    "precision, recall, f_score; sizes: B, Hq, Hkv, N, M, D, top_n; strides: of q, k and v. More in "
                    "csrc/diagnostics/geometry.h.");
    define_geometry("geometry_separate", &geometry_separate, "Fills precision, recall and f_score; arguments as above.");

    m.attr("HADAMARD_BIDIRECTIONAL_WIDTH") = kBidirectionalWidth;
    m.attr("HADAMARD_BIDIRECTIONAL_CHUNK") = kBidirectionalChunk;
    m.def(
        "hadamard_bidirectional_accumulate",
        made_once(+[](const std::array<uintptr_t, 11>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 7>& sizes, const std::array<std::array<int64_t, 3>, 3>& strides) {
            const auto [outer, inner, y, factors, weights, partials, partial_norms, outer_tiles, inner_tiles,
                        weighted_tiles, counter] = tensors;
            const auto& [outer_strides, inner_strides, y_strides] = strides;
            const auto [batches, heads, state_heads, num_tokens, width, num_pieces, piece_length] = sizes;
            HadamardBidirectionalFeatures features{reinterpret_cast<const void*>(outer), reinterpret_cast<const void*>(inner),
                                      reinterpret_cast<const float*>(factors), reinterpret_cast<const float*>(weights),
                                      reinterpret_cast<void*>(outer_tiles), reinterpret_cast<void*>(weighted_tiles),
                                      reinterpret_cast<void*>(inner_tiles), outer_strides, inner_strides,
                                      batches, heads, num_tokens};
            HadamardBidirectionalAccumulate call{
                reinterpret_cast<const void*>(outer_tiles),
                reinterpret_cast<const void*>(weighted_tiles == 0 ? outer_tiles : weighted_tiles),
                reinterpret_cast<const void*>(inner_tiles), reinterpret_cast<const void*>(y),
                reinterpret_cast<float*>(partials), reinterpret_cast<float*>(partial_norms),
                reinterpret_cast<int32_t*>(counter), y_strides,
                batches, heads, state_heads, num_tokens, width, num_pieces, piece_length};
            hadamard_bidirectional_features(features, feature_map, stream);
            hadamard_bidirectional_accumulate(call, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"),
        "Launches hadamard_bidirectional_features and hadamard_bidirectional_accumulate. tensors: outer, inner, y, factors, weights, partials, "
        "partial_norms, outer_tiles, inner_tiles, weighted_tiles (with factors or weights), counter; strides: of outer, inner, "
        "y; sizes: B, H, Hs, N, Dv, pieces, their length. More in csrc/hadamard/bidirectional.h.");
    m.def(
        "hadamard_bidirectional_read",
        made_once(+[](const std::array<uintptr_t, 8>& tensors, int, cudaStream_t stream, const std::string& feature_map,
                      const std::array<int64_t, 5>& sizes, const std::array<std::array<int64_t, 3>, 3>& strides, double eps) {
            const auto [outer, inner, states, norms, out, inverse, counter, norm_tiles] = tensors;
            const auto& [outer_strides, inner_strides, out_strides] = strides;
            const auto [batches, heads, state_heads, num_tokens, width] = sizes;
            HadamardBidirectionalRead call{reinterpret_cast<const void*>(outer), reinterpret_cast<const void*>(inner),
                              reinterpret_cast<const void*>(states), reinterpret_cast<const float*>(norms),
                              reinterpret_cast<void*>(out), reinterpret_cast<float*>(inverse),
                              reinterpret_cast<int32_t*>(counter), reinterpret_cast<void*>(norm_tiles),
                              outer_strides, inner_strides, out_strides,
                              batches, heads, state_heads, num_tokens, width, eps};
            hadamard_bidirectional_read(call, feature_map, stream);
        }),
        py::arg("feature_map"), py::arg("sizes"), py::arg("strides"), py::arg("eps"),
        "Launches hadamard_bidirectional_read. tensors: outer, inner, states, norms, out, inverse or null, counter, norm_tiles; "
        "strides: of outer, inner, out; sizes: B, H, Hs, N, Dv. More in csrc/hadamard/bidirectional.h.");

    m.attr("AFFINE_CHUNK") = kAffineChunk;
    m.def(
        "affine_forward",
        made_once(+[](const std::array<uintptr_t, 11>& tensors, int, cudaStream_t stream, const std::string& dtype,
                      const std::array<int64_t, 6>& sizes, const std::array<std::array<int64_t, 3>, 4>& strides, int64_t right,
                      double scale) {
            const auto [q, k, v, alpha, beta, sink, sums, o, u, lse, counter] = tensors;
            const auto& [q_strides, k_strides, v_strides, o_strides] = strides;
            const auto [batches, heads, kv_heads, num_queries, num_keys, width] = sizes;
            AffineForward call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                                reinterpret_cast<const void*>(v), reinterpret_cast<const float*>(alpha),
                                reinterpret_cast<const float*>(beta), reinterpret_cast<const float*>(sink),
                                reinterpret_cast<const float*>(sums), reinterpret_cast<void*>(o),
                                reinterpret_cast<void*>(u), reinterpret_cast<float*>(lse),
                                reinterpret_cast<int32_t*>(counter),
                                q_strides, k_strides, v_strides, o_strides,
                                batches, heads, kv_heads, num_queries, num_keys, width, right, scale};
            affine_forward(call, parse_dtype(dtype), stream);
        }),
        py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("right"), py::arg("scale"),
        "Softmax and affine attention: fills o, u and lse. "
        "tensors: q, k, v, alpha, beta, sink, sums, o, u, lse, counter; strides: of q, k, v, o; "
        "sizes: B, Hq, Hkv, N, M, D. More in csrc/affine/forward.h.");

    m.attr("AFFINE_TERMS") = kAffineTerms;
    m.def(
        "affine_backward",
        made_once(+[](const std::array<uintptr_t, 16>& tensors, int, cudaStream_t stream, const std::string& dtype,
                      const std::array<int64_t, 6>& sizes, const std::array<std::array<int64_t, 3>, 8>& strides, int64_t right,
                      double scale) {
            const auto [q, k, v, u, grad_o, alpha, beta, sums, lse, dq, dk, dv, m, dbeta, terms, counters] = tensors;
            const auto& [q_strides, k_strides, v_strides, u_strides, grad_o_strides, dq_strides, dk_strides, dv_strides] =
                strides;
            const auto [batches, heads, kv_heads, num_queries, num_keys, width] = sizes;
            AffineBackward call{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k),
                                 reinterpret_cast<const void*>(v), reinterpret_cast<const void*>(u),
                                 reinterpret_cast<const void*>(grad_o), reinterpret_cast<const float*>(alpha),
                                 reinterpret_cast<const float*>(beta), reinterpret_cast<const float*>(sums),
                                 reinterpret_cast<const float*>(lse), reinterpret_cast<void*>(dq),
                                 reinterpret_cast<void*>(dk), reinterpret_cast<void*>(dv), reinterpret_cast<float*>(m),
                                 reinterpret_cast<float*>(dbeta), reinterpret_cast<float*>(terms),
                                 reinterpret_cast<int32_t*>(counters),
                                 q_strides, k_strides, v_strides, u_strides, grad_o_strides,
                                 dq_strides, dk_strides, dv_strides,
                                 batches, heads, kv_heads, num_queries, num_keys, width, right, scale};
            affine_backward(call, parse_dtype(dtype), stream);
        }),
        py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("right"), py::arg("scale"),
        "Gradients of affine_forward. tensors: q, k, v, u, do, alpha, beta, sums, lse, dq, dk, dv, "
        "m, dbeta, terms, counters; strides: of q, k, v, u, do, dq, dk, dv. More in csrc/affine/backward.h.");

    m.attr("SYNCHRONIZATION_ROWS") = kSynchronizationRows;
    m.attr("SYNCHRONIZATION_GRAD_ROWS") = kSynchronizationGradRows;
    m.attr("SYNCHRONIZATION_MEMBERS") = kSynchronizationMembers;
    m.def(
        "synchronization_forward",
        made_once(+[](const std::array<uintptr_t, 10>& tensors, int, cudaStream_t stream, const std::string& dtype,
                      const std::array<int64_t, 3>& sizes, const std::array<std::array<int64_t, 3>, 3>& strides,
                      int64_t bandwidth_stride, bool causal) {
            const auto [omega, v, squares, c, bandwidth, o, total, lists, counts, counter] = tensors;
            const auto& [omega_strides, v_strides, o_strides] = strides;
            const auto [batches, heads, num_tokens] = sizes;
            SynchronizationForward call{reinterpret_cast<const void*>(omega), reinterpret_cast<const void*>(v),
                                        reinterpret_cast<const float*>(squares), reinterpret_cast<const float*>(c),
                                        reinterpret_cast<const float*>(bandwidth), reinterpret_cast<void*>(o),
                                        reinterpret_cast<float*>(total), reinterpret_cast<const int32_t*>(lists),
                                        reinterpret_cast<const int32_t*>(counts), reinterpret_cast<int32_t*>(counter),
                                        omega_strides, v_strides, o_strides,
                                        batches, heads, num_tokens, bandwidth_stride, causal};
            synchronization_forward(call, parse_dtype(dtype), stream);
        }),
        py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("bandwidth_stride"), py::arg("causal"),
        "Synchronization attention: fills o and total. tensors: omega, v, squares, c, bandwidth, o, "
        "total, lists, counts, counter; strides: of omega, v, o; sizes: B, H, N. More in csrc/synchronization/synchronization.h.");
    m.def(
        "synchronization_backward",
        made_once(+[](const std::array<uintptr_t, 15>& tensors, int, cudaStream_t stream, const std::string& dtype,
                      const std::array<int64_t, 3>& sizes, const std::array<std::array<int64_t, 3>, 5>& strides,
                      int64_t bandwidth_stride, double grad_floor) {
            const auto [omega, v, squares, c, bandwidth, grad_o, inverse, shift, dw, dv, dalpha, dradius, lists, counts,
                        counter] = tensors;
            const auto& [omega_strides, v_strides, grad_o_strides, dw_strides, dv_strides] = strides;
            const auto [batches, heads, num_tokens] = sizes;
            SynchronizationBackward call{reinterpret_cast<const void*>(omega), reinterpret_cast<const void*>(v),
                                         reinterpret_cast<const float*>(squares), reinterpret_cast<const float*>(c),
                                         reinterpret_cast<const float*>(bandwidth), reinterpret_cast<const void*>(grad_o),
                                         reinterpret_cast<const float*>(inverse), reinterpret_cast<const float*>(shift),
                                         reinterpret_cast<void*>(dw), reinterpret_cast<void*>(dv),
                                         reinterpret_cast<float*>(dalpha), reinterpret_cast<float*>(dradius),
                                         reinterpret_cast<const int32_t*>(lists), reinterpret_cast<const int32_t*>(counts),
                                         reinterpret_cast<int32_t*>(counter),
                                         omega_strides, v_strides, grad_o_strides, dw_strides, dv_strides,
                                         batches, heads, num_tokens, bandwidth_stride, grad_floor};
            synchronization_backward(call, parse_dtype(dtype), stream);
        }),
        py::arg("dtype"), py::arg("sizes"), py::arg("strides"), py::arg("bandwidth_stride"), py::arg("grad_floor"),
        "A launch of its gradients for orders by head, which fills dw, dv, dalpha, dradius. tensors: omega, v, squares, c, "
        "bandwidth, do, inverse, shift, dw, dv, dalpha, dradius, lists, counts, counter; strides: of omega, v, do, dw, dv.");
}
