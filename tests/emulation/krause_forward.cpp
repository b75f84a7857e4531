#include "device.h"
#include "krause/forward.cu"

EMULATED krause_forward(const nearfar::KrauseForward* call, const char* dtype, int device, bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::krause_forward(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
