// What happens to single rows between the products: norm, quantization, SiLU, softmax over chunks of the cache.
// Counts are padded to whole registers by the caller unless said otherwise; padding is zero.

constexpr int CACHE_AHEAD = 4 * 1024;  // bytes of keys or values to prefetch

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

// Multiples of a step that are nearest to x[0..count-1]; returns their sum, which is exact.
static inline float round_to_int8(const float* x, int count, float inverse_step, int8_t* out) {
    V sum = zero();
    for (int i = 0; i < count; i += LANES) {
        V rounded = round_even(mul(load(x + i), splat(inverse_step)));
        store_bytes(out + i, to_int(rounded));
        sum = add(sum, rounded);
    }
    return reduce_add(sum);
}

// int8 per block of 32 columns, the largest magnitude (simd_*.h) at 127.
static void quantize(const float* x, int blocks, int8_t* q8, float* scales, int32_t* starts, float* scaled_sums) {
    for (int b = 0; b < blocks; ++b, x += BLOCK, q8 += BLOCK) {
        V largest = zero();
        for (int i = 0; i < BLOCK; i += LANES) largest = max(magnitude(load(x + i)), largest);
        const float maximum = reduce_max(largest);
        const float sum = round_to_int8(x, BLOCK, maximum > 0 ? 127.0f / maximum : 0.0f, q8);
        scales[b] = maximum / 127.0f;
        starts[b] = -128 * static_cast<int32_t>(sum);
        scaled_sums[b] = scales[b] * sum;
    }
}

static float to_int8(const float* x, int count, int8_t* out) {
    V largest = zero();
    for (int i = 0; i < count; i += LANES) largest = max(absolute(load(x + i)), largest);
    const float maximum = reduce_max(largest);
    round_to_int8(x, count, maximum > 0 ? 127.0f / maximum : 0.0f, out);
    return maximum / 127.0f;
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

static float exponentiate(float* x, size_t count, float maximum, float scale) {  // any count
    const auto of = [&](V y) { return exponential(mul(sub(y, splat(maximum)), splat(scale))); };
    V sum = zero();
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const V y = of(load(x + i));
        store(x + i, y);
        sum = add(sum, y);
    }
    float rest = 0;
    for (; i < count; ++i) {
        float lanes[LANES];
        store(lanes, of(splat(x[i])));
        x[i] = lanes[0];
        rest += x[i];
    }
    return reduce_add(sum) + rest;
}

template <CacheType TYPE>
using CacheElement = std::conditional_t<TYPE == CacheType::f32, float, std::conditional_t<TYPE == CacheType::bf16, uint16_t, int8_t>>;

template <CacheType TYPE>
static inline V widened(const CacheElement<TYPE>* p, float scale) {
    if constexpr (TYPE == CacheType::f32) return load(p);
    else if constexpr (TYPE == CacheType::bf16) return load_bf16(p);
    else return mul(load_int8(p), splat(scale));
}

template <class Use>
static inline void with_type(CacheType type, const Use& use) {
    switch (type) {
        case CacheType::f32: return use.template operator()<CacheType::f32>();
        case CacheType::bf16: return use.template operator()<CacheType::bf16>();
        case CacheType::int8: return use.template operator()<CacheType::int8>();
    }
}

// Keys or values of LANES positions: (t, e) gives elements e.. of position t. Straight from the cache, where few queries use
// them, or widened to f32 once for many; the bits are the same.
template <CacheType TYPE>
struct InCache {
    const CacheElement<TYPE>* first;
    const float* scales;
    size_t size;
    V operator()(int t, int e) const {
        return widened<TYPE>(first + static_cast<size_t>(t) * size + e, TYPE == CacheType::int8 ? scales[t] : 1.0f);
    }
};

struct InTile {
    const float* first;
    int size;
    V operator()(int t, int e) const { return load(first + t * size + e); }
};

