#include "common/binding.h"
#include "krause/backward.h"
#include "krause/forward.h"
#include "krause/step.h"

namespace nearfar {

void bind_krause(py::module_& m) {
    m.attr("KRAUSE_WINDOW") = kKrauseWindow;
    m.attr("KRAUSE_TILE") = kKrauseTile;
    m.attr("KRAUSE_STEP_WINDOW") = kKrauseStepWindow;
    m.def("krause_forward_shared_bytes", &krause_forward_shared_bytes, py::arg("width"), py::arg("window"),
          "Bytes of shared memory that a block of krause_forward takes.");
    m.def("krause_backward_shared_bytes", &krause_backward_shared_bytes, py::arg("width"),
          "Bytes of shared memory that a block of krause_backward takes.");
    bind_kernel(m, "krause_forward", &krause_forward, "Krause attention: fills o, lse and, with top_k > 0, bits.");
    bind_kernel(m, "krause_backward", &krause_backward, "Its gradients: fills dq, dk, dv and dsigma.");
    bind_kernel(m, "krause_step", &krause_step, "A decoding step of Krause attention: fills o and a slot of the cache.");
}

}  // namespace nearfar
