#include "device.h"
#include "krause/step.cu"

EMULATED krause_step(const nearfar::KrauseStep* call, const char* dtype, int device, bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::krause_step(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
