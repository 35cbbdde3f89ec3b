// Attention over one chunk of a cache, against double precision on the keys and values that the cache holds; bitwise
// against one query at a time; and the merging of chunks.
#include <climits>

#include "check.h"

namespace hopskip::checks {

namespace {

constexpr int PLACES = CHUNK + 6 * TILE, MAX_DEPTH = 24;

// Keys and values of one head. What lies at `end` and behind must not be read: it is not a number.
struct Store {
    Store(CacheType type, int head_dim, int end) : layout{type, head_dim} {
        const int blocks = (end + TILE - 1) / TILE;
        keys.assign(blocks * layout.key_block_bytes(), 0);
        values.assign(blocks * layout.value_block_bytes(), 0);
        for (int place = 0; place < blocks * TILE; ++place) {
            const float scale = place < end ? 0.01f * std::abs(random_normal()) + 0.005f : NAN_VALUE;
            const int lane = place % TILE;
            uint8_t* key = keys.data() + place / TILE * layout.key_block_bytes();
            uint8_t* value = values.data() + place / TILE * layout.value_block_bytes();
            if (type == CacheType::int8) {
                std::memcpy(key + lane * 4, &scale, 4);
                std::memcpy(value + lane * 4, &scale, 4);
            }
            for (int e = 0; e < head_dim; ++e) {
                put(key + layout.key_offset(lane, e), 128, place < end, key_of.emplace_back(), scale);
                put(value + layout.value_offset(lane, e), 0, place < end, value_of.emplace_back(), scale);
            }
        }
    }

    double key(int place, int e) const { return key_of[place * layout.head_dim + e]; }
    double value(int place, int e) const { return value_of[place * layout.head_dim + e]; }

    CacheLayout layout;
    std::vector<uint8_t> keys, values;
    std::vector<double> key_of, value_of;

private:
    void put(uint8_t* to, int offset, bool is_number, double& kept, float scale) const {
        const uint32_t x = std::bit_cast<uint32_t>(is_number ? random_normal() : NAN_VALUE);
        const uint32_t upper = x & 0xffff0000u;
        const int q = random_int(-127, 127);
        switch (layout.type) {
            case CacheType::f32: std::memcpy(to, &x, 4), kept = std::bit_cast<float>(x); break;
            case CacheType::bf16:
                std::memcpy(to, reinterpret_cast<const uint8_t*>(&x) + 2, 2), kept = std::bit_cast<float>(upper);
                break;
            case CacheType::int8: *to = static_cast<uint8_t>(q + offset), kept = static_cast<double>(q) * scale; break;
        }
    }
};

struct Case {
    CacheType type;
    int head_dim, num_rows, queries_per_row, begin, end, window, shared_end;  // window 0: none; INT_MAX: no tree

    int num_queries() const { return num_rows * queries_per_row; }
};

class Chunk {
public:
    Chunk(const Kernels& kernels, const Case& c)
        : kernels_(kernels), case_(c), store_(c.type, c.head_dim, c.shared_end == INT_MAX ? c.end : PLACES) {
        const int blocks = blocks_of(c.head_dim), count = c.num_queries();
        queries_.reserve(count * blocks, true);
        for (int q = 0; q < count; ++q) {
            Activations x = queries_.rows_of(blocks).from(q);
            x.half_starts = nullptr;
            for (int e = 0; e < c.head_dim; ++e)
                x.f32[e] = random_normal(1.5f / std::sqrt(static_cast<float>(c.head_dim)));
            kernels.quantize(x.f32, x);
            const int row = q / c.queries_per_row;
            last_.push_back(std::max(-1, c.end - 1 - (c.num_rows - 1 - row) % 9));
            first_.push_back(c.window ? std::max(0, last_[q] - c.window + 1) : 0);
        }
        places_.resize(c.num_rows * MAX_DEPTH);
        if (c.shared_end != INT_MAX)
            for (int& place : places_) place = random_int(c.shared_end, PLACES - 1);
    }

    // Partials of queries first..first+count-1, [count][stride]. Rows stay whole.
    std::vector<float> attend(int first, int count) {
        const ChunkTask task{queries_.rows_of(blocks_of(case_.head_dim)).from(first),
                             count,
                             first_.data() + first,
                             last_.data() + first,
                             case_.queries_per_row,
                             case_.shared_end,
                             places_.data() + first / case_.queries_per_row * MAX_DEPTH,
                             MAX_DEPTH,
                             store_.keys.data(),
                             store_.values.data(),
                             store_.layout,
                             case_.begin,
                             case_.end};
        std::vector<float> scores(count * CHUNK), partials(count * stride());
        std::vector<uint8_t> tile(std::max(store_.layout.key_block_bytes(), store_.layout.value_block_bytes()));
        kernels_.attend_chunk(task, tile.data(), scores.data(), partials.data(), stride());
        return partials;
    }

