#include "device.h"
#include "factored_read.cu"

EMULATED factored_read(const nearfar::FactoredRead* call, const char* feature_map, int device, bool late_copies,
                       unsigned seed) {
    const auto launch = [&] { nearfar::factored_read(*call, feature_map, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