// Fills a tile with up to LANES positions from `position` on, zeros beyond task.end and head_dim.
template <CacheType TYPE>
static void widen(const ChunkTask& task, const void* cache, const float* scales, int position, const int* places, float* tile) {
    using Element = CacheElement<TYPE>;
    const size_t size = static_cast<size_t>(task.head_dim), padded = static_cast<size_t>(task.padded_head_dim);
    const int count = task.end - position < LANES ? task.end - position : LANES;
    for (int t = 0; t < LANES; ++t, tile += padded) {
        if (t >= count) {
            for (size_t e = 0; e < padded; e += LANES) store(tile + e, zero());
            continue;
        }
        const int place = position + t < task.tail ? position + t : places[position + t - task.tail];
        const Element* from = static_cast<const Element*>(cache) + static_cast<size_t>(place) * size;
        const float scale = TYPE == CacheType::int8 ? scales[place] : 1.0f;
        const auto put = [&](const Element* block, float* to) {
            for (int i = 0; i < BLOCK; i += LANES) store(to + i, widened<TYPE>(block + i, scale));
        };
        size_t e = 0;
        for (; e + BLOCK <= size; e += BLOCK) put(from + e, tile + e);
        if (e < size) {  // a head size that fills no whole block
            Element rest[BLOCK] = {};
            __builtin_memcpy(rest, from + e, (size - e) * sizeof(Element));
            put(rest, tile + e);
        }
    }
}

// Calls use(vectors, first, end) with LANES positions for all queries that find the same there.
template <class Use>
static inline void with_vectors(const ChunkTask& task, const void* cache, const float* scales, int position, float* tile, const Use& use) {
    with_type(task.type, [&]<CacheType TYPE>() {
        const auto* first = static_cast<const CacheElement<TYPE>*>(cache) + static_cast<size_t>(position) * static_cast<size_t>(task.head_dim);
        const size_t bytes = LANES * static_cast<size_t>(task.head_dim) * sizeof(*first);
        for (size_t i = 0; i < bytes; i += 64) prefetch_to_l2(reinterpret_cast<const uint8_t*>(first) + CACHE_AHEAD + i);
        const InTile in_tile{tile, task.padded_head_dim};
        if (position + LANES > task.tail) {
            for (int row = 0; row * task.queries_per_row < task.num_queries; ++row) {
                widen<TYPE>(task, cache, scales, position, task.places + row * task.places_per_row, tile);
                use(in_tile, row * task.queries_per_row, (row + 1) * task.queries_per_row);
            }
        } else if (task.num_queries <= MAX_QUERIES && position + LANES <= task.end && task.head_dim == task.padded_head_dim) {
            use(InCache<TYPE>{first, scales ? scales + position : nullptr, static_cast<size_t>(task.head_dim)}, 0, task.num_queries);
        } else {
            widen<TYPE>(task, cache, scales, position, nullptr, tile);
            use(in_tile, 0, task.num_queries);
        }
    });
}

// Calls use.operator()<n>(first) for consecutive groups of n = R items, and for what remains.
template <int R, class Use>
static inline void in_groups(int count, const Use& use, int first = 0) {
    for (; first + R <= count; first += R) use.template operator()<R>(first);
    if constexpr (R > 1) in_groups<R - 1>(count, use, first);
}

// products[query][first + t] = lanes of query * key t, for 4 keys.
template <int R, class Vectors>
static inline void dot_keys(const float* queries, const Vectors& keys, int padded, V (*products)[LANES], int first) {
    V sum[R][4] = {};
    for (int e = 0; e < padded; e += LANES) {
        V query[R];
        UNROLL
        for (int r = 0; r < R; ++r) query[r] = load(queries + r * padded + e);
        UNROLL
        for (int t = 0; t < 4; ++t) {
            const V key = keys(first + t, e);
            UNROLL
            for (int r = 0; r < R; ++r) sum[r][t] = fma(key, query[r], sum[r][t]);
        }
    }
    UNROLL
    for (int r = 0; r < R; ++r)
        UNROLL
        for (int t = 0; t < 4; ++t) products[r][first + t] = sum[r][t];
}

