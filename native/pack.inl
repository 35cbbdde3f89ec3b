// Quantizing 16 rows at once, one in each lane, so that nothing is summed across lanes. Columns are float [32][16]: a
// block of each row of a strip. Included by isa_*.cpp after simd.inl.

inline V to_half_and_back(V x, uint16_t* to) {
    store_f16(to, x);
    return load_f16(to);
}
inline V reciprocal(V x) { return where_less(V{}, absolute(x), splat(1.0f) / x, splat(1.0f)); }  // of 0: 1
inline I at_byte(V whole, int byte) { return bits<I>(bits<U>(to_int(whole)) << 8 * byte); }

// q8: the largest magnitude of a block at 127.
void pack_q8(const float* columns, uint16_t* scales, uint8_t* units) {
    for (int p = 0; p < PARTS; ++p) {
        const auto column = [&](int c) { return load(columns + c * TILE + p * LANES); };
        V largest = V{};
        for (int c = 0; c < BLOCK; ++c) largest = max(absolute(column(c)), largest);
        const V inverse = reciprocal(to_half_and_back(largest * (1.0f / 127), scales + p * LANES));
        for (int u = 0; u < BLOCK / 4; ++u) {
            I word = splat_int(0x80808080u);  // values are stored as value + 128: with the sign bit turned over
            for (int j = 0; j < 4; ++j) {
                const V level = min(max(round_even(column(u * 4 + j) * inverse), splat(-127.0f)), splat(127.0f));
                word ^= bits<I>(bits<U>(at_byte(level, j)) & 0xffu << 8 * j);
            }
            store_as(units + (u * PARTS + p) * LANES * 4, word);
        }
    }
}

// q4: scale and minimum of each block minimise its squared error, weighted by `weights`, which sum to 1. From several
// ranges, each a shrunken [minimum, maximum]: assign the nearest levels, fit scale and minimum to them by least
// squares, and so on once more; the best of all is kept.
void pack_q4(const float* columns, const float* weights, uint16_t* header, uint8_t* units) {
    for (int p = 0; p < PARTS; ++p) {
        const auto column = [&](int c) { return load(columns + c * TILE + p * LANES); };
        uint16_t half[LANES];
        const auto level = [&](int c, V inverse, V minimum) {
            return min(max(round_even((column(c) - minimum) * inverse), V{}), splat(15.0f));
        };
        V low = column(0), high = low, mean = V{};
        for (int c = 0; c < BLOCK; ++c) {
            low = min(low, column(c));
            high = max(high, column(c));
            mean = fma(column(c), splat(weights[c]), mean);
        }
        const V middle = (low + high) * 0.5f, reach = (high - low) * 0.5f;
        V least = splat(__builtin_inff());
        V best_scale = to_half_and_back(reach * (2.0f / 15), half);  // kept where it is too large: it is refused then
        V best_minimum = to_half_and_back(middle - reach, half);
        for (const float shrink : {1.0f, 0.95f, 0.9f, 0.85f, 0.8f}) {
            V scale = to_half_and_back(reach * (shrink * 2 / 15), half);
            V minimum = to_half_and_back(middle - reach * shrink, half);
            for (int round = 0; round < 2; ++round) {
                const V inverse = reciprocal(scale);
                V levels = V{}, squares = V{}, products = V{};
                for (int c = 0; c < BLOCK; ++c) {
                    const V found = level(c, inverse, minimum), weighted = found * weights[c];
                    levels += weighted;
                    squares = fma(weighted, found, squares);
                    products = fma(weighted, column(c) - mean, products);
                }
                const V fit = products / max(squares - levels * levels, splat(1e-12f));
                minimum = to_half_and_back(mean - fit * levels, half);
                scale = to_half_and_back(fit, half);
            }
            const V inverse = reciprocal(scale);
            V error = V{};
            for (int c = 0; c < BLOCK; ++c) {
                const V off = fma(level(c, inverse, minimum), scale, minimum - column(c));
                error = fma(off * weights[c], off, error);
            }
            best_scale = where_less(error, least, scale, best_scale);
            best_minimum = where_less(error, least, minimum, best_minimum);
            least = min(error, least);
        }
        store_f16(header + p * LANES, best_scale);
        store_f16(header + TILE + p * LANES, best_minimum);
        const V inverse = reciprocal(best_scale);
        for (int u = 0; u < 4; ++u) {
            I word{};
            for (int j = 0; j < 4; ++j) {
                const int c = u * 4 + j;
                word |= at_byte(
                    fma(level(c + 16, inverse, best_minimum), splat(16.0f), level(c, inverse, best_minimum)), j);
            }
            store_as(units + (u * PARTS + p) * LANES * 4, word);
        }
    }
}
