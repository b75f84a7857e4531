// A kernel's arguments by name. A launcher's header declares them in a struct, and lists them with NEARFAR_MEMBERS: all that
// fills them in (the binding, and through it Python; the tests of the emulation) reads that list.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dtype.h"

namespace nearfar {

enum class ArgumentKind : char { kTensor = 't', kInteger = 'i', kNumber = 'f', kStrides = 's' };

struct Argument {
    std::string name;
    ArgumentKind kind;
    size_t offset, size;  // bytes
};

template <typename T>
constexpr ArgumentKind argument_kind() {
    if constexpr (std::is_pointer_v<T>) return ArgumentKind::kTensor;
    else if constexpr (std::is_same_v<T, int64_t>) return ArgumentKind::kInteger;
    else if constexpr (std::is_same_v<T, double>) return ArgumentKind::kNumber;
    else {
        static_assert(sizeof(T) % sizeof(int64_t) == 0 && std::is_same_v<T, std::array<int64_t, sizeof(T) / sizeof(int64_t)>>);
        return ArgumentKind::kStrides;
    }
}

// names: of the members, as the macro below spells them, "q, k, v".
template <typename Call, typename... Members>
std::vector<Argument> list_arguments(const Call& call, const std::string& names, const Members&... members) {
    static_assert((sizeof(Members) + ...) == sizeof(Call), "NEARFAR_MEMBERS has to list every member");
    std::vector<Argument> arguments;
    size_t begin = 0;
    const auto add = [&](const void* member, ArgumentKind kind, size_t size) {
        const size_t end = std::min(names.find(',', begin), names.size());
        const auto offset = static_cast<const char*>(member) - reinterpret_cast<const char*>(&call);
        arguments.push_back({names.substr(begin, end - begin), kind, static_cast<size_t>(offset), size});
        begin = names.find_first_not_of(", ", end);
    };
    (add(&members, argument_kind<Members>(), sizeof members), ...);
    return arguments;
}

// What a launcher takes beside its arguments: the dtype or, by its name, the feature map that its kernel is compiled for.
template <typename Variant>
Variant parse_variant(const std::string& name) {
    if constexpr (std::is_same_v<Variant, DType>) return parse_dtype(name);
    else return name;
}

}  // namespace nearfar

#define NEARFAR_MEMBERS(...)                                                  \
    std::vector<::nearfar::Argument> arguments() const {                      \
        return ::nearfar::list_arguments(*this, #__VA_ARGS__, __VA_ARGS__);   \
    }
