// What happens to single rows between the products: norm, quantization, SiLU, softmax over chunks of the cache.
// Counts are padded to whole registers by the caller unless said otherwise; padding is zero.

static inline V exponential(V x) {
    // exp(x) = 2^n * exp(r), |r| <= ln 2 / 2; the polynomial is that of Cephes, good to about one unit in the last place.
    V clamped = min(max(x, splat(-87.0f)), splat(88.0f));
    V n = round_even(mul(clamped, splat(1.44269504f)));
    V r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    V y = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = add(fma(mul(r, r), y, r), splat(1.0f));
    return where_less(x, splat(-87.0f), zero(), mul(y, two_to(n)));
}

static void rms_norm(const float* x, const float* weight, float eps, int cols, float* out) {
    const int padded = (cols + BLOCK - 1) / BLOCK * BLOCK;
    V squares = zero();
    for (int i = 0; i < padded; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const V scale = splat(1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(cols) + eps));
    for (int i = 0; i < padded; i += LANES) store(out + i, mul(load(weight + i), mul(load(x + i), scale)));
}

static void quantize(const float* x, int blocks, int8_t* q8, float* scales, int32_t* starts, float* scaled_sums) {
    for (int b = 0; b < blocks; ++b, x += BLOCK, q8 += BLOCK) {
        V largest = zero();
        for (int i = 0; i < BLOCK; i += LANES) largest = max(absolute(load(x + i)), largest);
        const float maximum = reduce_max(largest);
        scales[b] = maximum / 127.0f;
        const V inverse = splat(maximum > 0 ? 127.0f / maximum : 0.0f);
        V sum = zero();
        for (int i = 0; i < BLOCK; i += LANES) {
            V rounded = round_even(mul(load(x + i), inverse));
            store_bytes(q8 + i, to_int(rounded));
            sum = add(sum, rounded);
        }
        const float total = reduce_add(sum);  // exact: integers far below 2^24
        starts[b] = byte_start(static_cast<int32_t>(total));
        scaled_sums[b] = scales[b] * total;
    }
}

static void to_bf16(const float* x, size_t count, uint16_t* out) {
    for (size_t i = 0; i < count; i += LANES) store_bf16(out + i, load(x + i));
}

static void silu_multiply(const float* gate, const float* up, size_t count, float* out) {
    for (size_t i = 0; i < count; i += LANES) {
        V g = load(gate + i);
        store(out + i, mul(div(g, add(splat(1.0f), exponential(sub(zero(), g)))), load(up + i)));
    }
}

static float sum_exp(const float* x, size_t count, float maximum) {  // any count
    V sum = zero();
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) sum = add(sum, exponential(sub(load(x + i), splat(maximum))));
    float rest = 0;
    for (; i < count; ++i) {
        float lanes[LANES];
        store(lanes, exponential(splat(x[i] - maximum)));
        rest += lanes[0];
    }
    return reduce_add(sum) + rest;
}

// Keys of 16 positions as a strip of f32 weights: column e of lane t is key[t][e]. Positions from `count` on repeat the
// last; their scores are masked.
static void pack_keys(const ChunkTask& task, int position, int count, float* tile) {
    const int size = task.head_dim;
    const int unit_columns = task.is_bf16 ? 2 : 1;
    const uint8_t* keys = static_cast<const uint8_t*>(task.keys) + static_cast<size_t>(position) * size * 4 / unit_columns;
    const int units = size / unit_columns, whole = units / LANES * LANES;
    for (int first = 0; first < TILE; first += LANES) {
        const uint8_t* lanes[LANES];
        for (int t = 0; t < LANES; ++t) {
            int own = first + t < count ? first + t : count - 1;
            lanes[t] = keys + static_cast<size_t>(own) * units * 4;
        }
        for (int u = 0; u < whole; u += LANES) {
            I block[LANES];
            for (int t = 0; t < LANES; ++t) block[t] = load_units(lanes[t] + u * 4);
            transpose(block);
            for (int i = 0; i < LANES; ++i) {
                float* column = tile + static_cast<size_t>(u + i) * unit_columns * TILE + first;
                if (task.is_bf16) {
                    store(column, even_bf16(block[i]));
                    store(column + TILE, odd_bf16(block[i]));
                } else {
                    store(column, as_float(block[i]));
                }
            }
        }
        for (int t = 0; t < LANES; ++t) {
            for (int e = whole * unit_columns; e < size; ++e) {
                uint32_t bits = 0;
                __builtin_memcpy(task.is_bf16 ? reinterpret_cast<uint8_t*>(&bits) + 2 : reinterpret_cast<uint8_t*>(&bits),
                                 lanes[t] + e * 4 / unit_columns, 4 / unit_columns);
                __builtin_memcpy(tile + static_cast<size_t>(e) * TILE + first + t, &bits, 4);
            }
        }
    }
}