    void check(int q, const float* partial, Failures& failures) {
        const Activations x = queries_.rows_of(blocks_of(case_.head_dim)).from(q);
        const bool in_bytes = case_.type == CacheType::int8 && kernels_.dots_bytes;
        std::vector<double> scores, sums(case_.head_dim), sizes(case_.head_dim);
        std::vector<int> seen;
        double maximum = -INF, total = 0;
        for (int t = std::max(case_.begin, first_[q]); t < case_.end && t <= last_[q]; ++t) {
            const int row = q / case_.queries_per_row;
            const int place = t < case_.shared_end ? t : places_[row * MAX_DEPTH + t - case_.shared_end];
            double score = 0;
            for (int e = 0; e < case_.head_dim; ++e)
                score +=
                    store_.key(place, e) * (in_bytes ? static_cast<double>(x.q8[e]) * x.scales[e / BLOCK] : x.f32[e]);
            scores.push_back(score);
            seen.push_back(place);
            maximum = std::max(maximum, score);
        }
        for (size_t i = 0; i < seen.size(); ++i) {
            const double weight = std::exp(scores[i] - maximum);
            total += weight;
            for (int e = 0; e < case_.head_dim; ++e) {
                sums[e] += weight * store_.value(seen[i], e);
                sizes[e] = std::max(sizes[e], std::abs(store_.value(seen[i], e)));
            }
        }
        if (seen.empty()) return failures.expect(partial[PARTIAL_SUM] == 0, "a query that sees nothing has a sum");
        failures.expect_near(partial[PARTIAL_MAX], maximum, 2e-5, "maximum of query", q);
        failures.expect_near(partial[PARTIAL_SUM], total, 4e-5 * total, "sum of query", q);
        for (int e = 0; e < case_.head_dim; ++e)
            failures.expect_near(partial[PARTIAL_VALUES + e] / partial[PARTIAL_SUM], sums[e] / total,
                                 (in_bytes ? 1e-3 : 2e-5) * sizes[e], "attention", e);
    }

    ptrdiff_t stride() const { return PARTIAL_VALUES + store_.layout.value_strips() * TILE; }

private:
    const Kernels& kernels_;
    Case case_;
    Store store_;
    ActivationBuffers queries_;
    std::vector<int> first_, last_, places_;
};

void check_case(const Kernels& kernels, const Case& c, Failures& failures) {
    Chunk chunk(kernels, c);
    const std::vector<float> all = chunk.attend(0, c.num_queries());
    for (int row = 0; row < c.num_rows; ++row) {
        const std::vector<float> alone = chunk.attend(row * c.queries_per_row, c.queries_per_row);
        for (int i = 0; i < c.queries_per_row; ++i) {
            const int q = row * c.queries_per_row + i;
            const float *partial = all.data() + q * chunk.stride(), *own = alone.data() + i * chunk.stride();
            failures.expect(same_bits(partial, own, 2) && same_bits(partial + PARTIAL_VALUES, own + PARTIAL_VALUES,
                                                                    chunk.stride() - PARTIAL_VALUES),
                            "cache type %d, head size %d: query %d of %d differs from one of its row alone",
                            static_cast<int>(c.type), c.head_dim, q, c.num_queries());
            chunk.check(q, partial, failures);
        }
    }
}

// Partials of several chunks, some of which a query does not see, in spans of any length.
void check_merge(const Kernels& kernels, Failures& failures) {
    constexpr int SIZE = 2 * TILE, STRIDE = PARTIAL_VALUES + SIZE, CHUNKS = 40;
    std::vector<float> state(STRIDE), partials = random_normals(STRIDE * CHUNKS);
    std::vector<double> sums(SIZE);
    double maximum = -INF, total = 0;
    for (int i = 0; i < CHUNKS; ++i) {
        float* partial = partials.data() + i * STRIDE;
        partial[PARTIAL_SUM] = std::abs(partial[PARTIAL_SUM]) + 0.1f;
        if (i % 7 == 3 || i < 5) {
            std::fill_n(partial, STRIDE, 0.0f);
            partial[PARTIAL_MAX] = -INF;
        }
        maximum = std::max(maximum, static_cast<double>(partial[PARTIAL_MAX]));
    }
    for (int i = 0; i < CHUNKS; ++i) {
        const float* partial = partials.data() + i * STRIDE;
        const double factor = std::exp(partial[PARTIAL_MAX] - maximum);
        total += factor * partial[PARTIAL_SUM];
        for (int e = 0; e < SIZE; ++e) sums[e] += factor * partial[PARTIAL_VALUES + e];
    }
    for (int i = 0, count; i < CHUNKS; i += count) {
        count = std::min({i < 3 ? 1 : SPAN, CHUNKS - i, 1 + i});
        kernels.merge(state.data(), partials.data() + i * STRIDE, STRIDE, count, SIZE);
    }
    failures.expect_near(state[PARTIAL_SUM] * std::exp(state[PARTIAL_MAX] - maximum), total, 1e-5 * total, "merge", -1);
    for (int e = 0; e < SIZE; ++e)
        failures.expect_near(state[PARTIAL_VALUES + e] / state[PARTIAL_SUM], sums[e] / total, 1e-5, "merge", e);
}

}  // namespace

void check_attention(const Kernels& kernels, Failures& failures) {
    for (CacheType type : {CacheType::f32, CacheType::bf16, CacheType::int8}) {
        for (int group : {1, 2, 3, 4, 5, 6, 7, 13})
            check_case(kernels, {type, 64, 1, group, 0, 5 + 11 * group, 0, INT_MAX}, failures);
        for (int head_dim : {2, 6, 30, 112, 512})
            check_case(kernels, {type, head_dim, 3, 2, CHUNK, CHUNK + 37, 0, INT_MAX}, failures);
        check_case(kernels, {type, 32, 9, 2, 0, CHUNK, 17, INT_MAX}, failures);
        check_case(kernels, {type, 32, 9, 1, CHUNK, CHUNK + 4, 0, INT_MAX}, failures);  // some see nothing of it
        check_case(kernels, {type, 48, 5, 3, 0, 150, 0, 131}, failures);                // trees
        check_case(kernels, {type, 48, 7, 2, CHUNK, CHUNK + 20, 0, CHUNK - 3}, failures);
    }
    check_merge(kernels, failures);
}

}  // namespace hopskip::checks
