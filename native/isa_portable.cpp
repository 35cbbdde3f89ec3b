#include "kernels.h"

#include <cstring>
#include <type_traits>

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's
constexpr const char* NAME = "portable";
#include "simd_portable.h"
#include "multiply.inl"
#include "rows.inl"
}  // namespace
const Kernels& portable_kernels() { return TABLE; }
}  // namespace hopskip
