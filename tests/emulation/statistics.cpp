#include "device.h"
#include "diagnostics/statistics.cu"

EMULATED statistics(const nearfar::Statistics* call, const char* dtype, int device, bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::statistics(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
