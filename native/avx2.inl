// AVX2 + FMA + F16C: 8 lanes. Included by isa_avx2.cpp and isa_avx_vnni.cpp, which differ in how they multiply bytes;
// see isa_portable.cpp for what each function means.

constexpr int LANES = 8;
constexpr bool MULTIPLIES_BF16 = false;
constexpr int PREFETCH_AHEAD = 8 * 1024;
constexpr int PREFETCH_LOCALITY = 2;
constexpr int MAX_FLOAT_ROWS = 6;  // 12 of 16 registers accumulate
constexpr int MAX_INT_ROWS = 8;
constexpr int MAX_QUERIES = 6;
constexpr int NUM_REGISTERS = 16;
constexpr int BLOCKS_AT_ONCE = 4;
using V = __m256;
using I = __m256i;

// Keeps sums in registers, in the order of the source: GCC 12 would load all rows' x first, and spill the sums.
inline void pin(I& x) { asm volatile("" : "+x"(x)); }

inline V splat(float x) { return _mm256_set1_ps(x); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V where_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline V round_even(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I to_int(V x) { return _mm256_cvtps_epi32(x); }
inline V lane_indices() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
inline bool any(I x) { return !_mm256_testz_si256(x, x); }
template <class Fold>
inline float reduce(V x, const Fold& fold) {
    __m128 s = fold(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = fold(s, _mm_movehl_ps(s, s));
    return fold(s, _mm_movehdup_ps(s))[0];
}
#include "simd.inl"

inline V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(load_as<__m128i>(p)); }
inline I load_int8(const void* p) { return _mm256_cvtepi8_epi32(_mm_loadu_si64(p)); }
inline void store_f16(uint16_t* p, V x) { store_as(p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline V odd_bf16(I x) {
    x = _mm256_srli_epi32(x, 16);
    pin(x);  // or the two shifts become a mask, which takes a register
    return even_bf16(x);
}
inline void store_bytes(int8_t* p, I x) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline I column_of(const int8_t* x, int column) { return splat_unit(x + column); }
inline I byte_weights(I w) { return w; }
inline I start_of(const int32_t* start) { return splat_unit(start); }
inline I look_up(const uint8_t* table, I indices) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(table)), indices);
}
