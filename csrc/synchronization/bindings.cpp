#include "common/binding.h"
#include "synchronization/synchronization.h"

namespace nearfar {

void bind_synchronization(py::module_& m) {
    m.attr("SYNCHRONIZATION_ROWS") = kSynchronizationRows;
    m.attr("SYNCHRONIZATION_GRAD_ROWS") = kSynchronizationGradRows;
    m.attr("SYNCHRONIZATION_MEMBERS") = kSynchronizationMembers;
    bind_kernel(m, "synchronization_forward", &synchronization_forward, "Synchronization attention: fills o and total.");
    bind_kernel(m, "synchronization_backward", &synchronization_backward,
                "Its gradients for orders by head: fills dw, dv, dalpha and dradius.");
}

}  // namespace nearfar
