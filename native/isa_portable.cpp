// Plain vector extensions of GCC and Clang: 4 lanes, which SSE2 and NEON both have. Also the description of what every
// isa_*.cpp provides.
#include <algorithm>

#include "kernels.h"

namespace hopskip {
namespace {  // internal linkage: no function compiled for this instruction set can be picked for another's

constexpr const char* NAME = "portable";
constexpr int LANES = 4;
constexpr bool MULTIPLIES_BF16 = false;   // has dot_bf16
constexpr int PREFETCH_AHEAD = 8 * 1024;  // bytes of weights: hardware prefetchers stop at each page
constexpr int PREFETCH_LOCALITY = 2;      // of __builtin_prefetch: 2 is the second-level cache
constexpr int MAX_FLOAT_ROWS = 3;         // rows of x that multiply a strip while it is in registers
constexpr int MAX_INT_ROWS = 4;
constexpr int MAX_WORD_BITS = 4;    // of weights that are summed as words: 2 * 15 * 128 * 8 still fit
constexpr bool DOTS_BYTES = false;  // attention multiplies bytes; else their values in f32
constexpr int MAX_QUERIES = 3;      // whose products with keys or values are added up in registers
constexpr int NUM_REGISTERS = 16;
constexpr int BLOCKS_AT_ONCE = 4;  // of keys, or values: so few stay in the first-level cache
typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));

inline void pin(I&) {}  // holds a sum in its register

inline V splat(float x) { return V{x, x, x, x}; }
inline V fma(V a, V b, V c) { return a * b + c; }  // rounded twice: SSE2 has no fused one
inline V max(V a, V b) { return a > b ? a : b; }
inline V min(V a, V b) { return a < b ? a : b; }
inline V where_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
inline V round_even(V x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }         // |x| < 2^22
inline I to_int(V x) { return __builtin_convertvector(x == x ? round_even(x) : V{}, I); }  // undefined for NaN
inline V lane_indices() { return V{0, 1, 2, 3}; }
inline bool any(I x) { return x[0] | x[1] | x[2] | x[3]; }  // bit
template <class Fold>
inline float reduce(V x, const Fold& fold) {  // upper half of the lanes onto the lower, until one is left
    return fold(fold(x[0], x[2]), fold(x[1], x[3]));
}
#include "simd.inl"

inline V load_f16(const uint16_t* p) {  // finite values only
    const U h = {p[0], p[1], p[2], p[3]};
    const V magnitude = bits<V>((h & 0x7fff) << 13) * splat(0x1p112f);
    return bits<V>(bits<U>(magnitude) | (h & 0x8000) << 16);
}
inline I load_int8(const void* p) {  // widened
    const auto* x = static_cast<const int8_t*>(p);
    return I{x[0], x[1], x[2], x[3]};
}
inline void store_f16(uint16_t* p, V x) {  // rounds to nearest even; what is too large becomes infinite
    typedef uint16_t Words __attribute__((vector_size(LANES * 2)));
    const U b = bits<U>(absolute(x));
    const U normal = (b + 0xfff + (b >> 13 & 1) - 0x38000000u) >> 13;
    const U tiny = bits<U>(absolute(x) + splat(0.5f)) - 0x3f000000u;
    const U magnitude = b >= 0x477ff000u ? U{} + 0x7c00u : b < 0x38800000u ? tiny : normal;
    store_as(p, __builtin_convertvector(magnitude | (bits<U>(x) >> 16 & 0x8000u), Words));
}
inline V odd_bf16(I x) { return bits<V>(bits<U>(x) & 0xffff0000u); }  // the upper column of a unit of two
inline void store_bytes(int8_t* p, I x) {
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<int8_t>(x[i]);
}

// The magnitude that counts for the scale of int8 activations.
inline V magnitude(V x) { return absolute(x); }
// sum + the dot products of four bytes, unsigned w and signed x, per lane. 16 bits hold a product.
typedef int16_t W __attribute__((vector_size(16)));
typedef uint16_t UW __attribute__((vector_size(16)));
inline W even_products(I w, I x) { return (bits<W>(w) & 255) * (bits<W>(bits<UW>(x) << 8) >> 8); }
inline W odd_products(I w, I x) { return bits<W>(bits<UW>(w) >> 8) * (bits<W>(x) >> 8); }
inline I sum_pairs(W words) { return (bits<I>(bits<U>(words) << 16) >> 16) + (bits<I>(words) >> 16); }
inline I column_of(const int8_t* x, int column) { return splat_unit(x + column); }
inline I byte_weights(I w) { return w; }
inline I start_of(const int32_t* start) { return splat_unit(start); }
inline I dot_bytes(I sum, I w, I x) { return sum + sum_pairs(even_products(w, x)) + sum_pairs(odd_products(w, x)); }
// The same for narrow integers, where 16 bits hold the sum of a whole block: words that sum_words makes 32-bit sums of.
inline I add_words(I sum, I w, I x) { return bits<I>(bits<W>(sum) + even_products(w, x) + odd_products(w, x)); }
inline I sum_words(I words) { return sum_pairs(bits<W>(words)); }
// table[index] of each byte.
inline I look_up(const uint8_t* table, I indices) {
    uint8_t bytes[16];
    store_as(bytes, indices);
    for (uint8_t& byte : bytes) byte = table[byte];
    return load_as<I>(bytes);
}

#include "multiply.inl"
#include "rows.inl"
#include "pack.inl"
#include "attend.inl"
#include "choose.inl"
}  // namespace
const Kernels& portable_kernels() { return TABLE; }
}  // namespace hopskip
