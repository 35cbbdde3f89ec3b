// AVX2 with AVX-VNNI, without AVX-512: Alder Lake and later.
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's

constexpr const char* NAME = "avx_vnni";
constexpr bool DOTS_BYTES = true;
constexpr int MAX_WORD_BITS = 0;
#include "avx2.inl"

inline V magnitude(V x) { return absolute(x); }
inline I dot_bytes(I sum, I w, I x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }

#include "multiply.inl"
#include "rows.inl"
#include "pack.inl"
#include "attend.inl"
#include "choose.inl"
}  // namespace
const Kernels& avx_vnni_kernels() { return TABLE; }
}  // namespace hopskip
