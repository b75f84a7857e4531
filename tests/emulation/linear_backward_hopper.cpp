#include "device.h"
#include "linear_backward_hopper.cu"

EMULATED linear_grad_queries_hopper(const nearfar::LinearGradQueries* call, const char* feature_map, int device,
                                    bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::linear_grad_queries_hopper(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED linear_grad_keys_hopper(const nearfar::LinearGradKeys* call, const char* feature_map, int device, bool late_copies,
                                 unsigned seed) {
    const auto launch = [&] { nearfar::linear_grad_keys_hopper(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
