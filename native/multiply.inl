// Strips of packed weights times rows of activations. Included by isa_*.cpp after simd.inl.
//
// A strip is read once and serves R rows from registers; more rows go in groups over the same strip, which then sits in
// the first-level cache. Each (row, output) has its own accumulator: that is all there is to bit-identical rows.

#ifdef __clang__
#define UNROLL_FOR _Pragma("clang loop unroll(full)") for
#else
#define UNROLL_FOR _Pragma("GCC unroll 16") for  // sums[..] then become registers
#endif

constexpr int PARTS = TILE / LANES;  // registers per 16 lanes

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

// Integers of a block, as unsigned bytes of one register: of the four columns of a group (formats.h).
template <Format FORMAT>
struct Groups {
    static constexpr BlockFormat F = block_format(FORMAT);
    static constexpr int TWO_BITS = F.bits & 4 ? 4 : 0,
                         ONE_BIT = F.bits & 4 ? 4 : 2;  // the unit, and the bit, they start at

    const uint8_t* units;
    int part;

    I unit(int u) const { return load_units(units + (u * PARTS + part) * LANES * 4); }
    // Bits of all bytes, from bit `from` of each to bit `to`.
    template <int MASK>
    static I moved(I x, int from, int to) {
        const U u = bits<U>(x);
        return bits<I>((from > to ? u >> (from - to) : u << (to - from)) & (MASK * 0x01010101u << to));
    }
    I operator[](int group) const {  // constant where this is called
        if constexpr (F.bits == 8) return unit(group);
        I w{};
        if constexpr (F.bits & 4) w = group < 4 ? low_nibbles(unit(group)) : high_nibbles(unit(group - 4));
        if constexpr (F.bits & 2) w |= moved<3>(unit(TWO_BITS + group / 4), group % 4 * 2, TWO_BITS);
        if constexpr (F.bits & 1) w |= moved<1>(unit(F.bits - 1), group, ONE_BIT);
        if constexpr (F.has_table) w = look_up(table_of(FORMAT), w);
        return w;
    }
};

// Quantized weights with int8 activations: integers within a block of 32 columns, or half of one, f32 across blocks.
template <Format FORMAT>
struct IntProduct {
    static constexpr BlockFormat F = block_format(FORMAT);
    static constexpr int MAX_ROWS = F.has_halves ? MAX_INT_ROWS * 2 / 3 : MAX_INT_ROWS;  // halves take registers
    static constexpr int HALVES = F.has_halves ? 2 : 1, GROUPS = 8 / HALVES;             // that are summed as integers
    static constexpr bool IS_WIDE = F.center == 128;  // integers take all of their unsigned byte
    static constexpr bool SUMS_WORDS = !F.has_table && F.bits <= MAX_WORD_BITS;
    static constexpr int SHIFT = F.center ? __builtin_ctz((F.has_halves ? 32 : 128) / F.center) : 0;

