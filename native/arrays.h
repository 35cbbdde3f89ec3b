// Checks of arrays that come from Python: NumPy's, PyTorch's on the CPU, and whatever else knows DLPack.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "formats.h"

namespace hopskip {

namespace nb = nanobind;
using namespace nb::literals;

using Input = nb::ndarray<nb::ro>;
using Output = nb::ndarray<>;
using OptionalInput = std::optional<Input>;
using OptionalOutput = std::optional<Output>;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw nb::value_error(message.str().c_str());
}

inline int in_range(int64_t value, const char* name, int64_t low, int64_t high) {
    if (value < low || value > high) refuse(name, " is ", value, "; it must be ", low, " to ", high);
    return static_cast<int>(value);
}

template <class Sizes>
std::string listed(const Sizes& sizes) {
    std::string list;
    for (int64_t size : sizes) list += (list.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
    return "[" + list + "]";
}

inline std::string name_of(nb::dlpack::dtype type) {
    const char* const kinds[] = {"int", "uint", "float", "pointer", "bfloat", "complex", "bool"};
    return (type.code < std::size(kinds) ? kinds[type.code] : "type ") + std::to_string(type.bits);
}

constexpr int64_t ANY = -1;

// The data of a contiguous CPU array of this type and shape, in which ANY stands for any size.
template <class Array>
auto checked(const Array& array, const char* name, nb::dlpack::dtype type, std::initializer_list<int64_t> shape,
             size_t alignment) {
    if (array.device_type() != nb::device::cpu::value) refuse(name, " is not in the CPU's memory; pass .cpu()");
    if (array.dtype() != type)
        refuse(name, " has elements of ", name_of(array.dtype()), "; it must be of ", name_of(type));
    bool fits = array.ndim() == shape.size();
    int64_t expected_stride = 1;
    for (size_t i = array.ndim(); fits && i-- > 0;) {
        const int64_t want = shape.begin()[i], size = static_cast<int64_t>(array.shape(i));
        fits = (want == ANY || want == size) && size <= INT32_MAX;
        if (size > 1 && array.size() > 0 && array.stride(i) != expected_stride)  // of nothing, any stride will do
            refuse(name, " is not contiguous; pass .contiguous()");
        expected_stride *= size;
    }
    if (!fits) {
        const std::vector<int64_t> found(array.shape_ptr(), array.shape_ptr() + array.ndim());
        refuse(name, " has shape ", listed(found), "; it must be ", listed(shape));
    }
    if (reinterpret_cast<uintptr_t>(array.data()) % alignment) refuse(name, " is misaligned; pass a copy");
    return array.data();
}

template <class T, class Array>
auto checked(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
    using Pointer = std::conditional_t<std::is_same_v<Array, Input>, const T*, T*>;
    return static_cast<Pointer>(checked(array, name, nb::dtype<T>(), shape, alignof(T)));
}

template <class Array>
int size_of(const Array& array, int axis) {  // of one that has been checked
    return static_cast<int>(array.shape(axis));
}

// A copy of a vector, which nobody can change between its check and its use.
template <class T>
std::vector<T> copied(const Input& array, const char* name, int64_t size = ANY) {
    const T* data = checked<T>(array, name, {size});
    return {data, data + size_of(array, 0)};
}

// A matrix without data.
inline Matrix checked_shape(int format, int64_t rows, int64_t cols) {
    const auto kind = static_cast<Format>(in_range(format, "format", 0, NUM_FORMATS - 1));
    const Matrix m = matrix_of(kind, in_range(rows, "rows", 1, 1 << 30), in_range(cols, "cols", 1, 1 << 24));
    const BlockFormat f = block_format(kind);
    if (f.has_factors() && m.cols % (f.blocks_per_header * BLOCK))
        refuse("cols is ", cols, "; this format has blocks of ", f.blocks_per_header * BLOCK);
    return m;
}

// Keeps an array's memory as long as it lives.
template <class Array>
std::shared_ptr<const void> owner_of(const Array& array) {
    return std::make_shared<Array>(array);
}

// What nanobind calls as `__init__`, from a function that makes the object. (nb::new_ would convert every array twice.)
template <class T, class... Arguments>
auto constructor(T (*make)(Arguments...)) {
    return [make](T* self, Arguments... arguments) { new (self) T(make(arguments...)); };
}

}  // namespace hopskip
