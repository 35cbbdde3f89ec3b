// Blocks are taken apart as ggml-quants.c of llama.cpp puts them together.
#include "stored.h"

namespace hopskip {

namespace {

void read_nibbles(const uint8_t* bytes, uint8_t* q) {  // of 32 columns: the first half in the low ones
    for (int c = 0; c < 16; ++c) {
        q[c] = bytes[c] & 15;
        q[c + 16] = bytes[c] >> 4;
    }
}

// The factors of scale and minimum of one of eight blocks, 6 bits each.
void read_k_factors(const uint8_t* s, int block, uint8_t* factors) {
    if (block < 4) {
        factors[0] = s[block] & 63;
        factors[1] = s[block + 4] & 63;
    } else {
        factors[0] = (s[block + 4] & 15) | s[block - 4] >> 6 << 4;
        factors[1] = s[block + 4] >> 4 | s[block] >> 6 << 4;
    }
}

}  // namespace

Block read_block(Stored stored, const uint8_t* row, int index) {
    Block block;
    const StoredType type = stored_type(stored);
    const int per_stored = type.values / BLOCK, part = index % per_stored;
    const uint8_t* p = row + static_cast<ptrdiff_t>(index / per_stored) * type.bytes;
    uint8_t* q = block.q;
    const auto add_bits = [&](const uint8_t* bytes, int shift, int mask, int to) {  // of 32 columns, a byte each
        for (int c = 0; c < BLOCK; ++c) q[c] |= (bytes[c] >> shift & mask) << to;
    };
    const auto k_nibbles = [&](const uint8_t* bytes) {  // 64 columns in 32 bytes
        for (int c = 0; c < BLOCK; ++c) q[c] = bytes[part / 2 * 32 + c] >> part % 2 * 4 & 15;
    };
    const auto add_high_bits = [&](uint32_t high) {
        for (int c = 0; c < BLOCK; ++c) q[c] |= (high >> c & 1) << 4;
    };
    const auto take_scales = [&](const uint8_t* at) {  // a minimum is taken away in ggml, and added here
        block.scale = read<uint16_t>(at);
        block.minimum = read<uint16_t>(at + 2) ^ 0x8000;
    };
    switch (stored) {
        case Stored::q8_0:
            block.scale = read<uint16_t>(p);
            for (int c = 0; c < BLOCK; ++c) q[c] = p[2 + c] ^ 0x80;
            break;
        case Stored::q4_0:
        case Stored::iq4_nl:
            block.scale = read<uint16_t>(p);
            read_nibbles(p + 2, q);
            break;
        case Stored::q4_1:
            block.scale = read<uint16_t>(p);
            block.minimum = read<uint16_t>(p + 2);
            read_nibbles(p + 4, q);
            break;
        case Stored::q5_0:
            block.scale = read<uint16_t>(p);
            read_nibbles(p + 6, q);
            add_high_bits(read<uint32_t>(p + 2));
            break;
        case Stored::q5_1:
            block.scale = read<uint16_t>(p);
            block.minimum = read<uint16_t>(p + 2);
            read_nibbles(p + 8, q);
            add_high_bits(read<uint32_t>(p + 4));
            break;
        case Stored::iq4_xs: {
            const int low = p[4 + part / 2] >> part % 2 * 4 & 15, high = read<uint16_t>(p + 2) >> 2 * part & 3;
            const float scale = from_f16(read<uint16_t>(p)) * static_cast<float>((low | high << 4) - 32);
            block.scale = to_f16(scale);
            if (!(std::abs(from_f16(block.scale) - scale) <= std::abs(scale) * 0x1p-11f) && scale == scale)
                block.scale = 0x7c00;  // it would lose more than a rounding: said to be too large
            read_nibbles(p + 8 + part * 16, q);
            break;
        }
        case Stored::mxfp4:
            block.scale = to_f16(std::ldexp(1.0f, p[0] - 128));
            if (!block.scale) block.scale = 0x7c00;
            read_nibbles(p + 1, q);
            break;
        case Stored::q2_k:
            take_scales(p + 80);
            for (int c = 0; c < BLOCK; ++c) q[c] = p[16 + part / 4 * 32 + c] >> part % 4 * 2 & 3;
            std::memcpy(block.factors, p + part * 2, 2);
            break;
        case Stored::q3_k: {
            block.scale = read<uint16_t>(p + 108);
            for (int c = 0; c < BLOCK; ++c) q[c] = p[32 + part / 4 * 32 + c] >> part % 4 * 2 & 3;
            add_bits(p, part, 1, 2);
            for (int half = 0; half < 2; ++half) {
                const int i = part * 2 + half, low = p[96 + i % 8] >> i / 8 * 4 & 15;
                block.factors[half] = static_cast<uint8_t>((low | (p[104 + i % 4] >> i / 4 * 2 & 3) << 4) - 32);
            }
            break;
        }
        case Stored::q4_k:
        case Stored::q5_k:
            take_scales(p);
            read_k_factors(p + 4, part, block.factors);
            k_nibbles(p + (stored == Stored::q4_k ? 16 : 48));
            if (stored == Stored::q5_k) add_bits(p + 16, part, 1, 4);
            break;
        case Stored::q6_k:
            block.scale = read<uint16_t>(p + 208);
            for (int c = 0; c < BLOCK; ++c) q[c] = p[part / 4 * 64 + part % 2 * 32 + c] >> part % 4 / 2 * 4 & 15;
            add_bits(p + 128 + part / 4 * 32, part % 4 * 2, 3, 4);
            std::memcpy(block.factors, p + 192 + part * 2, 2);
            break;
        default: break;
    }
    return block;
}

StoredType stored_type(Stored stored) {
    switch (stored) {
        case Stored::f32: return {1, 4, Format::f32};
        case Stored::f16: return {1, 2, Format::f32};
        case Stored::bf16: return {1, 2, Format::bf16};
        case Stored::q8_0: return {32, 34, Format::q8};
        case Stored::q4_0: return {32, 18, Format::q4_0};
        case Stored::q4_1: return {32, 20, Format::q4};
        case Stored::q5_0: return {32, 22, Format::q5_0};
        case Stored::q5_1: return {32, 24, Format::q5_1};
        case Stored::iq4_nl: return {32, 18, Format::iq4};
        case Stored::iq4_xs: return {256, 136, Format::iq4};
        case Stored::mxfp4: return {32, 17, Format::mxfp4};
        case Stored::q2_k: return {256, 84, Format::q2_k};
        case Stored::q3_k: return {256, 110, Format::q3_k};
        case Stored::q4_k: return {256, 144, Format::q4_k};
        case Stored::q5_k: return {256, 176, Format::q5_k};
        case Stored::q6_k: return {256, 210, Format::q6_k};
    }
    return {};
}

}  // namespace hopskip
