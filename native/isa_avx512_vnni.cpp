// AVX-512 with VNNI, without BF16: Cascade Lake, Ice Lake, Tiger Lake, Rocket Lake.
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's

constexpr const char* NAME = "avx512_vnni";
constexpr bool MULTIPLIES_BF16 = false;
constexpr int PREFETCH_AHEAD = 4 * 1024;  // on an Ice Lake: to the first-level cache, or one row takes 4 % longer
constexpr int PREFETCH_LOCALITY = 3;
#include "avx512.inl"
#include "multiply.inl"
#include "rows.inl"
#include "pack.inl"
#include "attend.inl"
#include "choose.inl"
}  // namespace
const Kernels& avx512_vnni_kernels() { return TABLE; }
}  // namespace hopskip
