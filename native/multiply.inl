// Strips of packed weights times rows of activations. Included by isa_*.cpp after simd.inl.
//
// A strip is read once and serves R rows from registers; more rows go in groups over the same strip, which then sits in
// the first-level cache. Each (row, output) has its own accumulator: that is all there is to bit-identical rows.

#define UNROLL_FOR _Pragma("GCC unroll 16") for  // sums[..] then become registers

constexpr int PARTS = TILE / LANES;  // registers per 16 lanes

inline I splat_unit(const void* p) { return splat_int(load_as<uint32_t>(p)); }  // a unit of one row of x, in every lane

// load_units that the compiler cannot merge with an earlier load of the same units.
inline I load_units_again(const uint8_t* p) {
    asm volatile("" : "+r"(p));
    return load_units(p);
}

// Not inlined: together with the code around it, sums would not stay in registers.
template <int R, class Use>
__attribute__((noinline)) void use_group(int size, int first, const Use& use) {
    if (size == R) {
        use.template operator()<R>(first);
    } else if constexpr (R > 1) {
        use_group<R - 1>(size, first, use);
    }
}

// Calls use.operator()<size>(first) for groups of at most MAX items, of nearly equal size: 7 are 4 + 3.
template <int MAX, class Use>
inline void in_groups(int first, int end, const Use& use) {
    for (int groups = (end - first + MAX - 1) / MAX; groups > 0; --groups) {
        const int size = (end - first + groups - 1) / groups;
        use_group<MAX>(size, first, use);
        first += size;
    }
}

// f32 weights with f32 activations, bf16 weights with f32 ones or, where the processor multiplies bf16, with bf16.
template <Format FORMAT>
struct FloatProduct {
    static constexpr int MAX_ROWS = MAX_FLOAT_ROWS;

    template <int R>
    static void run(const Matrix& m, int strip, const Activations& x, int first_row, float* out) {
        constexpr int COLUMNS = FORMAT == Format::f32 ? 1 : 2;  // of a unit
        constexpr bool IN_BF16 = FORMAT == Format::bf16 && MULTIPLIES_BF16;
        const float* rows[R];
        const uint16_t* bf16_rows[R];
        UNROLL_FOR (int r = 0; r < R; ++r) {
            const ptrdiff_t start = BLOCK * x.block(first_row + r);
            rows[r] = x.f32 + start;
            bf16_rows[r] = x.bf16 + start;
        }
        V sum[R][PARTS] = {};
        const uint8_t* unit = m.strip(strip);
        for (int c = 0; c < m.blocks * BLOCK; c += COLUMNS, unit += UNIT_BYTES) {
            prefetch(unit + PREFETCH_AHEAD);
            V w[PARTS];
            if constexpr (IN_BF16) {
                UNROLL_FOR (int p = 0; p < PARTS; ++p) w[p] = bits<V>(load_units(unit + p * LANES * 4));
                UNROLL_FOR (int r = 0; r < R; ++r) {
                    V pair = bits<V>(splat_unit(bf16_rows[r] + c));
                    UNROLL_FOR (int p = 0; p < PARTS; ++p) sum[r][p] = dot_bf16(sum[r][p], w[p], pair);
                }
                continue;
            }
            UNROLL_FOR (int p = 0; p < PARTS; ++p) {
                const I columns = load_units(unit + p * LANES * 4);
                w[p] = FORMAT == Format::f32 ? bits<V>(columns) : even_bf16(columns);
            }
            UNROLL_FOR (int r = 0; r < R; ++r) {
                V column = splat(rows[r][c]);
                UNROLL_FOR (int p = 0; p < PARTS; ++p) sum[r][p] = fma(w[p], column, sum[r][p]);
            }
            if (FORMAT == Format::f32) continue;
            // Read again, not kept: with the sums of six rows there is no register left for them.
            UNROLL_FOR (int p = 0; p < PARTS; ++p) w[p] = odd_bf16(load_units_again(unit + p * LANES * 4));
            UNROLL_FOR (int r = 0; r < R; ++r) {
                V column = splat(rows[r][c + 1]);
                UNROLL_FOR (int p = 0; p < PARTS; ++p) sum[r][p] = fma(w[p], column, sum[r][p]);
            }
        }
        UNROLL_FOR (int r = 0; r < R; ++r)
            UNROLL_FOR (int p = 0; p < PARTS; ++p) store(out + (first_row + r) * TILE + p * LANES, sum[r][p]);
    }
};

