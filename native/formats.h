// The layout of packed weights: what the packer writes and the kernels read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hopskip {

constexpr int TILE = 16;   // output rows of a strip: the lanes of one AVX-512 register
constexpr int BLOCK = 32;  // columns that share a scale; all column counts are padded to it

constexpr int blocks_of(int cols) { return (cols + BLOCK - 1) / BLOCK; }
constexpr ptrdiff_t padded(int cols) { return static_cast<ptrdiff_t>(blocks_of(cols)) * BLOCK; }

// Names and values are ggml's; q8 is its Q8_0, and q4 its Q4_1.
enum class Format : int { f32, bf16, q8, q4, q4_0, q5_0, q5_1, iq4, mxfp4, q2_k, q3_k, q4_k, q5_k, q6_k };
constexpr int NUM_FORMATS = 14;

// Packed weights [rows, cols]: strips of 16 output rows, contiguous in memory. A strip is a sequence of units, u32
// [16]: lane r belongs to output row r. So one load takes the same columns of all lanes' rows, and multiplying it by
// one broadcast activation needs no shuffle.
//
// A unit holds of each row one f32 column, two bf16 columns, or some bits of the unsigned integers that a block of 32
// quantized columns consists of. The eight groups of four columns that begin at 0, 4, .. 12 and 16, 20, .. 28 are
// numbered 0 to 7; byte j of a unit belongs to their column j. Integers of 8 bits: unit g holds group g. Others are cut
// into planes, those of 4 bits first, then those of 2, then of 1, the lowest bits in the first plane:
// - 4 bits, four units: unit u holds group u in its low nibbles and group u + 4 in its high ones (GGUF's own order);
// - 2 bits, two units: unit h holds groups 4 h .. 4 h + 3, from the lowest bits of each byte to the highest;
// - 1 bit, one unit: groups 0 .. 7, likewise.
//
// Before every few blocks of quantized weights lies a header. A kernel thus reads one stream; with the scales elsewhere
// it reached half the bandwidth. A header is f16 [2][16]: the scales of two blocks; or scale and minimum of one block;
// or, in the formats that end in _k, what the factors of eight blocks are multiplied with for their scales and for
// their minima. There, bytes [8][2][16] follow: of each block the factors of scale and minimum, or of the scales of its
// two halves, signed; or of each half both, the scale's in the low nibble.
struct Matrix {
    const uint8_t* data;
    Format format;
    int rows, cols;      // as in the model, unpadded
    int strips, blocks;  // padded: rows <= strips * 16, cols <= blocks * 32
    ptrdiff_t strip_bytes;

    const uint8_t* strip(int index) const { return data + strip_bytes * index; }
};

constexpr int UNIT_BYTES = TILE * 4, HEADER_BYTES = TILE * 4, FACTOR_BYTES = TILE * 2;

// A quantized weight is scale * (q - center), q being its unsigned integer or what a table has for it; or, with minima,
// scale * q + minimum.
struct BlockFormat {
    int bits = 0;               // of an integer; 0: floats
    int blocks_per_header = 0;  // 8: factors follow
    int center = 0;             // 0: minima
    bool has_halves = false;    // scales and minima are those of 16 columns
    bool has_table = false;

    constexpr bool is_quantized() const { return bits > 0; }
    constexpr bool has_minima() const { return center == 0; }
    constexpr bool has_factors() const { return blocks_per_header == 8; }
    constexpr int header_bytes() const {
        return !bits ? 0 : HEADER_BYTES + (has_factors() ? blocks_per_header * FACTOR_BYTES : 0);
    }
    constexpr int units() const { return bits; }  // of a block: 32 integers of so many bits, in units of 32 bits
};

constexpr BlockFormat block_format(Format format) {
    switch (format) {
        case Format::f32:
        case Format::bf16: return {};
        case Format::q8: return {.bits = 8, .blocks_per_header = 2, .center = 128};
        case Format::q4: return {.bits = 4, .blocks_per_header = 1};
        case Format::q4_0: return {.bits = 4, .blocks_per_header = 2, .center = 8};
        case Format::q5_0: return {.bits = 5, .blocks_per_header = 2, .center = 16};
        case Format::q5_1: return {.bits = 5, .blocks_per_header = 1};
        case Format::iq4:
        case Format::mxfp4: return {.bits = 4, .blocks_per_header = 2, .center = 128, .has_table = true};
        case Format::q2_k: return {.bits = 2, .blocks_per_header = 8, .has_halves = true};
        case Format::q3_k: return {.bits = 3, .blocks_per_header = 8, .center = 4, .has_halves = true};
        case Format::q4_k: return {.bits = 4, .blocks_per_header = 8};
        case Format::q5_k: return {.bits = 5, .blocks_per_header = 8};
        case Format::q6_k: return {.bits = 6, .blocks_per_header = 8, .center = 32, .has_halves = true};
    }
    return {};
}

// What four bits stand for, plus the center: of IQ4_NL and IQ4_XS, and twice the values of MXFP4.
alignas(16) constexpr uint8_t IQ4_TABLE[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t MXFP4_TABLE[16] = {128, 129, 130, 131, 132, 134, 136, 140,
                                                 128, 127, 126, 125, 124, 122, 120, 116};

constexpr const uint8_t* table_of(Format format) { return format == Format::mxfp4 ? MXFP4_TABLE : IQ4_TABLE; }

constexpr int units_per_block(Format format) {
    return format == Format::f32 ? 32 : format == Format::bf16 ? 16 : block_format(format).units();
}

constexpr ptrdiff_t strip_bytes(Format format, int blocks) {
    const BlockFormat f = block_format(format);
    const ptrdiff_t headers = f.is_quantized() ? (blocks + f.blocks_per_header - 1) / f.blocks_per_header : 0;
    return headers * f.header_bytes() + static_cast<ptrdiff_t>(blocks) * units_per_block(format) * UNIT_BYTES;
}

// Bytes from the start of a strip of a quantized format to a block's header, and to its units.
constexpr ptrdiff_t header_offset(Format format, int block) {
    const BlockFormat f = block_format(format);
    return static_cast<ptrdiff_t>(block / f.blocks_per_header) *
           (f.header_bytes() + f.blocks_per_header * f.units() * UNIT_BYTES);
}

constexpr ptrdiff_t units_offset(Format format, int block) {
    const BlockFormat f = block_format(format);
    return header_offset(format, block) + f.header_bytes() + block % f.blocks_per_header * f.units() * UNIT_BYTES;
}

inline Matrix matrix_of(Format format, int rows, int cols) {
    Matrix m{nullptr, format, rows, cols, (rows + TILE - 1) / TILE, blocks_of(cols), 0};
    m.strip_bytes = strip_bytes(format, m.blocks);
    return m;
}

}  // namespace hopskip
