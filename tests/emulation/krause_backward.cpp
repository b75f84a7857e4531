#include "device.h"
#include "krause/backward.cu"

EMULATED krause_backward(const nearfar::KrauseBackward* call, const char* dtype, int device, bool late_copies, unsigned seed) {
    const auto launch = [&] { nearfar::krause_backward(*call, nearfar::parse_dtype(dtype), nullptr); };
    return emulation::run(launch, device, late_copies, seed);
}