// q8 and q4 weights with int8 activations: integers within a block of 32 columns, f32 across blocks.
template <Format FORMAT>
struct IntProduct {
    static constexpr int MAX_ROWS = MAX_INT_ROWS;

    template <int R>
    static void run(const Matrix& m, int strip, const Activations& x, int first_row, float* out) {
        const int8_t* rows[R];
        const float* x_scales[R];
        const int32_t* x_starts[R];
        const float* x_scaled_sums[R];
        UNROLL_FOR (int r = 0; r < R; ++r) {
            const ptrdiff_t start = x.block(first_row + r);
            rows[r] = x.q8 + BLOCK * start;
            x_scales[r] = x.scales + start;
            x_starts[r] = x.starts + start;
            x_scaled_sums[r] = x.scaled_sums + start;
        }
        V sum[PARTS][R] = {};
        constexpr int UNITS = units_per_block(FORMAT);
        for (int b = 0; b < m.blocks; ++b) {
            const uint16_t* header = reinterpret_cast<const uint16_t*>(m.strip(strip) + header_offset(FORMAT, b));
            const uint16_t *scales = header + b % blocks_per_header(FORMAT) * TILE, *minima = header + TILE;
            const uint8_t* units = m.strip(strip) + units_offset(FORMAT, b);
            // every line, or the rest is in vain
            const auto* first = b % blocks_per_header(FORMAT) ? units : units - HEADER_BYTES;
            for (const uint8_t* p = first; p < units + UNITS * UNIT_BYTES; p += 64) prefetch(p + PREFETCH_AHEAD);
            UNROLL_FOR (int p = 0; p < PARTS; ++p) {
                const auto unit = [&](int u) { return load_units(units + (u * PARTS + p) * LANES * 4); };
                const auto column = [&](int r, int c) { return splat_unit(rows[r] + b * BLOCK + c); };
                const V scale = load_f16(scales + p * LANES);
                if constexpr (FORMAT == Format::q8) {
                    I dot[R];
                    UNROLL_FOR (int r = 0; r < R; ++r) dot[r] = splat_unit(x_starts[r] + b);
                    for (int u = 0; u < UNITS; ++u) {
                        const I w = unit(u);
                        UNROLL_FOR (int r = 0; r < R; ++r) pin(dot[r] = dot_bytes(dot[r], w, column(r, u * 4)));
                    }
                    UNROLL_FOR (int r = 0; r < R; ++r)
                        sum[p][r] = fma(to_float(dot[r]), scale * x_scales[r][b], sum[p][r]);
                } else {
                    I dot[R] = {};
                    for (int u = 0; u < UNITS; ++u) {
                        const I w = unit(u), low = low_nibbles(w), high = high_nibbles(w);
                        UNROLL_FOR (int r = 0; r < R; ++r) {
                            dot[r] = dot_nibbles(dot[r], low, column(r, u * 4));
                            pin(dot[r] = dot_nibbles(dot[r], high, column(r, u * 4 + 16)));
                        }
                    }
                    const V minimum = load_f16(minima + p * LANES);
                    // w = scale * nibble + minimum: the minimum multiplies the sum of x
                    UNROLL_FOR (int r = 0; r < R; ++r) {
                        const V with_minimum = fma(minimum, splat(x_scaled_sums[r][b]), sum[p][r]);
                        sum[p][r] = fma(to_float(finish_nibbles(dot[r])), scale * x_scales[r][b], with_minimum);
                    }
                }
            }
        }
        UNROLL_FOR (int r = 0; r < R; ++r)
            UNROLL_FOR (int p = 0; p < PARTS; ++p) store(out + (first_row + r) * TILE + p * LANES, sum[p][r]);
    }
};

template <class Product>
void multiply_as(const Matrix& m, int strip, const Activations& x, int rows, float* out) {
    in_groups<Product::MAX_ROWS>(0, rows, [&]<int R>(int row) { Product::template run<R>(m, strip, x, row, out); });
}

void multiply(const Matrix& m, int strip, const Activations& x, int rows, float* out) {
    switch (m.format) {
        case Format::f32: return multiply_as<FloatProduct<Format::f32>>(m, strip, x, rows, out);
        case Format::bf16: return multiply_as<FloatProduct<Format::bf16>>(m, strip, x, rows, out);
        case Format::q8: return multiply_as<IntProduct<Format::q8>>(m, strip, x, rows, out);
        case Format::q4: return multiply_as<IntProduct<Format::q4>>(m, strip, x, rows, out);
    }
}
