// Packed weights times rows: against double precision on the activations as they are multiplied, and bitwise against
// one row at a time.
#include "check.h"
#include "pack.h"

namespace hopskip::checks {

namespace {

// All formats. What they hold is read by `unpack_row`, which the tests of the package compare with a reader of their
// own.
constexpr struct FormatCase {
    const char* name;
    Format format;
} FORMATS[] = {
    {"f32", Format::f32},     {"bf16", Format::bf16}, {"q8", Format::q8},     {"q4", Format::q4},
    {"q4_0", Format::q4_0},   {"q5_0", Format::q5_0}, {"q5_1", Format::q5_1}, {"iq4", Format::iq4},
    {"mxfp4", Format::mxfp4}, {"q2_k", Format::q2_k}, {"q3_k", Format::q3_k}, {"q4_k", Format::q4_k},
    {"q5_k", Format::q5_k},   {"q6_k", Format::q6_k},
};
static_assert(std::size(FORMATS) == NUM_FORMATS);

bool is_float(Format format) { return format == Format::f32 || format == Format::bf16; }

enum class Fill { random, zeros, ones };  // the bits of quantized units

// A random word of two f16 whose exponents are moderate. As other fields of a header it is as random as any.
uint32_t random_header() { return (random_bits() & 0x83ff83ffu) | 0x20002000u | (random_bits() & 0x0c000c00u); }

struct Weights {
    Weights(Format format, int rows, int cols, Fill fill) : matrix(matrix_of(format, rows, cols)) {
        const ptrdiff_t words = matrix.strip_bytes / 4;
        uint32_t* to = data.reserve(words * matrix.strips);
        for (ptrdiff_t i = 0; i < words * matrix.strips; ++i) {
            const auto number = [] { return std::bit_cast<uint32_t>(random_normal()); };
            if (format == Format::f32)
                to[i] = number();
            else if (format == Format::bf16)
                to[i] = (number() & 0xffff0000u) | number() >> 16;
            else
                to[i] = fill == Fill::random ? random_bits() : fill == Fill::ones ? ~0u : 0u;
        }
        matrix.data = reinterpret_cast<const uint8_t*>(to);
        const BlockFormat f = block_format(format);
        for (int strip = 0; f.is_quantized() && strip < matrix.strips; ++strip)
            for (int b = 0; b < matrix.blocks; b += f.blocks_per_header)
                for (int i = 0; i < HEADER_BYTES / 4; ++i)
                    to[words * strip + header_offset(format, b) / 4 + i] = random_header();
        for (int row = 0; row < rows; ++row) {
            values.emplace_back(cols);
            unpack_row(matrix, row, values.back().data());
        }
    }

    double value(int row, int c) const { return values[row][c]; }

    std::vector<std::vector<float>> values;
    Buffer<uint32_t> data;
    Matrix matrix;
};

// Rows in every form that kernels may want.
struct Inputs {
    Inputs(const Kernels& kernels, const std::vector<std::vector<float>>& rows, int cols) : blocks(blocks_of(cols)) {
        const int count = static_cast<int>(rows.size());
        buffers.reserve(static_cast<ptrdiff_t>(count) * blocks, true);
        for (int row = 0; row < count; ++row) {
            const Activations x = from(row);
            std::copy(rows[row].begin(), rows[row].end(), x.f32);
            kernels.quantize(x.f32, x);
            kernels.to_bf16(x.f32, padded(cols), x.bf16);
        }
    }
    Activations from(int row) { return buffers.rows_of(blocks).from(row); }

    // The number that is multiplied for column c of a row.
    double value(const Kernels& kernels, Format format, int row, int c) {
        const Activations x = from(row);
        if (!is_float(format)) return static_cast<double>(x.q8[c]) * x.scales[c / BLOCK];
        if (format == Format::bf16 && kernels.multiplies_bf16)
            return std::bit_cast<float>(static_cast<uint32_t>(x.bf16[c]) << 16);
        return x.f32[c];
    }

