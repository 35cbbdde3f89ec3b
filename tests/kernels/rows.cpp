// What happens to single rows: norm, rounding to bf16 and int8, SiLU.
#include "check.h"

namespace hopskip::checks {

namespace {

void check_norm(const Kernels& kernels, Failures& failures) {
    for (int cols : {2, 32, 100, 576}) {
        const size_t size = padded(cols);
        std::vector<float> x = random_normals(size), weight = random_normals(size), out(size);
        for (size_t i = cols; i < size; ++i) x[i] = weight[i] = 0;
        double squares = 0;
        for (float value : x) squares += static_cast<double>(value) * value;
        kernels.rms_norm(x.data(), weight.data(), 1e-5f, cols, out.data());
        for (int c = 0; c < static_cast<int>(size); ++c) {
            const double expected = weight[c] * (x[c] / std::sqrt(squares / cols + 1e-5));
            failures.expect_near(out[c], expected, 1e-6 * std::abs(expected), "rms_norm", c);
        }
    }
}

// q8 * scale is x, up to half a step; neighbours may share the range, and their magnitudes then sum to 128 at most.
void check_block(const float* x, const int8_t* q8, float scale, int32_t start, float scaled_sum, Failures& failures) {
    float largest = 0, largest_pair = 0;
    int sum = 0;
    for (int c = 0; c < BLOCK; ++c) {
        largest = std::max(largest, std::abs(x[c]));
        largest_pair = std::max(largest_pair, std::abs(x[c]) + std::abs(x[c ^ 1]));
        failures.expect(q8[c] >= -127, "quantize gives %d", q8[c]);
        failures.expect_near(static_cast<double>(q8[c]) * scale, x[c], 0.5001 * scale + 1e-30, "quantize", c);
        sum += q8[c];
    }
    failures.expect(scale >= 0.99999f * largest / 127 && scale <= 1.00001f * largest_pair / 127,
                    "quantize: a scale of %g for magnitudes up to %g", scale, largest);
    failures.expect(start == -128 * sum, "quantize starts sums at %d; expected %d", start, -128 * sum);
    failures.expect_near(scaled_sum, static_cast<double>(scale) * sum, 1e-6 * std::abs(scaled_sum), "sum", 0);
}

void check_quantize(const Kernels& kernels, Failures& failures) {
    constexpr int BLOCKS = 40, NAN_BLOCK = 5;
    std::vector<float> x;
    for (int b = 0; b < BLOCKS; ++b) {
        const float scale = std::pow(10.0f, static_cast<float>(random_int(-33, 30)));
        for (int c = 0; c < BLOCK; ++c) x.push_back(b == 1 ? 0 : b == 2 ? 1 : random_normal(scale));
    }
    x[NAN_BLOCK * BLOCK + 3] = NAN_VALUE;
    std::vector<int8_t> q8(x.size());
    std::vector<float> scales(BLOCKS), scaled_sums(BLOCKS);
    std::vector<int32_t> starts(BLOCKS), half_starts(BLOCKS * 2);
    Activations row{x.data(), nullptr, q8.data(), scales.data(), starts.data(), scaled_sums.data(), nullptr, BLOCKS};
    kernels.quantize(x.data(), row);
    for (int b = 0; b < BLOCKS; ++b)
        if (b != NAN_BLOCK) check_block(&x[b * BLOCK], &q8[b * BLOCK], scales[b], starts[b], scaled_sums[b], failures);
    const std::vector<float> sums_before = scaled_sums;
    row.half_starts = half_starts.data();
    kernels.quantize(x.data(), row);
    for (int half = 0; half < BLOCKS * 2; ++half) {
        if (half / 2 == NAN_BLOCK) continue;
        int sum = 0;
        for (int c = 0; c < BLOCK / 2; ++c) sum += q8[half * BLOCK / 2 + c];
        failures.expect(half_starts[half] == -32 * sum, "quantize has %d for half %d", half_starts[half], half);
        failures.expect(scaled_sums[half / 2] == sums_before[half / 2], "sums depend on whether halves are wanted");
    }
    for (int count : {16, 48, 512}) {
        const float scale = kernels.to_int8(x.data() + 8 * BLOCK, count, q8.data());
        for (int i = 0; i < count; ++i)
            failures.expect_near(static_cast<double>(q8[i]) * scale, x[8 * BLOCK + i], 0.5001 * scale + 1e-30,
                                 "to_int8", i);
    }
}

void check_bf16(const Kernels& kernels, Failures& failures) {
    std::vector<float> x = random_normals(64);
    for (uint32_t low : {0x7fffu, 0x8000u, 0x8001u, 0x18000u}) x.push_back(std::bit_cast<float>(0x3f800000u + low));
    for (float special : {0.0f, -0.0f, INF, -INF, 1e-40f, 3e38f}) x.push_back(special);
    x.resize(80);
    std::vector<uint16_t> out(x.size());
    kernels.to_bf16(x.data(), x.size(), out.data());
    for (size_t i = 0; i < x.size(); ++i) {
        const uint32_t b = std::bit_cast<uint32_t>(x[i]);
        const uint32_t up = (b & 0xffffu) > 0x8000u || ((b & 0xffffu) == 0x8000u && b >> 16 & 1);
        failures.expect(out[i] == (b >> 16) + up, "to_bf16 makes %04x of %08x", out[i], b);
    }
}

void check_silu(const Kernels& kernels, Failures& failures) {
    std::vector<float> gate = random_normals(112, 6), up = random_normals(128);
    for (float edge : {0.0f, 1e-30f, -1e-30f, 40.0f, -40.0f, 86.9f, -86.9f, 100.0f, -100.0f, 1e30f, -1e30f})
        gate.push_back(edge);
    gate.resize(128);
    std::vector<float> out(128);
    kernels.silu_multiply(gate.data(), up.data(), gate.size(), out.data());
    for (int i = 0; i < 128; ++i) {
        const double g = gate[i], expected = g / (1 + std::exp(-g)) * up[i];
        failures.expect_near(out[i], expected, 1e-6 * std::abs(expected) + 1e-35 * std::abs(g), "silu_multiply", i);
    }
    gate[17] = NAN_VALUE;
    kernels.silu_multiply(gate.data(), up.data(), gate.size(), out.data());
    failures.expect(std::isnan(out[17]) && !std::isnan(out[16]) && !std::isnan(out[18]), "silu_multiply hides NaN");
}

}  // namespace

void check_rows(const Kernels& kernels, Failures& failures) {
    check_norm(kernels, failures);
    check_quantize(kernels, failures);
    check_bf16(kernels, failures);
    check_silu(kernels, failures);
}

}  // namespace hopskip::checks
