#include "device.h"
#include "linear/bidirectional_forward.cu"

EMULATED linear_bidirectional_sums(const nearfar::LinearBidirectionalSums* call, const char* feature_map, int device, bool late_copies,
                          unsigned seed) {
    const auto launch = [&] { nearfar::linear_bidirectional_sums(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED linear_bidirectional_read(const nearfar::LinearBidirectionalRead* call, const char* feature_map, int device, bool late_copies,
                          unsigned seed) {
    const auto launch = [&] { nearfar::linear_bidirectional_read(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
