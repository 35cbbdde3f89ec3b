// NEON: 4 lanes. Included by isa_neon*.cpp, which differ in how they multiply bytes; see isa_portable.cpp for what each
// function means.

constexpr int LANES = 4;
constexpr bool MULTIPLIES_BF16 = false;
constexpr int PREFETCH_AHEAD = 8 * 1024;
constexpr int PREFETCH_LOCALITY = 2;
constexpr int MAX_FLOAT_ROWS = 6;  // 24 of 32 registers accumulate
constexpr int NUM_REGISTERS = 32;
constexpr int BLOCKS_AT_ONCE = 4;
using V = float32x4_t;
using I = int32x4_t;

inline void pin(I& x) { asm volatile("" : "+w"(x)); }

inline V splat(float x) { return vdupq_n_f32(x); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V where_less(V a, V b, V yes, V no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
inline V max(V a, V b) { return where_less(b, a, a, b); }  // b if one is not a number, as everywhere; vmaxq is not
inline V min(V a, V b) { return where_less(a, b, a, b); }
inline V round_even(V x) { return vrndnq_f32(x); }
inline I to_int(V x) { return vcvtnq_s32_f32(x); }
inline V lane_indices() {
    const float lanes[LANES] = {0, 1, 2, 3};
    return vld1q_f32(lanes);
}
inline bool any(I x) { return vmaxvq_u32(vreinterpretq_u32_s32(x)) != 0; }
template <class Fold>
inline float reduce(V x, const Fold& fold) {
    return fold(fold(x[0], x[2]), fold(x[1], x[3]));
}
#include "simd.inl"

inline V load_f16(const uint16_t* p) { return vcvt_f32_f16(bits<float16x4_t>(vld1_u16(p))); }
inline I load_int8(const void* p) {
    const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(load_as<uint32_t>(p)));
    return vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
}
inline void store_f16(uint16_t* p, V x) { store_as(p, vcvt_f16_f32(x)); }
inline V odd_bf16(I x) { return bits<V>(bits<U>(x) & 0xffff0000u); }
inline void store_bytes(int8_t* p, I x) {
    const int16x4_t words = vqmovn_s32(x);
    store_as(p, vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0));
}

inline V magnitude(V x) { return absolute(x); }
inline I look_up(const uint8_t* table, I indices) {
    return bits<I>(vqtbl1q_u8(vld1q_u8(table), bits<uint8x16_t>(indices)));
}
