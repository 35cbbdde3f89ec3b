#include "kernels.h"

#include <immintrin.h>
#include <type_traits>

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's
constexpr const char* NAME = "avx512";
#include "simd_avx512.h"
#include "multiply.inl"
#include "rows.inl"
}  // namespace
const Kernels& avx512_kernels() { return TABLE; }
}  // namespace hopskip
