// What happens to single rows between the products: norm, quantization, SiLU, softmax over chunks of the cache.
// Counts are padded to whole registers by the caller unless said otherwise; padding is zero.

constexpr int CACHE_AHEAD = 4 * 1024;  // bytes of keys or values to prefetch

inline V exponential(V x) {
    // exp(x) = 2^n * exp(r), |r| <= ln 2 / 2; the polynomial is that of Cephes, good to about a unit in the last place.
    V clamped = min(max(x, splat(-87.0f)), splat(88.0f));
    V n = round_even(clamped * 1.44269504f);
    V r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    V y = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    y = fma(y, r, splat(8.3334519073e-3f));
    y = fma(y, r, splat(4.1665795894e-2f));
    y = fma(y, r, splat(1.6666665459e-1f));
    y = fma(y, r, splat(5.0000001201e-1f));
    y = fma(r * r, y, r) + 1.0f;
    return where_less(x, splat(-87.0f), V{}, y * two_to(n));
}

void rms_norm(const float* x, const float* weight, float eps, int cols, float* out) {
    const int padded = (cols + BLOCK - 1) / BLOCK * BLOCK;
    V squares = V{};
    for (int i = 0; i < padded; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const float scale = 1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(cols) + eps);
    for (int i = 0; i < padded; i += LANES) store(out + i, load(weight + i) * (load(x + i) * scale));
}

// Multiples of a step that are nearest to x[0..count-1]; returns their sum, which is exact.
inline float round_to_int8(const float* x, int count, float inverse_step, int8_t* out) {
    V sum = V{};
    for (int i = 0; i < count; i += LANES) {
        V rounded = round_even(load(x + i) * inverse_step);
        store_bytes(out + i, to_int(rounded));
        sum += rounded;
    }
    return reduce_add(sum);
}

// int8 per block of 32 columns, the largest magnitude (isa_*.cpp) at 127.
void quantize(const float* x, int blocks, int8_t* q8, float* scales, int32_t* starts, float* scaled_sums) {
    for (int b = 0; b < blocks; ++b, x += BLOCK, q8 += BLOCK) {
        V largest = V{};
        for (int i = 0; i < BLOCK; i += LANES) largest = max(magnitude(load(x + i)), largest);
        const float maximum = reduce_max(largest);
        const float sum = round_to_int8(x, BLOCK, maximum > 0 ? 127.0f / maximum : 0.0f, q8);
        scales[b] = maximum / 127.0f;
        starts[b] = -128 * static_cast<int32_t>(sum);
        scaled_sums[b] = scales[b] * sum;
    }
}

float to_int8(const float* x, int count, int8_t* out) {
    V largest = V{};
    for (int i = 0; i < count; i += LANES) largest = max(absolute(load(x + i)), largest);
    const float maximum = reduce_max(largest);
    round_to_int8(x, count, maximum > 0 ? 127.0f / maximum : 0.0f, out);
    return maximum / 127.0f;
}

void to_bf16(const float* x, size_t count, uint16_t* out) {
    for (size_t i = 0; i < count; i += LANES) store_bf16(out + i, load(x + i));
}

void silu_multiply(const float* gate, const float* up, size_t count, float* out) {
    for (size_t i = 0; i < count; i += LANES) {
        V g = load(gate + i);
        store(out + i, g / (1.0f + exponential(0.0f - g)) * load(up + i));
    }
}

inline V widened(const float* p, float) { return load(p); }
inline V widened(const uint16_t* p, float) { return load_bf16(p); }
inline V widened(const int8_t* p, float scale) { return load_int8(p) * scale; }

// Keys or values, straight from the cache or from a tile of f32, with the same bits: (t, e) gives elements e.. of
// position t.
template <class Element>
struct VectorsOf {
    const Element* first;
    const float* scales;  // int8 only
    ptrdiff_t size;

    float scale(int t) const { return sizeof(Element) == 1 ? scales[t] : 1.0f; }
    V operator()(int t, int e) const { return widened(first + t * size + e, scale(t)); }
};

