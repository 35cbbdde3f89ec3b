// NEON as every ARMv8-A has it: Cortex-A53, A72 (Raspberry Pi 4) and A73.
#include <arm_neon.h>

#include <algorithm>

#include "kernels.h"

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's

constexpr const char* NAME = "neon";
constexpr int MAX_INT_ROWS = 4;
constexpr int MAX_WORD_BITS = 4;  // 2 * 15 * 127 * 8 still fit
constexpr bool DOTS_BYTES = false;
constexpr int MAX_QUERIES = 6;
#include "neon.inl"

inline I column_of(const int8_t* x, int column) { return splat_unit(x + column); }

// 16 bits hold the sum of two products of signed bytes, if those of x are above -128; of nibbles, of sixteen.
inline I byte_weights(I w) { return bits<I>(bits<U>(w) ^ 0x80808080u); }
inline I start_of(const int32_t*) { return I{}; }
inline int16x8_t sums_of_two(I w, I x) {
    const auto a = bits<int8x16_t>(w), b = bits<int8x16_t>(x);
    return vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
}
inline I dot_bytes(I sum, I w, I x) { return vpadalq_s16(sum, sums_of_two(w, x)); }
inline I add_words(I sum, I w, I x) { return bits<I>(vaddq_s16(bits<int16x8_t>(sum), sums_of_two(w, x))); }
inline I sum_words(I words) { return vpaddlq_s16(bits<int16x8_t>(words)); }

#include "multiply.inl"
#include "rows.inl"
#include "pack.inl"
#include "attend.inl"
#include "choose.inl"
}  // namespace
const Kernels& neon_kernels() { return TABLE; }
}  // namespace hopskip
