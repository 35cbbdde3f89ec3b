// The choice of tokens: against sorting, against double precision, and bitwise against the portable kernels, for noise
// is the same everywhere.
#include <algorithm>
#include <numeric>

#include "check.h"

namespace hopskip::checks {

namespace {

struct Logits {
    explicit Logits(const Kernels& kernels, int count) : blocks(choice_blocks_of(count)) {
        x = random_normals(blocks * CHOICE_BLOCK, 4);
        for (int i = 0; i < count / 8; ++i) x[random_int(0, count - 1)] = x[random_int(0, count - 1)];  // equal ones
        std::fill(x.begin() + count, x.end(), -INF);
        maxima.resize(blocks);
        kernels.block_maxima(x.data(), blocks, maxima.data());
        for (int i = 0; i < blocks * CHOICE_BLOCK; ++i) ids.push_back(i * 3 + 5);
        ranked.resize(x.size());
        std::iota(ranked.begin(), ranked.end(), 0);
        std::stable_sort(ranked.begin(), ranked.end(), [&](int a, int b) { return x[a] > x[b]; });
    }
    LogitsView view(const NoiseKey* key, bool has_ids) const {
        return {x.data(), maxima.data(), blocks, has_ids ? ids.data() : nullptr, key, x[ranked[0]], 0.8f};
    }
    double weight(int i) const { return std::exp((static_cast<double>(x[i]) - x[ranked[0]]) * 0.8f); }

    int blocks;
    std::vector<float> x, maxima;
    std::vector<int32_t> ids;
    std::vector<int> ranked;
};

double gumbel(int32_t id, NoiseKey key) {  // see choose.inl
    uint32_t x = static_cast<uint32_t>(id) ^ key.first;
    x = (x ^ x >> 17) * 0xed5ad4bbu;
    x = (x ^ x >> 11 ^ key.second) * 0xac4c1b51u;
    x = (x ^ x >> 15) * 0x31848babu;
    x ^= x >> 14;
    return -std::log(-std::log1p(-(x + 0.5) / 4294967296.0));
}

void check_best(const Kernels& kernels, const Logits& logits, const NoiseKey* key, bool has_ids, Failures& failures) {
    for (int number : {1, 2, 7}) {
        std::vector<float> sums(number), portable_sums(number);
        std::vector<int32_t> indices(number), portable_indices(number);
        double mass = 0, expected_mass = 0;
        const LogitsView view = logits.view(key, has_ids);
        kernels.best_sums(view, number, sums.data(), indices.data(), &mass);
        find_isa("portable")->kernels().best_sums(view, number, portable_sums.data(), portable_indices.data(), nullptr);
        failures.expect(same_bits(sums.data(), portable_sums.data(), number) && indices == portable_indices,
                        "best_sums are not those of the portable kernels");
        for (size_t i = 0; i < logits.x.size(); ++i) expected_mass += logits.weight(i);
        failures.expect_near(mass, expected_mass, 1e-5 * expected_mass, "mass", number);
        std::vector<double> expected;
        for (size_t i = 0; i < logits.x.size(); ++i) {
            const double noise = key ? gumbel(has_ids ? logits.ids[i] : static_cast<int32_t>(i), *key) : 0;
            expected.push_back((static_cast<double>(logits.x[i]) - view.maximum) * view.scale + noise);
        }
        for (int i = 0; i < number; ++i) {
            if (!key) failures.expect(indices[i] == logits.ranked[i], "best_sums: place %d is %d", i, indices[i]);
            failures.expect_near(sums[i], expected[indices[i]], 1e-5, "best_sums", i);
            std::nth_element(expected.begin(), expected.begin() + i, expected.end(), std::greater<>());
            failures.expect_near(sums[i], expected[i], 1e-5, "best_sums, by rank", i);
            break;  // nth_element has moved the others
        }
    }
}

void check_kept(const Kernels& kernels, const Logits& logits, Failures& failures) {
    for (int rank : {0, 1, 9, 100}) {
        const int edge = logits.ranked[rank];
        std::vector<float> kept = logits.x;
        kernels.keep_before(kept.data(), logits.blocks, logits.x[edge], edge);
        double expected_mass = 0;
        for (size_t i = 0; i < kept.size(); ++i) {
            const bool is_before =
                logits.x[i] > logits.x[edge] || (logits.x[i] == logits.x[edge] && static_cast<int>(i) < edge);
            failures.expect(kept[i] == (is_before ? logits.x[i] : -INF), "keep_before rank %d", rank);
            if (is_before) expected_mass += logits.weight(i);
        }
        const double mass = kernels.mass_before(logits.view(nullptr, false), logits.x[edge], edge);
        failures.expect_near(mass, expected_mass, 1e-5 * expected_mass, "mass_before", rank);
    }
    std::vector<float> kept = logits.x;
    const float maximum = logits.x[logits.ranked[0]];
    kernels.keep_from(kept.data(), logits.blocks, maximum, 0.8f, -3);
    for (size_t i = 0; i < kept.size(); ++i)
        failures.expect(kept[i] == ((logits.x[i] - maximum) * 0.8f < -3 ? -INF : logits.x[i]), "keep_from");
}

}  // namespace

void check_choosing(const Kernels& kernels, Failures& failures) {
    for (int count : {130, 1000, 5000}) {
        const Logits logits(kernels, count);
        for (int b = 0; b < logits.blocks; ++b) {
            const float* block = logits.x.data() + b * CHOICE_BLOCK;
            failures.expect(logits.maxima[b] == *std::max_element(block, block + CHOICE_BLOCK), "block_maxima");
        }
        check_best(kernels, logits, nullptr, false, failures);
        for (int i = 0; i < 20; ++i) {
            const NoiseKey key{static_cast<uint32_t>(random_bits()), static_cast<uint32_t>(random_bits())};
            check_best(kernels, logits, &key, i % 2, failures);
        }
        check_kept(kernels, logits, failures);
    }
}

}  // namespace hopskip::checks
