// AVX-512 F/BW/VL/DQ with VNNI and BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later): 16 lanes, so a strip is one register
// wide. See simd_portable.h for what each function means.
constexpr int LANES = 16;
constexpr bool MULTIPLIES_BF16 = true;
constexpr int MAX_FLOAT_ROWS = 12;
constexpr int MAX_INT_ROWS = 12;
constexpr int MAX_QUERIES = 6;
using V = __m512;
using I = __m512i;
static inline void pin(V&) {}  // 32 registers: nothing to keep
static inline void pin(I&) {}

static inline V zero() { return _mm512_setzero_ps(); }
static inline V splat(float x) { return _mm512_set1_ps(x); }
static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V min(V a, V b) { return _mm512_min_ps(a, b); }
static inline V absolute(V x) { return _mm512_abs_ps(x); }
static inline V where_less(V a, V b, V yes, V no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
static inline V round_even(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline I to_int(V x) { return _mm512_cvtps_epi32(x); }
static inline V to_float(I x) { return _mm512_cvtepi32_ps(x); }
static inline V two_to(V n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(to_int(n), _mm512_set1_epi32(127)), 23)); }
static inline V lane_indices() { return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

static inline __m256 low_half(V x) { return _mm512_castps512_ps256(x); }
static inline __m256 high_half(V x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)); }
static inline float reduce_add(V x) {
    __m256 half = _mm256_add_ps(low_half(x), high_half(x));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline V sums(const V x[LANES]) {
    const auto parts = [](V a, V b, auto choose) {  // 128-bit parts 0 and 2, or 1 and 3, of both
        return _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), choose));
    };
    const std::integral_constant<int, 0x88> even;
    const std::integral_constant<int, 0xdd> odd;
    V quad[4];
    for (int i = 0; i < 4; ++i) {  // [x0, x1, x2, x3] in each 128 bits
        const V *y = x + 4 * i;
        V a = add(_mm512_unpacklo_ps(y[0], y[1]), _mm512_unpackhi_ps(y[0], y[1]));
        V b = add(_mm512_unpacklo_ps(y[2], y[3]), _mm512_unpackhi_ps(y[2], y[3]));
        quad[i] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    V low = add(parts(quad[0], quad[1], even), parts(quad[0], quad[1], odd));
    V high = add(parts(quad[2], quad[3], even), parts(quad[2], quad[3], odd));
    return add(parts(low, high, even), parts(low, high, odd));
}
static inline float reduce_max(V x) {
    __m256 half = _mm256_max_ps(low_half(x), high_half(x));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static inline __m256i load_words(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load_words(p)); }
static inline V load_bf16(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(p)), 16)); }
static inline V load_int8(const int8_t* p) {
    return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline void store_bf16(uint16_t* p, V x) {
    I bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}

static inline I load_units(const void* p) { return _mm512_loadu_si512(p); }
static inline V as_float(I x) { return _mm512_castsi512_ps(x); }
static inline V even_bf16(I x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
static inline V odd_bf16(I x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))); }
static inline V dot_bf16(V sum, V w, V x) {  // both columns of a unit at once
    __m512bh a, b;
    __builtin_memcpy(&a, &w, sizeof a);
    __builtin_memcpy(&b, &x, sizeof b);
    return _mm512_dpbf16_ps(sum, a, b);
}

static inline I zero_int() { return _mm512_setzero_si512(); }
static inline I splat_int(int32_t x) { return _mm512_set1_epi32(x); }
static inline void store_bytes(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(x)); }

static inline V magnitude(V x) { return absolute(x); }
static inline I dot_bytes(I sum, I w, I x) { return _mm512_dpbusd_epi32(sum, w, x); }
static inline I low_nibbles(I w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
static inline I high_nibbles(I w) { return _mm512_and_si512(_mm512_srli_epi32(w, 4), _mm512_set1_epi8(15)); }
static inline I dot_nibbles(I sum, I w, I x) { return _mm512_dpbusd_epi32(sum, w, x); }
static inline I finish_nibbles(I sum) { return sum; }

static inline void prefetch_to_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