// values[query][column..] = sum over positions of weight[query][position] * value[position][column..]
template <bool IS_BF16, int R>
static void weigh_values(int rows, const ChunkTask& task, const float* weights, float* partials, size_t stride) {
    if constexpr (R > 1) {
        if (rows != R) return weigh_values<IS_BF16, R - 1>(rows, task, weights, partials, stride);
    }
    const size_t size = static_cast<size_t>(task.head_dim);
    const size_t base = static_cast<size_t>(task.begin) * size;
    const int count = task.end - task.begin;
    const auto* bf16 = static_cast<const uint16_t*>(task.values) + base;
    const auto* f32 = static_cast<const float*>(task.values) + base;
    size_t e = 0;
    for (; e + TILE <= size; e += TILE) {
        V sum[R][PARTS] = {};
        for (int t = 0; t < count; ++t) {
            V value[PARTS];
            UNROLL
            for (int p = 0; p < PARTS; ++p) {
                const size_t at = static_cast<size_t>(t) * size + e + static_cast<size_t>(p * LANES);
                value[p] = IS_BF16 ? load_bf16(bf16 + at) : load(f32 + at);
            }
            UNROLL
            for (int r = 0; r < R; ++r) {
                V weight = splat(weights[r * CHUNK + t]);
                UNROLL
                for (int p = 0; p < PARTS; ++p) sum[r][p] = fma(weight, value[p], sum[r][p]);
            }
        }
        UNROLL
        for (int r = 0; r < R; ++r)
            UNROLL
            for (int p = 0; p < PARTS; ++p) store(partials + stride * r + PARTIAL_VALUES + e + p * LANES, sum[r][p]);
    }
    for (; e < size; ++e) {
        UNROLL
        for (int r = 0; r < R; ++r) {
            float sum = 0;
            for (int t = 0; t < count; ++t) {
                const size_t at = static_cast<size_t>(t) * size + e;
                uint32_t bits = static_cast<uint32_t>(bf16[IS_BF16 ? at : 0]) << 16;
                float value;
                __builtin_memcpy(&value, &bits, 4);
                sum += weights[r * CHUNK + t] * (IS_BF16 ? value : f32[at]);
            }
            partials[stride * r + PARTIAL_VALUES + e] = sum;
        }
    }
}

