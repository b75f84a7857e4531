#include "device.h"
#include "linear/causal_backward.cu"

EMULATED linear_causal_grad_queries(const nearfar::LinearCausalGradQueries* call, const char* feature_map, int device, bool late_copies,
                             unsigned seed) {
    const auto launch = [&] { nearfar::linear_causal_grad_queries(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED linear_causal_grad_keys(const nearfar::LinearCausalGradKeys* call, const char* feature_map, int device, bool late_copies,
                          unsigned seed) {
    const auto launch = [&] { nearfar::linear_causal_grad_keys(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
