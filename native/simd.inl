// What every instruction set has alike. Included by isa_*.cpp, which begin with LANES, V (that many floats) and I (as
// many 32-bit integers, or the bytes and words inside them). Arithmetic on V is the compiler's own: a + b, a * b.

typedef uint32_t U __attribute__((vector_size(LANES * 4)));

template <class To, class From>
inline To bits(const From& from) {
    return __builtin_bit_cast(To, from);
}
template <class T>
struct __attribute__((packed, may_alias)) Unaligned {
    T value;
};
template <class To>
inline To load_as(const void* p) {
    return static_cast<const Unaligned<To>*>(p)->value;
}
template <class From>
inline void store_as(void* p, From x) {
    static_cast<Unaligned<From>*>(p)->value = x;
}
inline V load(const float* p) { return load_as<V>(p); }
inline I load_units(const void* p) { return load_as<I>(p); }
inline void store(float* p, V x) { store_as(p, x); }

inline I splat_int(uint32_t x) { return bits<I>(U{} + x); }
inline I splat_unit(const void* p) { return splat_int(load_as<uint32_t>(p)); }
inline V to_float(I x) {
    typedef int32_t Signed __attribute__((vector_size(LANES * 4)));
    return __builtin_convertvector(bits<Signed>(x), V);
}
inline I high_byte(I x) {  // signed
    typedef int32_t Signed __attribute__((vector_size(LANES * 4)));
    return bits<I>(bits<Signed>(x) >> 24);
}
template <int COUNT>
inline I shift_right(I x) {  // of signed integers
    typedef int32_t Signed __attribute__((vector_size(LANES * 4)));
    return bits<I>(bits<Signed>(x) >> COUNT);
}
inline I add_ints(I a, I b) { return bits<I>(bits<U>(a) + bits<U>(b)); }
inline V absolute(V x) { return bits<V>(bits<U>(x) & 0x7fffffffu); }
inline V two_to(V n) { return bits<V>((bits<U>(to_int(n)) + 127) << 23); }
inline float reduce_add(V x) {
    return reduce(x, [](auto a, auto b) { return a + b; });
}
inline float reduce_max(V x) {
    return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}
inline bool any_above(V x, float least) { return any(bits<I>(where_less(splat(least), x, splat(1.0f), V{}))); }

inline V even_bf16(I x) { return bits<V>(bits<U>(x) << 16); }  // the lower column of a unit of two
inline void store_bf16(uint16_t* p, V x) {                     // rounds to nearest even
    typedef uint16_t Words __attribute__((vector_size(LANES * 2)));
    const U b = bits<U>(x), is_nan = bits<U>(x != x);  // all bits; rounding could carry into a zero
    store_as(p, __builtin_convertvector(((b + 0x7fff + (b >> 16 & 1)) | is_nan) >> 16, Words));
}

typedef uint8_t Bytes __attribute__((vector_size(LANES * 4)));
inline I low_nibbles(I w) { return bits<I>(bits<U>(w) & 0x0f0f0f0fu); }
inline I high_nibbles(I w) { return bits<I>(bits<Bytes>(w) >> 4); }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, PREFETCH_LOCALITY); }
