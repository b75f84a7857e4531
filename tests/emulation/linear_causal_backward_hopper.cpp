#include "device.h"
#include "linear/causal_backward_hopper.cu"

EMULATED linear_causal_grad_queries_hopper(const nearfar::LinearCausalGradQueries* call, const char* feature_map, int device,
                                    bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::linear_causal_grad_queries_hopper(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED linear_causal_grad_keys_hopper(const nearfar::LinearCausalGradKeys* call, const char* feature_map, int device, bool late_copies,
                                 unsigned seed) {
    const auto launch = [&] { nearfar::linear_causal_grad_keys_hopper(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