// sums[query][0..31] += weights[query][t] * values[t][first..first+31] for LANES positions t.
template <int R, class Vectors>
static inline void add_values(const float* weights, const Vectors& values, int first, float* sums, size_t stride) {
    V sum[R][BLOCK / LANES];
    UNROLL
    for (int r = 0; r < R; ++r)
        UNROLL
        for (int i = 0; i < BLOCK / LANES; ++i) sum[r][i] = load(sums + stride * r + i * LANES);
    for (int t = 0; t < LANES; ++t) {
        V weight[R];
        UNROLL
        for (int r = 0; r < R; ++r) weight[r] = splat(weights[r * CHUNK + t]);
        UNROLL
        for (int i = 0; i < BLOCK / LANES; ++i) {
            const V value = values(t, first + i * LANES);
            UNROLL
            for (int r = 0; r < R; ++r) sum[r][i] = fma(weight[r], value, sum[r][i]);
        }
    }
    UNROLL
    for (int r = 0; r < R; ++r)
        UNROLL
        for (int i = 0; i < BLOCK / LANES; ++i) store(sums + stride * r + i * LANES, sum[r][i]);
}

// A group of LANES positions serves all queries. Groups start at multiples of LANES, and every sum takes
// its columns, then its positions, in order: bits depend neither on `end` nor on the other queries.
static void attend_chunk(const ChunkTask& task, float* scratch, float* partials) {
    float* tile = scratch;
    float* scores = scratch + static_cast<size_t>(LANES) * task.padded_head_dim;  // [queries][CHUNK]
    const int padded = task.padded_head_dim;
    const size_t stride = PARTIAL_VALUES + static_cast<size_t>(padded);
    const V hidden = splat(-__builtin_inff());
    for (int position = task.begin; position < task.end; position += LANES) {
        const V index = add(lane_indices(), splat(static_cast<float>(position)));
        with_vectors(task, task.keys, task.key_scales, position, tile, [&](const auto& keys, int first_query, int end_query) {
            in_groups<MAX_QUERIES>(end_query, [&]<int R>(int q) {
                V products[R][LANES];
                for (int first = 0; first < LANES; first += 4) dot_keys<R>(task.queries + q * padded, keys, padded, products, first);
                UNROLL
                for (int r = 0; r < R; ++r) {
                    const V seen = where_less(index, splat(static_cast<float>(task.first[q + r])), hidden, sums(products[r]));
                    store(scores + (q + r) * CHUNK + position - task.begin, where_less(splat(static_cast<float>(task.last[q + r])), index, hidden, seen));
                }
            }, first_query);
        });
    }
    for (int i = 0; i < CACHE_AHEAD; i += 64)
        prefetch_to_l2(static_cast<const uint8_t*>(task.values) + static_cast<size_t>(task.begin) * task.head_dim * task.element_size + i);
    const int count = (task.end - task.begin + LANES - 1) / LANES * LANES;
    for (int q = 0; q < task.num_queries; ++q) {
        float* row = scores + q * CHUNK;
        V largest = hidden, sum = zero();
        for (int t = 0; t < count; t += LANES) largest = max(load(row + t), largest);
        const float maximum = reduce_max(largest);
        const bool sees_any = maximum > -__builtin_inff();
        for (int t = 0; t < count; t += LANES) {
            V weight = sees_any ? exponential(sub(load(row + t), splat(maximum))) : zero();
            store(row + t, weight);
            sum = add(sum, weight);
        }
        float* partial = partials + stride * q;
        partial[PARTIAL_MAX] = maximum;
        partial[PARTIAL_SUM] = reduce_add(sum);
        for (int e = 0; e < padded; e += LANES) store(partial + PARTIAL_VALUES + e, zero());
    }
    for (int position = task.begin; position < task.end; position += LANES) {
        with_vectors(task, task.values, task.value_scales, position, tile, [&](const auto& values, int first_query, int end_query) {
            in_groups<MAX_QUERIES>(end_query, [&]<int R>(int q) {
                for (int e = 0; e < padded; e += BLOCK)
                    add_values<R>(scores + q * CHUNK + position - task.begin, values, e, partials + stride * q + PARTIAL_VALUES + e, stride);
            }, first_query);
        });
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

static const Kernels TABLE = {NAME,          MULTIPLIES_BF16, multiply, rms_norm,     quantize, to_bf16,
                              to_int8, silu_multiply, exponentiate, attend_chunk, fold};
