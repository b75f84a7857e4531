#include "device.h"
#include "factored_accumulate.cu"

EMULATED factored_accumulate(const nearfar::FactoredAccumulate* call, const char*, int device, bool late_copies,
                             unsigned seed) {
    const auto launch = [&] { nearfar::factored_accumulate(*call, nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