// Fills a tile with up to LANES positions from `position` on, zeros beyond task.end and head_dim.
template <class Element>
void widen(const ChunkTask& task, const VectorsOf<Element>& cache, int position, const int* places, float* tile) {
    for (int t = 0; t < LANES; ++t, tile += task.padded_head_dim) {
        if (position + t >= task.end) {
            for (int e = 0; e < task.padded_head_dim; e += LANES) store(tile + e, V{});
            continue;
        }
        const int place = position + t < task.shared_end ? position + t : places[position + t - task.shared_end];
        const Element* from = cache.first + place * cache.size;
        const float scale = cache.scale(place);
        const auto put = [&](const Element* block, float* to) {
            for (int i = 0; i < BLOCK; i += LANES) store(to + i, widened(block + i, scale));
        };
        int e = 0;
        for (; e + BLOCK <= task.head_dim; e += BLOCK) put(from + e, tile + e);
        if (e < task.head_dim) {  // a head size that fills no whole block
            Element rest[BLOCK] = {};
            __builtin_memcpy(rest, from + e, static_cast<size_t>(task.head_dim - e) * sizeof(Element));
            put(rest, tile + e);
        }
    }
}

// Calls use.operator()<n>(first) for consecutive groups of n = R items, and for what remains.
template <int R, class Use>
inline void in_groups(int first, int end, const Use& use) {
    for (; first + R <= end; first += R) use.template operator()<R>(first);
    if constexpr (R > 1) in_groups<R - 1>(first, end, use);
}

// Calls use.operator()<n>(vectors, position, query) for each LANES positions and n queries that find the same there.
// Few queries take them straight from the cache; for many they are widened to f32 once.
template <class Element, class Use>
inline void with_vectors(const ChunkTask& task, const VectorsOf<Element>& cache, float* tile, const Use& use) {
    const VectorsOf<float> in_tile{tile, nullptr, task.padded_head_dim};
    for (int position = task.begin; position < task.end; position += LANES) {
        // not inlined: together with the code around it, sums would not stay in registers
        const auto use_for = [&](const auto& vectors, int first, int end) __attribute__((noinline)) {
            in_groups<MAX_QUERIES>(first, end,
                                   [&]<int R>(int query) { use.template operator()<R>(vectors, position, query); });
        };
        const Element* first = cache.first + position * cache.size;
        const ptrdiff_t bytes = LANES * cache.size * static_cast<ptrdiff_t>(sizeof(Element));
        for (ptrdiff_t i = 0; i < bytes; i += 64)
            prefetch_to_l2(reinterpret_cast<const uint8_t*>(first) + CACHE_AHEAD + i);
        const bool is_tree = position + LANES > task.shared_end;
        const bool is_whole = position + LANES <= task.end && task.head_dim == task.padded_head_dim;
        if (!is_tree && is_whole && task.num_queries <= MAX_QUERIES) {
            use_for(VectorsOf<Element>{first, cache.scales ? cache.scales + position : nullptr, cache.size}, 0,
                    task.num_queries);
            continue;
        }
        const int step = is_tree ? task.queries_per_row : task.num_queries;
        for (int query = 0; query < task.num_queries; query += step) {
            widen(task, cache, position, task.places + query / task.queries_per_row * task.places_per_row, tile);
            use_for(in_tile, query, query + step);
        }
    }
}

template <class Use>
inline void with_vectors(const ChunkTask& task, const CacheVectors& cache, float* tile, const Use& use) {
    const auto run = [&](const auto* data) {
        with_vectors(task, VectorsOf{data, cache.scales, task.head_dim}, tile, use);
    };
    switch (task.type) {
        case CacheType::f32: return run(static_cast<const float*>(cache.data));
        case CacheType::bf16: return run(static_cast<const uint16_t*>(cache.data));
        case CacheType::int8: return run(static_cast<const int8_t*>(cache.data));
    }
}

// products[query][first + t] = lanes of query * key t, for 4 keys.
template <int R, class Vectors>
inline void dot_keys(const float* queries, const Vectors& keys, int padded, V (*products)[LANES], int first) {
    V sum[R][4] = {};
    for (int e = 0; e < padded; e += LANES) {
        V query[R];
        UNROLL_FOR (int r = 0; r < R; ++r) query[r] = load(queries + r * padded + e);
        UNROLL_FOR (int t = 0; t < 4; ++t) {
            const V key = keys(first + t, e);
            UNROLL_FOR (int r = 0; r < R; ++r) sum[r][t] = fma(key, query[r], sum[r][t]);
        }
    }
    UNROLL_FOR (int r = 0; r < R; ++r)
        UNROLL_FOR (int t = 0; t < 4; ++t) products[r][first + t] = sum[r][t];
}

