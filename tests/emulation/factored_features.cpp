#include "device.h"
#include "factored_features.cu"

EMULATED factored_features(const nearfar::FactoredFeatures* call, const char* feature_map, int device, bool late_copies,
                           unsigned seed) {
    const auto launch = [&] { nearfar::factored_features(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
