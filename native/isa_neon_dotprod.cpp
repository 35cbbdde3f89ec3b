// NEON with dot products of signed bytes (ARMv8.2): Cortex-A76 (Raspberry Pi 5), Neoverse N1 (Graviton 2), Apple M1.
#include <arm_neon.h>

#include <algorithm>

#include "kernels.h"

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's

constexpr const char* NAME = "neon_dotprod";
constexpr int MAX_INT_ROWS = 8;  // by count (scripts/test-arm --count), though sums of all blocks lie in memory
#define DOT_BYTES(sum, w, x) vdotq_s32(sum, bits<int8x16_t>(w), bits<int8x16_t>(x))
#define DOT_BYTES_OF_LANE(sum, w, x, lane) vdotq_laneq_s32(sum, bits<int8x16_t>(w), bits<int8x16_t>(x), lane)
#include "neon_dot.inl"

inline I byte_weights(I w) { return bits<I>(bits<U>(w) ^ 0x80808080u); }  // signed; once for all rows
inline I start_of(const int32_t*) { return I{}; }

#include "multiply.inl"
#include "rows.inl"
#include "pack.inl"
#include "attend.inl"
#include "choose.inl"
}  // namespace
const Kernels& neon_dotprod_kernels() { return TABLE; }
}  // namespace hopskip
