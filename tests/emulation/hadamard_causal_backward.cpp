#include "device.h"
#include "hadamard/causal_backward.cu"

EMULATED hadamard_causal_grad_queries(const nearfar::HadamardCausalGradQueries* call, const char* feature_map, int device, bool late_copies,
                               unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_causal_grad_queries(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED hadamard_causal_grad_keys(const nearfar::HadamardCausalGradKeys* call, const char* feature_map, int device, bool late_copies,
                            unsigned seed) {
    const auto launch = [&] { nearfar::hadamard_causal_grad_keys(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
