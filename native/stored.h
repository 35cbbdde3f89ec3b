// Weights as checkpoints store them: plain values, and ggml's blocks.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "formats.h"

namespace hopskip {

template <class T>
T read(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline bool is_finite_f16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

inline float from_f16(uint16_t h) {
    if (!is_finite_f16(h)) return std::nanf("");
    const float magnitude = std::bit_cast<float>((h & 0x7fffu) << 13) * 0x1p112f;
    return h & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t to_f16(float x) {  // to the nearest, of two the even one
    const uint32_t b = std::bit_cast<uint32_t>(x) & 0x7fffffff, sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000;
    if (b >= 0x477ff000) return sign | 0x7c00;
    if (b < 0x38800000) return sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(b) + 0.5f) - 0x3f000000);
    return sign | ((b + 0xfff + (b >> 13 & 1) - 0x38000000) >> 13);
}

// How a checkpoint stores weights: plain values, or ggml's blocks.
enum class Stored : int {
    f32,
    f16,
    bf16,
    q8_0,
    q4_0,
    q4_1,
    q5_0,
    q5_1,
    iq4_nl,
    iq4_xs,
    mxfp4,
    q2_k,
    q3_k,
    q4_k,
    q5_k,
    q6_k,
};
constexpr int NUM_STORED = 16;

struct StoredType {
    int values, bytes;  // of a block
    Format format;      // that holds its values without a change; of plain ones, their own
};
StoredType stored_type(Stored stored);

// 32 columns of a row.
struct Block {
    uint8_t q[BLOCK];
    uint16_t scale = 0, minimum = 0;  // f16; with factors, what these are multiplied with
    uint8_t factors[2] = {};          // in the order of formats.h
};

Block read_block(Stored stored, const uint8_t* row, int index);

}  // namespace hopskip
