// NEON with dot products of unsigned and signed bytes (ARMv8.6): Neoverse V1, N2 and V2 (Graviton 3 and 4), Apple M2.
#include <arm_neon.h>

#include <algorithm>

#include "kernels.h"

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's

constexpr const char* NAME = "neon_i8mm";
constexpr int MAX_INT_ROWS = 6;  // by count: with eight, where sums begin would lie in memory as well
#define DOT_BYTES(sum, w, x) vusdotq_s32(sum, bits<uint8x16_t>(w), bits<int8x16_t>(x))
#define DOT_BYTES_OF_LANE(sum, w, x, lane) vusdotq_laneq_s32(sum, bits<uint8x16_t>(w), bits<int8x16_t>(x), lane)
#include "neon_dot.inl"

inline I byte_weights(I w) { return w; }
inline I start_of(const int32_t* start) { return splat_unit(start); }

#include "multiply.inl"
#include "rows.inl"
#include "pack.inl"
#include "attend.inl"
#include "choose.inl"
}  // namespace
const Kernels& neon_i8mm_kernels() { return TABLE; }
}  // namespace hopskip
