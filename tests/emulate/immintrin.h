// AVX-512 and AVX-VNNI by emulation, for tests on processors without them: SIMDe, and the few intrinsics that version
// 0.7.4 lacks.
#pragma once

#define SIMDE_NO_NATIVE  // or it would include the real header by this name
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

static inline __m512 emulated_cvtepi32_ps(__m512i x) {
    int32_t from[16];
    float to[16];
    _mm512_storeu_si512(from, x);
    for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(from[i]);
    return _mm512_loadu_ps(to);
}
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps

static inline __m512i emulated_cvtps_epi32(__m512 x) {
    float from[16];
    int32_t to[16];
    _mm512_storeu_ps(from, x);
    for (int i = 0; i < 16; i += 8) simde_mm256_storeu_si256(to + i, simde_mm256_cvtps_epi32(simde_mm256_loadu_ps(from + i)));
    return _mm512_loadu_si512(to);
}
#define _mm512_cvtps_epi32 emulated_cvtps_epi32

static inline __m512i emulated_cvtepu16_epi32(__m256i x) {
    uint16_t from[16];
    int32_t to[16];
    simde_mm256_storeu_si256(from, x);
    for (int i = 0; i < 16; ++i) to[i] = from[i];
    return _mm512_loadu_si512(to);
}
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32

static inline __m512i emulated_cvtepi8_epi32(__m128i x) {
    int8_t from[16];
    int32_t to[16];
    simde_mm_storeu_si128(from, x);
    for (int i = 0; i < 16; ++i) to[i] = from[i];
    return _mm512_loadu_si512(to);
}
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32

static inline __m256i emulated_cvtepi32_epi16(__m512i x) {
    int32_t from[16];
    uint16_t to[16];
    _mm512_storeu_si512(from, x);
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(from[i]);
    return simde_mm256_loadu_si256(to);
}
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16

static inline __m512 emulated_cvtph_ps(__m256i x) {
    uint16_t from[16];
    float to[16];
    simde_mm256_storeu_si256(from, x);
    for (int i = 0; i < 16; i += 8)
        simde_mm256_storeu_ps(to + i, simde_mm256_cvtph_ps(simde_mm_loadu_si128(from + i)));
    return _mm512_loadu_ps(to);
}
#define _mm512_cvtph_ps emulated_cvtph_ps

#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
