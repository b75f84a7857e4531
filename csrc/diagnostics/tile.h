#pragma once

namespace nearfar {

// Workspaces with a number for each query or key hold a multiple of this many of them for each head.
inline constexpr int kDiagnosticsTile = 128;

}  // namespace nearfar