static void attend_chunk(const ChunkTask& task, float* scratch, float* partials) {
    float* tile = scratch;
    float* scores = scratch + static_cast<size_t>(TILE) * task.padded_head_dim;  // [queries][CHUNK]
    const int blocks = task.padded_head_dim / BLOCK;
    Matrix keys{reinterpret_cast<const uint8_t*>(tile), Format::f32, TILE, task.head_dim, 1, blocks, 0, 0};
    Activations queries{const_cast<float*>(task.queries), nullptr, nullptr, nullptr, nullptr, nullptr, blocks};
    const int count = task.end - task.begin;
    const size_t stride = PARTIAL_VALUES + static_cast<size_t>(task.padded_head_dim);
    const V hidden = splat(-__builtin_inff());
    for (int t = 0; t < count; t += TILE) {
        pack_keys(task, task.begin + t, count - t, tile);
        for (int q = 0; q < task.num_queries; q += MAX_FLOAT_ROWS) {
            const int own = task.num_queries - q < MAX_FLOAT_ROWS ? task.num_queries - q : MAX_FLOAT_ROWS;
            float out[MAX_FLOAT_ROWS * TILE];
            queries.f32 = const_cast<float*>(task.queries) + static_cast<size_t>(q) * task.padded_head_dim;
            run_rows<FloatProduct<Format::f32>, 1, MAX_FLOAT_ROWS>(own, keys, 0, queries, 0, out, 0);
            for (int r = 0; r < own; ++r) {
                const V before = splat(static_cast<float>(task.first[q + r] - task.begin));
                const V after = splat(static_cast<float>(task.last[q + r] - task.begin));
                for (int p = 0; p < TILE; p += LANES) {
                    V index = add(lane_indices(), splat(static_cast<float>(t + p)));
                    V score = where_less(index, before, hidden, load(out + r * TILE + p));
                    store(scores + (q + r) * CHUNK + t + p, where_less(after, index, hidden, score));
                }
            }
        }
    }
    const int padded = (count + TILE - 1) / TILE * TILE;
    for (int q = 0; q < task.num_queries; ++q) {
        float* row = scores + q * CHUNK;
        V largest = hidden, sum = zero();
        for (int t = 0; t < padded; t += LANES) largest = max(load(row + t), largest);
        const float maximum = reduce_max(largest);
        const bool sees_any = maximum > -__builtin_inff();
        for (int t = 0; t < padded; t += LANES) {
            V weight = sees_any ? exponential(sub(load(row + t), splat(maximum))) : zero();
            store(row + t, weight);
            sum = add(sum, weight);
        }
        partials[stride * q + PARTIAL_MAX] = maximum;
        partials[stride * q + PARTIAL_SUM] = reduce_add(sum);
    }
    for (int q = 0; q < task.num_queries; q += MAX_FLOAT_ROWS) {
        const int own = task.num_queries - q < MAX_FLOAT_ROWS ? task.num_queries - q : MAX_FLOAT_ROWS;
        const auto weigh = task.is_bf16 ? weigh_values<true, MAX_FLOAT_ROWS> : weigh_values<false, MAX_FLOAT_ROWS>;
        weigh(own, task, scores + q * CHUNK, partials + stride * q, stride);
    }
}

static void fold(float* state, const float* partial, int padded_head_dim) {
    if (partial[PARTIAL_SUM] == 0) return;  // sees nothing there: the bits of the state must not change
    const int size = PARTIAL_VALUES + padded_head_dim;
    if (state[PARTIAL_SUM] == 0) {
        for (int i = 0; i < size; ++i) state[i] = partial[i];
        return;
    }
    const float maximum = state[PARTIAL_MAX] > partial[PARTIAL_MAX] ? state[PARTIAL_MAX] : partial[PARTIAL_MAX];
    const V old_factor = exponential(splat(state[PARTIAL_MAX] - maximum));
    const V new_factor = exponential(splat(partial[PARTIAL_MAX] - maximum));
    float factors[2][LANES];
    store(factors[0], old_factor);
    store(factors[1], new_factor);
    state[PARTIAL_MAX] = maximum;
    state[PARTIAL_SUM] = state[PARTIAL_SUM] * factors[0][0] + partial[PARTIAL_SUM] * factors[1][0];
    for (int i = PARTIAL_VALUES; i < size; i += LANES)
        store(state + i, fma(load(partial + i), new_factor, mul(load(state + i), old_factor)));
}

static const Kernels TABLE = {NAME,     MULTIPLIES_BF16, multiply, rms_norm, quantize, to_bf16, silu_multiply,
                              sum_exp, attend_chunk,    fold};
