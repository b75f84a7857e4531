#include "affine/backward.h"
#include "affine/forward.h"
#include "common/binding.h"

namespace nearfar {

void bind_affine(py::module_& m) {
    m.attr("AFFINE_CHUNK") = kAffineChunk;
    m.attr("AFFINE_TERMS") = kAffineTerms;
    bind_kernel(m, "affine_forward", &affine_forward, "Softmax and affine attention: fills o, u and lse.");
    bind_kernel(m, "affine_backward", &affine_backward, "Its gradients: fills dq, dk, dv, m and dbeta.");
}

}  // namespace nearfar
