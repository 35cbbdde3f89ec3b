// What the checks of kernels share: random inputs, and how a failure is told.
#pragma once

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "isa.h"
#include "model.h"

namespace hopskip::checks {

inline std::mt19937 random_bits{1};  // each check begins by seeding it, so that it can be repeated alone

constexpr float NAN_VALUE = std::numeric_limits<float>::quiet_NaN(), INF = std::numeric_limits<float>::infinity();

inline int random_int(int first, int last) { return std::uniform_int_distribution<int>(first, last)(random_bits); }
inline float random_normal(float scale = 1) { return std::normal_distribution<float>(0, scale)(random_bits); }

inline std::vector<float> random_normals(size_t count, float scale = 1) {
    std::vector<float> values(count);
    for (float& value : values) value = random_normal(scale);
    return values;
}

inline bool same_bits(const float* a, const float* b, size_t count) {
    return !std::memcmp(a, b, count * sizeof(float));
}

// Counts what fails, and tells of the first few by name.
class Failures {
public:
    template <class... Values>
    void expect(bool is_right, const char* format, Values... values) {
        if (is_right) return;
        if (++count_ > 10) return;
        char text[256];
        if constexpr (sizeof...(values) > 0)
            std::snprintf(text, sizeof text, format, values...);
        else
            std::snprintf(text, sizeof text, "%s", format);
        std::printf("  FAILED: %s\n", text);
    }
    void expect_near(double found, double expected, double tolerance, const char* what, int index) {
        expect(std::abs(found - expected) <= tolerance, "%s [%d] is %.9g; expected %.9g within %.3g", what, index,
               found, expected, tolerance);
    }
    int count() const { return count_; }

private:
    int count_ = 0;
};

void check_products(const Kernels& kernels, Failures& failures);
void check_rows(const Kernels& kernels, Failures& failures);
void check_attention(const Kernels& kernels, Failures& failures);
void check_choosing(const Kernels& kernels, Failures& failures);
void check_threads(Failures& failures);

// products.cpp: multiplies `repeats` times, for counting instructions; returns the bytes of weights that one time
// reads.
ptrdiff_t multiply_repeatedly(const Kernels& kernels, std::string_view format, int rows, int repeats);

}  // namespace hopskip::checks
