// The binding of a launcher: Python names a kernel's arguments once, when it plans a launch that it will make many times.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/arguments.h"
#include "common/device_guard.h"

namespace nearfar {

namespace py = pybind11;

// The arguments of one kernel. A plan sets those that are not tensors, and the position of each address.
class ArgumentList {
   public:
    ArgumentList(std::string kernel, std::vector<Argument> arguments)
        : kernel_(std::move(kernel)), arguments_(std::move(arguments)) {}

    std::vector<size_t> offsets_of(const std::vector<std::string>& tensors) const {
        std::vector<size_t> offsets;
        for (const auto& name : tensors) offsets.push_back(find(name, true).offset);
        require(true, [&](const std::string& name) { return std::count(tensors.begin(), tensors.end(), name) == 1; });
        return offsets;
    }

    void set(char* call, const py::kwargs& values) const {
        for (const auto& [key, value] : values) {
            const auto name = py::cast<std::string>(key);
            const Argument& argument = find(name, false);
            try {
                set(call + argument.offset, argument, value);
            } catch (const py::cast_error&) {
                throw py::type_error(kernel_ + ": " + name + " cannot be " + py::cast<std::string>(py::repr(value)));
            }
        }
        require(false, [&](const std::string& name) { return values.contains(name.c_str()); });
    }

    // A value of each argument's kind, by name: None for a tensor.
    py::dict examples() const {
        py::dict values;
        for (const auto& argument : arguments_) values[argument.name.c_str()] = example(argument);
        return values;
    }

    std::string names(bool tensors) const {
        std::string text;
        for (const auto& argument : arguments_)
            if (is_tensor(argument) == tensors) text += (text.empty() ? "" : ", ") + argument.name;
        return text;
    }

   private:
    static bool is_tensor(const Argument& argument) { return argument.kind == ArgumentKind::kTensor; }

    static py::object example(const Argument& argument) {
        switch (argument.kind) {
            case ArgumentKind::kInteger: return py::int_(0);
            case ArgumentKind::kNumber: return py::float_(0.0);
            case ArgumentKind::kStrides: return py::tuple(py::cast(std::vector<int64_t>(argument.size / sizeof(int64_t))));
            default: return py::none();
        }
    }

    const Argument& find(const std::string& name, bool tensor) const {
        for (const auto& argument : arguments_)
            if (argument.name == name && is_tensor(argument) == tensor) return argument;
        throw py::type_error(kernel_ + " takes no " + (tensor ? "tensor " : "argument ") + name + ", but " + names(tensor));
    }

    template <typename Given>
    void require(bool tensors, const Given& given) const {
        for (const auto& argument : arguments_)
            if (is_tensor(argument) == tensors && !given(argument.name))
                throw py::type_error(kernel_ + " needs " + argument.name + " once");
    }

    static void set(char* to, const Argument& argument, const py::handle& value) {
        const auto copy = [&](const auto* from) { std::memcpy(to, from, argument.size); };
        if (argument.kind == ArgumentKind::kInteger) {
            const auto number = py::cast<int64_t>(value);
            copy(&number);
        } else if (argument.kind == ArgumentKind::kNumber) {
            const auto number = py::cast<double>(value);
            copy(&number);
        } else {
            const auto strides = py::cast<std::vector<int64_t>>(value);
            if (strides.size() * sizeof(int64_t) != argument.size) throw py::cast_error();
            copy(strides.data());
        }
    }

    std::string kernel_;
    std::vector<Argument> arguments_;
};

// Defines kernel(variant, tensors, **others), which returns a launch (addresses, device, stream).
template <typename Call, typename Variant>
void bind_kernel(py::module_& m, const char* kernel, void (*launcher)(const Call&, Variant, cudaStream_t),
                 const char* description) {
    static_assert(std::is_trivially_copyable_v<Call>);
    const ArgumentList list(kernel, Call{}.arguments());
    const auto plan = [list, launcher](const std::string& variant, const std::vector<std::string>& tensors,
                                       const py::kwargs& others) {
        Call planned{};
        list.set(reinterpret_cast<char*>(&planned), others);
        const auto launch = [launcher, planned, offsets = list.offsets_of(tensors),
                             parsed = parse_variant<std::decay_t<Variant>>(variant)](
                                const std::vector<uintptr_t>& addresses, int device, uintptr_t stream) {
            if (addresses.size() != offsets.size())
                throw py::type_error(std::to_string(offsets.size()) + " addresses are needed, not " +
                                     std::to_string(addresses.size()));
            Call call = planned;
            for (size_t i = 0; i < offsets.size(); ++i)
                std::memcpy(reinterpret_cast<char*>(&call) + offsets[i], &addresses[i], sizeof(void*));
            const DeviceGuard guard(device);
            launcher(call, parsed, reinterpret_cast<cudaStream_t>(stream));
        };
        return py::cpp_function(launch, py::arg("addresses"), py::arg("device"), py::arg("stream"));
    };
    m.def(kernel, plan, py::arg("variant"), py::arg("tensors"), description);
    m.attr("ARGUMENTS")[kernel] = list.examples();
}

}  // namespace nearfar
