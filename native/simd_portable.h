// Plain vector extensions of GCC and Clang: 4 lanes, which SSE2 and NEON both have. Also the description of what every
// simd_*.h provides: V holds LANES floats, I holds LANES 32-bit integers (or bytes and words inside them).

constexpr int LANES = 4;
constexpr bool MULTIPLIES_BF16 = false;  // has dot_bf16
constexpr int MAX_FLOAT_ROWS = 3;        // rows of x that multiply a strip while it is in registers
constexpr int MAX_INT_ROWS = 4;
constexpr int MAX_QUERIES = 1;  // that share keys and values in registers
typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef int16_t W __attribute__((vector_size(16)));
typedef uint16_t UW __attribute__((vector_size(16)));

static inline void pin(V&) {}  // holds a sum in its register
static inline void pin(I&) {}
template <class To, class From>
static inline To bits(From x) {
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
static inline V zero() { return V{}; }
static inline V splat(float x) { return V{x, x, x, x}; }
static inline V load(const float* p) { V x; std::memcpy(&x, p, sizeof x); return x; }
static inline void store(float* p, V x) { std::memcpy(p, &x, sizeof x); }
static inline V add(V a, V b) { return a + b; }
static inline V sub(V a, V b) { return a - b; }
static inline V mul(V a, V b) { return a * b; }
static inline V div(V a, V b) { return a / b; }
static inline V fma(V a, V b, V c) { return a * b + c; }  // rounded twice: SSE2 has no fused one
static inline V max(V a, V b) { return a > b ? a : b; }
static inline V min(V a, V b) { return a < b ? a : b; }
static inline V absolute(V x) { return bits<V>(bits<I>(x) & 0x7fffffff); }
static inline V where_less(V a, V b, V yes, V no) { return a < b ? yes : no; }
static inline V round_even(V x) { V magic = splat(12582912.0f); return (x + magic) - magic; }  // |x| < 2^22
static inline I to_int(V x) { return __builtin_convertvector(round_even(x), I); }
static inline V to_float(I x) { return __builtin_convertvector(x, V); }
static inline V two_to(V n) { return bits<V>((to_int(n) + 127) << 23); }
static inline V lane_indices() { return V{0, 1, 2, 3}; }
static inline float reduce_add(V x) { return (x[0] + x[2]) + (x[1] + x[3]); }
static inline V sums(const V x[LANES]) { return V{reduce_add(x[0]), reduce_add(x[1]), reduce_add(x[2]), reduce_add(x[3])}; }  // of each one's lanes
static inline float reduce_max(V x) { float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3]; return a > b ? a : b; }

static inline V load_f16(const uint16_t* p) {  // finite values only
    U h = {p[0], p[1], p[2], p[3]};
    V magnitude = bits<V>((h & 0x7fff) << 13) * splat(0x1p112f);
    return bits<V>(bits<U>(magnitude) | (h & 0x8000) << 16);
}
static inline V load_bf16(const uint16_t* p) { U h = {p[0], p[1], p[2], p[3]}; return bits<V>(h << 16); }
static inline V load_int8(const int8_t* p) { return to_float(I{p[0], p[1], p[2], p[3]}); }
static inline void store_bf16(uint16_t* p, V x) {  // round to nearest even
    U b = bits<U>(x);
    b = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint16_t>(b[i]);
}

static inline I load_units(const void* p) { I x; std::memcpy(&x, p, sizeof x); return x; }
static inline V as_float(I x) { return bits<V>(x); }
static inline V even_bf16(I x) { return bits<V>(x << 16); }           // the lower column of a unit of two
static inline V odd_bf16(I x) { return bits<V>(bits<U>(x) & 0xffff0000u); }

static inline I zero_int() { return I{}; }
static inline I splat_int(int32_t x) { return I{x, x, x, x}; }
static inline void store_bytes(int8_t* p, I x) { for (int i = 0; i < LANES; ++i) p[i] = static_cast<int8_t>(x[i]); }

// The magnitude that counts for the scale of int8 activations.
static inline V magnitude(V x) { return absolute(x); }
// sum + the dot products of four bytes, unsigned w and signed x, per lane. A product fits 16 bits, and so do two of nibbles.
static inline W even_products(I w, I x) { return (bits<W>(w) & 255) * (bits<W>(bits<UW>(x) << 8) >> 8); }
static inline W odd_products(I w, I x) { return bits<W>(bits<UW>(w) >> 8) * (bits<W>(x) >> 8); }
static inline I widened(W words) { I x = bits<I>(words); return (bits<I>(bits<U>(x) << 16) >> 16) + (x >> 16); }
static inline I dot_bytes(I sum, I w, I x) { return sum + widened(even_products(w, x)) + widened(odd_products(w, x)); }
static inline I low_nibbles(I w) { return w & 0x0f0f0f0f; }
static inline I high_nibbles(I w) { return bits<I>((bits<U>(w) >> 4) & 0x0f0f0f0fu); }
static inline I dot_nibbles(I sum, I w, I x) { return bits<I>(bits<W>(sum) + even_products(w, x) + odd_products(w, x)); }
static inline I finish_nibbles(I sum) { return widened(bits<W>(sum)); }

static inline void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
