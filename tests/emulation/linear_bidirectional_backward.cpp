#include "device.h"
#include "linear/bidirectional_backward.cu"

EMULATED linear_bidirectional_grad_queries(const nearfar::LinearBidirectionalGradQueries* call, const char* feature_map, int device,
                                  bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::linear_bidirectional_grad_queries(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED linear_bidirectional_grad_keys(const nearfar::LinearBidirectionalGradKeys* call, const char* feature_map, int device, bool late_copies,
                               unsigned seed) {
    const auto launch = [&] { nearfar::linear_bidirectional_grad_keys(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
