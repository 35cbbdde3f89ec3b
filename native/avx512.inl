// AVX-512 F/BW/VL/DQ with VNNI: 16 lanes, so a strip is one register wide. Included by isa_avx512*.cpp; see
// isa_portable.cpp for what each function means.

constexpr int LANES = 16;
constexpr int MAX_FLOAT_ROWS = 12;
constexpr int MAX_INT_ROWS = 12;
constexpr int MAX_WORD_BITS = 0;
constexpr bool DOTS_BYTES = true;
constexpr int MAX_QUERIES = 12;
constexpr int NUM_REGISTERS = 32;
constexpr int BLOCKS_AT_ONCE = 4;
using V = __m512;
using I = __m512i;

inline void pin(I&) {}  // 32 registers: nothing to keep

inline V splat(float x) { return _mm512_set1_ps(x); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V where_less(V a, V b, V yes, V no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline V round_even(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline I to_int(V x) { return _mm512_cvtps_epi32(x); }
inline V lane_indices() { return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
inline bool any(I x) { return _mm512_test_epi32_mask(x, x) != 0; }
template <class Fold>
inline float reduce(V x, const Fold& fold) {
    const __m256 half =
        fold(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    __m128 s = fold(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = fold(s, _mm_movehl_ps(s, s));
    return fold(s, _mm_movehdup_ps(s))[0];
}
#include "simd.inl"

inline V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load_as<__m256i>(p)); }
inline I load_int8(const void* p) { return _mm512_cvtepi8_epi32(load_as<__m128i>(p)); }
inline void store_f16(uint16_t* p, V x) { store_as(p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline V odd_bf16(I x) { return bits<V>(bits<U>(x) & 0xffff0000u); }
inline void store_bytes(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x)); }

inline V magnitude(V x) { return absolute(x); }
inline I column_of(const int8_t* x, int column) { return splat_unit(x + column); }
inline I byte_weights(I w) { return w; }
inline I start_of(const int32_t* start) { return splat_unit(start); }
inline I dot_bytes(I sum, I w, I x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline I look_up(const uint8_t* table, I indices) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_as<__m128i>(table)), indices);
}
