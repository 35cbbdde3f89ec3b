// AVX-512 with VNNI and BF16: Zen 4, Cooper Lake, Sapphire Rapids and later.
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "kernels.h"

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's

constexpr const char* NAME = "avx512";
constexpr bool MULTIPLIES_BF16 = true;
constexpr int PREFETCH_AHEAD = 8 * 1024;
constexpr int PREFETCH_LOCALITY = 2;
#include "avx512.inl"

// The two columns of a unit.
inline V dot_bf16(V sum, V w, V x) { return _mm512_dpbf16_ps(sum, bits<__m512bh>(w), bits<__m512bh>(x)); }

#include "multiply.inl"
#include "rows.inl"
#include "pack.inl"
#include "attend.inl"
#include "choose.inl"
}  // namespace
const Kernels& avx512_kernels() { return TABLE; }
}  // namespace hopskip