    int blocks;
    ActivationBuffers buffers;
};

constexpr int NUM_ROWS = 33, NAN_ROW = 7;

std::vector<std::vector<float>> some_rows(int cols) {
    std::vector<std::vector<float>> rows;
    for (int row = 0; row < NUM_ROWS; ++row) rows.push_back(random_normals(cols, row % 3 == 2 ? 30.0f : 1.0f));
    for (int c = 0; c < cols; ++c) {
        rows[0][c] = 1;
        rows[1][c] = random_int(0, 1) ? 3.0f : -3.0f;  // all at an end of the range
        rows[3][c] *= 1e-12f;
        rows[4][c] *= 1e-36f;
        rows[5][c] = 0;
    }
    rows[6][0] = 1e30f;
    rows[NAN_ROW][cols / 2] = NAN_VALUE;
    return rows;
}

void check_matrix(const Kernels& kernels, const FormatCase& format, int cols, Fill fill, Failures& failures) {
    constexpr int OUTPUTS = TILE + 5;  // the second strip is not full
    const Weights weights(format.format, OUTPUTS, cols, fill);
    Inputs x(kernels, some_rows(cols), cols);
    for (int strip = 0; strip < weights.matrix.strips; ++strip) {
        std::vector<float> alone(NUM_ROWS * TILE), together(NUM_ROWS * TILE);
        for (int row = 0; row < NUM_ROWS; ++row)
            kernels.multiply(weights.matrix, strip, x.from(row), 1, alone.data() + row * TILE);
        for (int count = 1; count <= NUM_ROWS; ++count) {
            const int first = NUM_ROWS - count;
            kernels.multiply(weights.matrix, strip, x.from(first), count, together.data());
            failures.expect(same_bits(together.data(), alone.data() + first * TILE, count * TILE),
                            "%s, %d columns: %d rows together differ from each alone", format.name, cols, count);
        }
        for (int row = 0; row < NUM_ROWS; ++row) {
            if (row == NAN_ROW) continue;
            for (int lane = 0; lane < TILE && strip * TILE + lane < OUTPUTS; ++lane) {
                double sum = 0, size = 0;
                for (int c = 0; c < cols; ++c) {
                    const double term = weights.value(strip * TILE + lane, c) * x.value(kernels, format.format, row, c);
                    sum += term;
                    size += std::abs(term);
                }
                // integers and minima are multiplied apart: their sum may be far smaller than either
                const double slack = is_float(format.format) ? 1 : block_format(format.format).has_minima() ? 64 : 4;
                failures.expect_near(alone[row * TILE + lane], sum, slack * 2e-6 * size + 1e-37, format.name, row);
            }
        }
        if (is_float(format.format))
            failures.expect(std::isnan(alone[NAN_ROW * TILE]), "%s hides what is not a number", format.name);
    }
}

}  // namespace

void check_products(const Kernels& kernels, Failures& failures) {
    for (const FormatCase& format : FORMATS)
        for (int cols : {32, 40, 96, 352, 512}) {
            if (block_format(format.format).has_factors() && cols % 256) continue;
            for (Fill fill : {Fill::random, Fill::zeros, Fill::ones})
                if (fill == Fill::random || !is_float(format.format))
                    check_matrix(kernels, format, cols, fill, failures);
        }
}

ptrdiff_t multiply_repeatedly(const Kernels& kernels, std::string_view name, int rows, int repeats) {
    constexpr int COLS = 1024;
    for (const FormatCase& format : FORMATS) {
        if (format.name != name) continue;
        const Weights weights(format.format, TILE, COLS, Fill::random);
        std::vector<std::vector<float>> x;
        for (int row = 0; row < rows; ++row) x.push_back(random_normals(COLS));
        Inputs inputs(kernels, x, COLS);
        std::vector<float> out(rows * TILE);
        for (int i = 0; i < repeats; ++i) kernels.multiply(weights.matrix, 0, inputs.from(0), rows, out.data());
        return weights.matrix.strip_bytes;
    }
    return 0;
}

}  // namespace hopskip::checks