    template <int R>
    static void run(const Matrix& m, int strip, const Activations& x, int first_row, float* out) {
        const int8_t* rows[R];
        const float* x_scales[R];
        const int32_t* x_starts[R];
        const float* x_scaled_sums[R];
        UNROLL_FOR (int r = 0; r < R; ++r) {
            const ptrdiff_t block = x.block(first_row + r);
            rows[r] = x.q8 + BLOCK * block;
            x_scales[r] = x.scales + block;
            x_starts[r] = F.has_halves ? x.half_starts + 2 * block : x.starts + block;
            x_scaled_sums[r] = x.scaled_sums + block;
        }
        V sum[PARTS][R] = {};
        const uint8_t* header = m.strip(strip);
        for (int b = 0; b < m.blocks;) {
            const uint8_t* units = header + F.header_bytes();
            // every line, or the rest is in vain
            for (const uint8_t* p = header; p < units; p += 64) prefetch(p + PREFETCH_AHEAD);
            const int left = m.blocks - b, count = left < F.blocks_per_header ? left : F.blocks_per_header;
            for (int i = 0; i < (F.blocks_per_header == 1 ? 1 : count); ++i, ++b, units += F.units() * UNIT_BYTES) {
                for (int u = 0; u < F.units(); ++u) prefetch(units + u * UNIT_BYTES + PREFETCH_AHEAD);
                UNROLL_FOR (int p = 0; p < PARTS; ++p) {
                    const Groups<FORMAT> groups{units, p};
                    UNROLL_FOR (int half = 0; half < HALVES; ++half) {
                        I dot[R];
                        UNROLL_FOR (int r = 0; r < R; ++r)
                            dot[r] = SUMS_WORDS || F.has_minima() ? I{} : start(x_starts[r], b, half);
                        UNROLL_FOR (int g = 0; g < GROUPS; ++g) {
                            const int group = group_at(half, g);
                            const auto w = IS_WIDE ? byte_weights(groups[group]) : groups[group];
                            UNROLL_FOR (int r = 0; r < R; ++r) {
                                const auto four = column_of(rows[r] + b * BLOCK, group * 4);
                                if constexpr (SUMS_WORDS)
                                    pin(dot[r] = add_words(dot[r], w, four));
                                else
                                    pin(dot[r] = dot_bytes(dot[r], w, four));
                            }
                        }
                        const Scales s(header, i, half, p);
                        UNROLL_FOR (int r = 0; r < R; ++r) {
                            if constexpr (SUMS_WORDS) dot[r] = sum_words(dot[r]);
                            if constexpr (SUMS_WORDS && !F.has_minima())
                                dot[r] = add_ints(dot[r], start(x_starts[r], b, half));
                            if constexpr (F.has_minima()) {  // each multiplies the sum of x
                                float scaled_sum = x_scaled_sums[r][b];
                                if constexpr (F.has_halves)
                                    scaled_sum = static_cast<float>(x_starts[r][b * 2 + half]) * x_scales[r][b] / -32;
                                sum[p][r] = fma(s.minimum, splat(scaled_sum), sum[p][r]);
                            }
                            sum[p][r] = fma(to_float(dot[r]), s.scale * x_scales[r][b], sum[p][r]);
                        }
                    }
                }
            }
            header = units;
        }
        UNROLL_FOR (int r = 0; r < R; ++r)
            UNROLL_FOR (int p = 0; p < PARTS; ++p) store(out + (first_row + r) * TILE + p * LANES, sum[p][r]);
    }

private:
    // In the order in which units hold them.
    static constexpr int group_at(int half, int index) {
        return !F.has_halves && F.bits & 4 ? index % 2 * 4 + index / 2 : half * GROUPS + index;
    }
    // -center * (sum of x), where sums begin.
    static I start(const int32_t* starts, int block, int half) {
        if constexpr (IS_WIDE) return start_of(starts + block);
        return shift_right<SHIFT>(splat_unit(starts + (F.has_halves ? block * 2 + half : block)));
    }

    struct Scales {
        V scale, minimum{};

        Scales(const uint8_t* header, int index, int half, int part) {
            const auto f16 = [&](int i) {
                return load_f16(reinterpret_cast<const uint16_t*>(header) + i * TILE + part * LANES);
            };
            const auto factors = [&](int i) {
                return load_int8(header + HEADER_BYTES + index * FACTOR_BYTES + i * TILE + part * LANES);
            };
            if constexpr (!F.has_factors()) {
                scale = f16(F.has_minima() ? 0 : index);
                if constexpr (F.has_minima()) minimum = f16(1);
            } else if constexpr (!F.has_halves) {
                scale = f16(0) * to_float(factors(0));
                minimum = f16(1) * to_float(factors(1));
            } else if constexpr (F.has_minima()) {
                const U both = bits<U>(factors(half));
                scale = f16(0) * to_float(bits<I>(both & 15));
                minimum = f16(1) * to_float(bits<I>(both >> 4 & 15));
            } else {
                scale = f16(0) * to_float(factors(half));
            }
        }
    };
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
        case Format::q4_0: return multiply_as<IntProduct<Format::q4_0>>(m, strip, x, rows, out);
        case Format::q5_0: return multiply_as<IntProduct<Format::q5_0>>(m, strip, x, rows, out);
        case Format::q5_1: return multiply_as<IntProduct<Format::q5_1>>(m, strip, x, rows, out);
        case Format::iq4: return multiply_as<IntProduct<Format::iq4>>(m, strip, x, rows, out);
        case Format::mxfp4: return multiply_as<IntProduct<Format::mxfp4>>(m, strip, x, rows, out);
        case Format::q2_k: return multiply_as<IntProduct<Format::q2_k>>(m, strip, x, rows, out);
        case Format::q3_k: return multiply_as<IntProduct<Format::q3_k>>(m, strip, x, rows, out);
        case Format::q4_k: return multiply_as<IntProduct<Format::q4_k>>(m, strip, x, rows, out);
        case Format::q5_k: return multiply_as<IntProduct<Format::q5_k>>(m, strip, x, rows, out);
        case Format::q6_k: return multiply_as<IntProduct<Format::q6_k>>(m, strip, x, rows, out);
    }
}
