#include "device.h"
#include "linear_full_backward.cu"

EMULATED linear_full_grad_queries(const nearfar::LinearFullGradQueries* call, const char* feature_map, int device,
                                  bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::linear_full_grad_queries(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED linear_full_grad_keys(const nearfar::LinearFullGradKeys* call, const char* feature_map, int device, bool late_copies,
                               unsigned seed) {
    const auto launch = [&] { nearfar::linear_full_grad_keys(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