// sums[query][0..31] += weights[query][t] * values[t][first..first+31] for LANES positions t.
template <int R, class Vectors>
inline void add_values(const float* weights, const Vectors& values, int first, float* sums, int stride) {
    V sum[R][BLOCK / LANES];
    UNROLL_FOR (int r = 0; r < R; ++r)
        UNROLL_FOR (int i = 0; i < BLOCK / LANES; ++i) sum[r][i] = load(sums + stride * r + i * LANES);
    for (int t = 0; t < LANES; ++t) {
        V weight[R];
        UNROLL_FOR (int r = 0; r < R; ++r) weight[r] = splat(weights[r * CHUNK + t]);
        UNROLL_FOR (int i = 0; i < BLOCK / LANES; ++i) {
            const V value = values(t, first + i * LANES);
            UNROLL_FOR (int r = 0; r < R; ++r) sum[r][i] = fma(weight[r], value, sum[r][i]);
        }
    }
    UNROLL_FOR (int r = 0; r < R; ++r)
        UNROLL_FOR (int i = 0; i < BLOCK / LANES; ++i) store(sums + stride * r + i * LANES, sum[r][i]);
}

// A group of LANES positions serves all queries. Groups start at multiples of LANES, and every sum takes
// its columns, then its positions, in order: bits depend neither on `end` nor on the other queries.
void attend_chunk(const ChunkTask& task, float* scratch, float* partials) {
    float* tile = scratch;
    const int padded = task.padded_head_dim, stride = PARTIAL_VALUES + padded;
    float* scores = scratch + LANES * padded;  // [queries][CHUNK]
    const V hidden = splat(-__builtin_inff());
    with_vectors(task, task.keys, tile, [&]<int R>(const auto& keys, int position, int query) {
        V products[R][LANES];
        for (int t = 0; t < LANES; t += 4) dot_keys<R>(task.queries + query * padded, keys, padded, products, t);
        const V index = lane_indices() + static_cast<float>(position);
        UNROLL_FOR (int r = 0; r < R; ++r) {
            const V first = splat(static_cast<float>(task.first_seen[query + r]));
            const V last = splat(static_cast<float>(task.last_seen[query + r]));
            const V seen = where_less(index, first, hidden, sums(products[r]));
            store(scores + (query + r) * CHUNK + position - task.begin, where_less(last, index, hidden, seen));
        }
    });
    const ptrdiff_t begin = static_cast<ptrdiff_t>(task.begin) * task.head_dim * element_size(task.type);
    const auto* values = static_cast<const uint8_t*>(task.values.data) + begin;
    for (int i = 0; i < CACHE_AHEAD; i += 64) prefetch_to_l2(values + i);
    const int count = (task.end - task.begin + LANES - 1) / LANES * LANES;
    for (int q = 0; q < task.num_queries; ++q) {
        float* row = scores + q * CHUNK;
        V largest = hidden, sum = V{};
        for (int t = 0; t < count; t += LANES) largest = max(load(row + t), largest);
        const float maximum = reduce_max(largest);
        const bool sees_any = maximum > -__builtin_inff();
        for (int t = 0; t < count; t += LANES) {
            V weight = sees_any ? exponential(load(row + t) - maximum) : V{};
            store(row + t, weight);
            sum += weight;
        }
        float* partial = partials + stride * q;
        partial[PARTIAL_MAX] = maximum;
        partial[PARTIAL_SUM] = reduce_add(sum);
        for (int e = 0; e < padded; e += LANES) store(partial + PARTIAL_VALUES + e, V{});
    }
    with_vectors(task, task.values, tile, [&]<int R>(const auto& values, int position, int query) {
        const float* weights = scores + query * CHUNK + position - task.begin;
        float* sums = partials + stride * query + PARTIAL_VALUES;
        for (int e = 0; e < padded; e += BLOCK) add_values<R>(weights, values, e, sums + e, stride);
    });
}

void fold(float* state, const float* partial, int padded_head_dim) {
    if (partial[PARTIAL_SUM] == 0) return;  // sees nothing there: the bits of the state must not change
    const int size = PARTIAL_VALUES + padded_head_dim;
    if (state[PARTIAL_SUM] == 0) {
        for (int i = 0; i < size; ++i) state[i] = partial[i];
        return;
    }
    const float maximum = state[PARTIAL_MAX] > partial[PARTIAL_MAX] ? state[PARTIAL_MAX] : partial[PARTIAL_MAX];
    const V old_factor = exponential(splat(state[PARTIAL_MAX] - maximum));
    const V new_factor = exponential(splat(partial[PARTIAL_MAX] - maximum));
    state[PARTIAL_MAX] = maximum;
    state[PARTIAL_SUM] = state[PARTIAL_SUM] * old_factor[0] + partial[PARTIAL_SUM] * new_factor[0];
    for (int i = PARTIAL_VALUES; i < size; i += LANES)
        store(state + i, fma(load(partial + i), new_factor, load(state + i) * old_factor));
}
