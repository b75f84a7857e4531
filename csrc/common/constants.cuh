// Numbers by their names.
#pragma once

#include <limits>

namespace nearfar {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace nearfar
