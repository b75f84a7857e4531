#include "device.h"
#include "linear_full_forward.cu"

EMULATED linear_full_sums(const nearfar::LinearFullSums* call, const char* feature_map, int device, bool late_copies,
                          unsigned seed) {
    const auto launch = [&] { nearfar::linear_full_sums(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}

EMULATED linear_full_read(const nearfar::LinearFullRead* call, const char* feature_map, int device, bool late_copies,
                          unsigned seed) {
    const auto launch = [&] { nearfar::linear_full_read(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
