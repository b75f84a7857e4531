#include "common/binding.h"
#include "diagnostics/geometry.h"
#include "diagnostics/statistics.h"
#include "diagnostics/tile.h"

namespace nearfar {

void bind_diagnostics(py::module_& m) {
    m.attr("DIAGNOSTICS_TILE") = kDiagnosticsTile;
    bind_kernel(m, "statistics", &statistics, "Attention statistics: fills lse, entropy, max_weight, max_key and mass.");
    bind_kernel(m, "geometry_select", &geometry_select, "The selected keys: fills scores and chosen.");
    bind_kernel(m, "geometry_separate", &geometry_separate, "What lies near them: fills precision, recall and f_score.");
}

}  // namespace nearfar
