// AVX2 + FMA + F16C: 8 lanes. See simd_portable.h for what each function means.

constexpr int LANES = 8;
constexpr bool MULTIPLIES_BF16 = false;
constexpr int MAX_FLOAT_ROWS = 6;  // 12 of 16 registers accumulate
constexpr int MAX_INT_ROWS = 8;
constexpr int MAX_QUERIES = 3;
using V = __m256;
using I = __m256i;

// Keeps sums in registers, in the order of the source: GCC 12 would load all rows' x first, and spill the sums for them.
static inline void pin(V& x) { asm volatile("" : "+x"(x)); }
static inline void pin(I& x) { asm volatile("" : "+x"(x)); }

static inline V zero() { return _mm256_setzero_ps(); }
static inline V splat(float x) { return _mm256_set1_ps(x); }
static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm256_div_ps(a, b); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V max(V a, V b) { return _mm256_max_ps(a, b); }
static inline V min(V a, V b) { return _mm256_min_ps(a, b); }
static inline V absolute(V x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline V where_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
static inline V round_even(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline I to_int(V x) { return _mm256_cvtps_epi32(x); }
static inline V to_float(I x) { return _mm256_cvtepi32_ps(x); }
static inline V two_to(V n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(to_int(n), _mm256_set1_epi32(127)), 23)); }
static inline V lane_indices() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }

static inline float reduce_add(V x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// Lane i is the sum of the lanes of x[i].
static inline V sums(const V x[LANES]) {
    V low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    V high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
static inline float reduce_max(V x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

static inline V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline V load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
static inline V load_int8(const int8_t* p) {
    return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline void store_bf16(uint16_t* p, V x) {
    I bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

static inline I load_units(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline V as_float(I x) { return _mm256_castsi256_ps(x); }
static inline V even_bf16(I x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
static inline V odd_bf16(I x) {
    x = _mm256_srli_epi32(x, 16);
    pin(x);  // or the two shifts become a mask, which takes a register
    return even_bf16(x);
}

static inline I zero_int() { return _mm256_setzero_si256(); }
static inline I splat_int(int32_t x) { return _mm256_set1_epi32(x); }
static inline void store_bytes(int8_t* p, I x) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

// vpmaddubsw adds two products of an unsigned w + 128 and a signed x in 16 bits, where 255 * 128 still fits: so activations are
// scaled by pairs, not alone, and no two neighbours' magnitudes sum to more than 128 (see quantize in rows.inl).
static inline V magnitude(V x) { return add(absolute(x), absolute(_mm256_permute_ps(x, 0xb1))); }
static inline I dot_bytes(I sum, I w, I x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
static inline I low_nibbles(I w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
static inline I high_nibbles(I w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
static inline I dot_nibbles(I sum, I w, I x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
static inline I finish_nibbles(I sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

static inline void prefetch_to_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
