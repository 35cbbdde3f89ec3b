// AVX2 + FMA + F16C: Haswell, Zen and later.
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's

constexpr const char* NAME = "avx2";
constexpr bool DOTS_BYTES = false;
constexpr int MAX_WORD_BITS = 6;  // 31 * 128 * 8 and 63 * 128 * 4 still fit
#include "avx2.inl"

// vpmaddubsw adds two products of an unsigned w + 128 and a signed x in 16 bits, where 255 * 128 still fits: so
// activations are scaled by pairs, not alone, and no two neighbours' magnitudes sum to more than 128 (see quantize in
// rows.inl).
inline V magnitude(V x) { return absolute(x) + absolute(_mm256_permute_ps(x, 0xb1)); }
inline I sum_pairs(I words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }
inline I dot_bytes(I sum, I w, I x) { return _mm256_add_epi32(sum, sum_pairs(_mm256_maddubs_epi16(w, x))); }
inline I add_words(I sum, I w, I x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
inline I sum_words(I words) { return sum_pairs(words); }

#include "multiply.inl"
#include "rows.inl"
#include "pack.inl"
#include "attend.inl"
#include "choose.inl"
}  // namespace
const Kernels& avx2_kernels() { return TABLE; }
}  // namespace hopskip
