// Softmax attention over one chunk of the cache. Included by isa_*.cpp after multiply.inl and rows.inl.
//
// Each score, and each element of a weighted sum, has one accumulator that takes columns, or positions, in order: bits
// depend neither on how many queries share a chunk nor on where it ends.

template <CacheType TYPE>
constexpr CacheLayout LAYOUT = {TYPE, TILE};  // for what does not depend on the head size

// Whether the four elements of a unit are multiplied at once: int8 keys with int8 queries, int8 values with bytes of
// weights. All others are widened to f32: bf16 products of bf16 queries and weights would double the error that
// rounding keys and values makes, and splitting these in two to avoid that takes as many products as f32 does.
template <CacheType TYPE>
constexpr bool DOTS = TYPE == CacheType::int8 && DOTS_BYTES;

// Registers of keys or values that fit beside the sums of R queries, of which int8 has two.
template <CacheType TYPE>
constexpr int parts_that_fit(int queries) {
    const int sums = DOTS<TYPE> ? 2 * queries : queries;
    return (sums + 1) * 4 < NUM_REGISTERS ? 4 : (sums + 1) * 2 < NUM_REGISTERS ? 2 : 1;
}

// Element `index` of a unit of keys or values in f32, without the scale.
template <CacheType TYPE, bool IS_KEY>
inline V widened(const uint8_t* unit, int index) {
    const I x = index == 0 ? load_units(unit) : load_units_again(unit);  // no register is left to keep it in
    if constexpr (TYPE == CacheType::f32) {
        return bits<V>(x);
    } else if constexpr (TYPE == CacheType::bf16) {
        return index == 0 ? even_bf16(x) : odd_bf16(x);
    } else if constexpr (IS_KEY) {
        return to_float(bits<I>(bits<U>(x) >> (8 * index) & 255)) - 128.0f;
    } else {
        return to_float(high_byte(bits<I>(bits<U>(x) << (24 - 8 * index))));
    }
}

// Scores of R queries for the keys of P registers of positions: out[query * CHUNK + p * LANES]. units[p] is where the
// units of part p begin, scales[p] its positions' scales.
template <CacheType TYPE, int R, int P>
inline void dot_keys(const Activations& queries, int first, const uint8_t* const (&units)[P], int num_units,
                     const uint8_t* const (&scales)[P], float* out) {
    V sum[R][P] = {};
    const auto block = [&](int r) { return queries.block(first + r); };
    if constexpr (DOTS<TYPE>) {
        constexpr int UNITS = BLOCK / 4;  // that share a scale of the queries
        for (int u = 0; u < num_units; u += UNITS) {
            I dot[R][P];
            UNROLL_FOR (int r = 0; r < R; ++r)
                UNROLL_FOR (int p = 0; p < P; ++p) dot[r][p] = start_of(queries.starts + block(r) + u / UNITS);
            const int end = u + UNITS < num_units ? u + UNITS : num_units;
            for (int i = u; i < end; ++i) {
                I w[P];
                UNROLL_FOR (int p = 0; p < P; ++p) w[p] = byte_weights(load_units(units[p] + i * UNIT_BYTES));
                UNROLL_FOR (int r = 0; r < R; ++r) {
                    const I query = splat_unit(queries.q8 + BLOCK * block(r) + i * 4);
                    UNROLL_FOR (int p = 0; p < P; ++p) dot[r][p] = dot_bytes(dot[r][p], w[p], query);
                }
            }
            UNROLL_FOR (int r = 0; r < R; ++r) {
                const V scale = splat(queries.scales[block(r) + u / UNITS]);
                UNROLL_FOR (int p = 0; p < P; ++p) sum[r][p] = fma(to_float(dot[r][p]), scale, sum[r][p]);
            }
        }
    } else {
        const float* rows[R];
        UNROLL_FOR (int r = 0; r < R; ++r) rows[r] = queries.f32 + BLOCK * block(r);
        constexpr int PER_UNIT = LAYOUT<TYPE>.per_unit();
        for (int u = 0; u < num_units; ++u) {
            UNROLL_FOR (int c = 0; c < PER_UNIT; ++c) {
                V w[P];
                UNROLL_FOR (int p = 0; p < P; ++p) w[p] = widened<TYPE, true>(units[p] + u * UNIT_BYTES, c);
                UNROLL_FOR (int r = 0; r < R; ++r) {
                    const V query = splat(rows[r][u * PER_UNIT + c]);
                    UNROLL_FOR (int p = 0; p < P; ++p) sum[r][p] = fma(w[p], query, sum[r][p]);
                }
            }
        }
    }
    UNROLL_FOR (int r = 0; r < R; ++r)
        UNROLL_FOR (int p = 0; p < P; ++p) {
            if (TYPE == CacheType::int8) sum[r][p] = sum[r][p] * load(reinterpret_cast<const float*>(scales[p]));
            store(out + (first + r) * CHUNK + p * LANES, sum[r][p]);
        }
}

// Weights are made in the place of the scores: f32, or for each TILE positions the higher and then the lower seven of
// fourteen bits. Bytes from the start of a row of them to that of a position that begins a unit:
template <CacheType TYPE>
constexpr int weight_offset(int t) {
    return DOTS<TYPE> ? t / TILE * 2 * TILE + t % TILE : t * 4;
}

// Adds the values of `blocks` blocks, S registers of each position, times the weights of R queries: to f32 sums, or to
// int32 ones for products of bytes.
template <CacheType TYPE, int R, int S>
inline void add_values(const float* weights, const uint8_t* values, int blocks, const CacheLayout& layout, int part,
                       float* sums, ptrdiff_t stride) {
    constexpr int PER_UNIT = LAYOUT<TYPE>.per_unit(), UNITS = TILE / PER_UNIT;
    const auto at = [&](int r, int s) { return sums + stride * r + (part + s) * LANES; };
    const ptrdiff_t unit_bytes = layout.value_strips() * UNIT_BYTES;
    const auto for_units = [&](const auto& use) {  // use(part s -> address, first position)
        const uint8_t* block = values + layout.header_bytes() + part * LANES * 4;
        for (int b = 0; b < blocks; ++b, block += layout.value_block_bytes())
            for (int u = 0; u < UNITS; ++u) {
                const uint8_t* unit = block + u * unit_bytes;
                UNROLL_FOR (int s = 0; s < S; s += PARTS) prefetch(unit + s * LANES * 4 + PREFETCH_AHEAD);
                use([&](int s) { return unit + s * LANES * 4; }, b * TILE + u * PER_UNIT);
            }
    };
    if constexpr (DOTS<TYPE>) {
        I high[R][S] = {}, low[R][S] = {};
        for_units([&](const auto& unit, int t) {
            I v[S];
            UNROLL_FOR (int s = 0; s < S; ++s) v[s] = load_units(unit(s));
            UNROLL_FOR (int r = 0; r < R; ++r) {
                const auto* digits = reinterpret_cast<const uint8_t*>(weights + r * CHUNK) + weight_offset<TYPE>(t);
                const I upper = splat_unit(digits), lower = splat_unit(digits + TILE);
                UNROLL_FOR (int s = 0; s < S; ++s) {
                    high[r][s] = dot_bytes(high[r][s], upper, v[s]);
                    low[r][s] = dot_bytes(low[r][s], lower, v[s]);
                }
            }
        });
        UNROLL_FOR (int r = 0; r < R; ++r)
            UNROLL_FOR (int s = 0; s < S; ++s) {
                const U total = (bits<U>(high[r][s]) << 7) + bits<U>(low[r][s]);
                store_as(at(r, s), load_as<U>(at(r, s)) + total);
            }
    } else {
        V sum[R][S];
        UNROLL_FOR (int r = 0; r < R; ++r)
            UNROLL_FOR (int s = 0; s < S; ++s) sum[r][s] = load(at(r, s));
        for_units([&](const auto& unit, int t) {
            V v[S];
            UNROLL_FOR (int i = 0; i < PER_UNIT; ++i) {
                UNROLL_FOR (int s = 0; s < S; ++s) v[s] = widened<TYPE, false>(unit(s), i);
                UNROLL_FOR (int r = 0; r < R; ++r) {
                    const V weight = splat(weights[r * CHUNK + t + i]);
                    UNROLL_FOR (int s = 0; s < S; ++s) sum[r][s] = fma(v[s], weight, sum[r][s]);
                }
            }
        });
        UNROLL_FOR (int r = 0; r < R; ++r)
            UNROLL_FOR (int s = 0; s < S; ++s) store(at(r, s), sum[r][s]);
    }
}

inline int place_of(const ChunkTask& task, int position, const int* places) {
    return position < task.shared_end ? position : places[position - task.shared_end];
}

// One block as a row sees it: positions from shared_end on lie at places of its own, and what it does not see is zero.
template <CacheType TYPE>
void gather(const ChunkTask& task, bool is_values, int position, const int* places, uint8_t* tile) {
    const CacheLayout& layout = task.layout;
    const uint8_t* blocks = is_values ? task.values : task.keys;
    const ptrdiff_t bytes = is_values ? layout.value_block_bytes() : layout.key_block_bytes();
    __builtin_memcpy(tile, blocks + position / TILE * bytes, static_cast<size_t>(bytes));
    constexpr int SIZE = LAYOUT<TYPE>.element_size(), PER_UNIT = LAYOUT<TYPE>.per_unit();
    for (int lane = 0; lane < TILE; ++lane) {
        const int wanted = position + lane;
        const bool is_seen = wanted < task.end;
        const int source = is_seen ? place_of(task, wanted, places) : wanted;
        if (is_seen && source == wanted) continue;
        const uint8_t* from = blocks + source / TILE * bytes;
        const auto copy = [&](ptrdiff_t to, ptrdiff_t at, int size) {
            if (is_seen)
                __builtin_memcpy(tile + to, from + at, size);
            else
                __builtin_memset(tile + to, 0, size);
        };
        if (layout.header_bytes()) copy(lane * 4, source % TILE * 4, 4);
        if (!is_values) {
            for (int e = 0; e < layout.head_dim; e += PER_UNIT)
                copy(layout.key_offset(lane, e), layout.key_offset(source % TILE, e), 4);
        } else {
            for (int e = 0; e < layout.value_strips() * TILE; ++e)
                copy(layout.value_offset(lane, e), layout.value_offset(source % TILE, e), SIZE);
        }
    }
}

// The weights of one query, of which `scores` [count] are the scores, and the sums that its values are added to.
// scales: of the values, int8 only. Returns what the weights of int8 are to be multiplied by.
template <CacheType TYPE>
inline float softmax(float* scores, int count, int first, int last, const float* scales, float* partial, int padded) {
    const V hidden = splat(-__builtin_inff());
    V largest = hidden, sum = V{};
    const bool sees_all = first <= 0 && last >= count - 1;
    for (int t = 0; t < count; t += LANES) {
        V score = load(scores + t);
        if (!sees_all) {
            const V index = lane_indices() + static_cast<float>(t);
            score = where_less(index, splat(static_cast<float>(first)), hidden, score);
            score = where_less(splat(static_cast<float>(last)), index, hidden, score);
            store(scores + t, score);
        }
        largest = max(score, largest);
    }
    const float maximum = reduce_max(largest);  // of those that are numbers
    const float base = maximum > -__builtin_inff() ? maximum : 0.0f;
    V largest_scaled = V{};
    for (int t = 0; t < count; t += LANES) {
        const V weight = exponential(load(scores + t) - base);
        if constexpr (TYPE == CacheType::int8) {
            const V scaled = weight * load(scales + t);
            store(scores + t, scaled);
            largest_scaled = max(scaled, largest_scaled);
        } else {
            store(scores + t, weight);
        }
        sum += weight;
    }
    const float total = reduce_add(sum);  // zero if it sees nothing, not a number if some score is not
    partial[PARTIAL_MAX] = total != 0 ? base : -__builtin_inff();
    partial[PARTIAL_SUM] = total;
    for (int e = 0; e < padded; e += LANES) store(partial + PARTIAL_VALUES + e, V{});
    if constexpr (!DOTS<TYPE>) return 1.0f;
    constexpr float STEPS = 127 * 128 + 127;
    const float most = reduce_max(largest_scaled), inverse = most > 1e-30f ? STEPS / most : 0.0f;
    auto* digits = reinterpret_cast<int8_t*>(scores);
    for (int t = 0; t < count; t += TILE, digits += 2 * TILE) {
        I steps[PARTS];
        UNROLL_FOR (int p = 0; p < PARTS; ++p) steps[p] = to_int(load(scores + t + p * LANES) * inverse);
        UNROLL_FOR (int p = 0; p < PARTS; ++p) {
            store_bytes(digits + p * LANES, bits<I>(bits<U>(steps[p]) >> 7));
            store_bytes(digits + TILE + p * LANES, bits<I>(bits<U>(steps[p]) & 127));
        }
    }
    return most / STEPS;
}

template <CacheType TYPE>
void attend_chunk_as(const ChunkTask& task, uint8_t* tile, float* scores, float* partials, ptrdiff_t stride) {
    constexpr bool IS_INT8 = TYPE == CacheType::int8;
    constexpr int MAX_GROUP = DOTS<TYPE> ? MAX_QUERIES / 2 : MAX_QUERIES;
    const CacheLayout& layout = task.layout;
    const ptrdiff_t key_bytes = layout.key_block_bytes(), value_bytes = layout.value_block_bytes();
    const int header = layout.header_bytes(), num_units = layout.key_units();
    const int padded = layout.value_strips() * TILE, num_parts = layout.value_strips() * PARTS;
    const int num_blocks = (task.end - task.begin + TILE - 1) / TILE;
    const int first_block = task.begin / TILE;
    // Whole blocks that all queries see alike are used where they lie.
    const int shared_end = task.end < task.shared_end ? task.end : task.shared_end;
    const int num_shared = shared_end <= task.begin ? 0 : (shared_end - task.begin) / TILE;
    const bool is_tree = task.end > task.shared_end;
    const auto places_of = [&](int query) { return task.places + query / task.queries_per_row * task.places_per_row; };
    // The others are gathered, for each row of a tree anew: use(block, first query, end).
    const auto for_other_blocks = [&](bool is_values, const auto& use) {
        const int step = is_tree ? task.queries_per_row : task.num_queries;
        for (int b = num_shared; b < num_blocks; ++b)
            for (int query = 0; query < task.num_queries; query += step) {
                gather<TYPE>(task, is_values, task.begin + b * TILE, places_of(query), tile);
                use(b, query, query + step);
            }
    };

    const auto score = [&]<int B>(const uint8_t* block, int b, int begin, int end) {
        in_groups<MAX_GROUP>(begin, end, [&]<int R>(int query) {
            constexpr int FITTING = parts_that_fit<TYPE>(R) / PARTS, STEP = std::clamp(FITTING, 1, B), P = STEP * PARTS;
            for (int i = 0; i < B; i += STEP) {
                const uint8_t *units[P], *scales[P];
                UNROLL_FOR (int p = 0; p < P; ++p) {
                    scales[p] = block + (i + p / PARTS) * key_bytes + p % PARTS * LANES * 4;
                    units[p] = scales[p] + header;
                }
                dot_keys<TYPE, R, P>(task.queries, query, units, num_units, scales, scores + (b + i) * TILE);
            }
        });
    };
    const uint8_t* keys = task.keys + first_block * key_bytes;
    int b = 0;
    for (; b + BLOCKS_AT_ONCE <= num_shared; b += BLOCKS_AT_ONCE, keys += BLOCKS_AT_ONCE * key_bytes) {
        for (ptrdiff_t i = 0; i < BLOCKS_AT_ONCE * key_bytes; i += 64) prefetch(keys + PREFETCH_AHEAD + i);
        score.template operator()<BLOCKS_AT_ONCE>(keys, b, 0, task.num_queries);
    }
    for (; b < num_shared; ++b, keys += key_bytes) score.template operator()<1>(keys, b, 0, task.num_queries);
    for_other_blocks(false,
                     [&](int block, int query, int end) { score.template operator()<1>(tile, block, query, end); });

    const uint8_t* values = task.values + first_block * value_bytes;
    for (int i = 0; i < PREFETCH_AHEAD; i += 64) prefetch(values + i);
    float value_scales[IS_INT8 ? CHUNK : 1];
    const auto read_scales = [&](int first, const int* places) {
        for (int position = first; position < task.end; ++position) {
            const int place = place_of(task, position, places);
            __builtin_memcpy(value_scales + position - task.begin,
                             task.values + place / TILE * value_bytes + place % TILE * 4, 4);
        }
    };
    if constexpr (IS_INT8) {
        __builtin_memset(value_scales, 0, sizeof value_scales);
        for (int i = 0; i < num_shared; ++i) __builtin_memcpy(value_scales + i * TILE, values + i * value_bytes, 64);
        if (!is_tree) read_scales(task.begin + num_shared * TILE, nullptr);
    }
    for (int q = 0; q < task.num_queries; ++q) {
        if constexpr (IS_INT8)
            if (is_tree && q % task.queries_per_row == 0) read_scales(task.begin + num_shared * TILE, places_of(q));
        float* partial = partials + stride * q;
        const float scale = softmax<TYPE>(scores + q * CHUNK, num_blocks * TILE, task.first_seen[q] - task.begin,
                                          task.last_seen[q] - task.begin, value_scales, partial, padded);
        partial[PARTIAL_SCALE] = scale;
    }

    const auto add = [&](const uint8_t* blocks, int first, int count, int begin, int end) {
        in_groups<MAX_GROUP>(begin, end, [&]<int R>(int query) {
            constexpr int S = parts_that_fit<TYPE>(R);
            const float* weights = scores + query * CHUNK + weight_offset<TYPE>(first * TILE) / 4;
            float* sums = partials + stride * query + PARTIAL_VALUES;
            int part = 0;
            for (; part + S <= num_parts; part += S)
                add_values<TYPE, R, S>(weights, blocks, count, layout, part, sums, stride);
            for (; part < num_parts; ++part) add_values<TYPE, R, 1>(weights, blocks, count, layout, part, sums, stride);
        });
    };
    for (int i = 0, count; i < num_shared; i += count) {  // few enough to stay in the first-level cache meanwhile
        count = std::min(num_shared - i, BLOCKS_AT_ONCE);
        add(values + i * value_bytes, i, count, 0, task.num_queries);
    }
    for_other_blocks(true, [&](int block, int query, int end) { add(tile, block, 1, query, end); });

    if constexpr (DOTS<TYPE>) {
        for (int q = 0; q < task.num_queries; ++q) {
            float *partial = partials + stride * q, *sums = partial + PARTIAL_VALUES;
            for (int e = 0; e < padded; e += LANES)
                store(sums + e, to_float(load_units(sums + e)) * partial[PARTIAL_SCALE]);
        }
    }
}

void attend_chunk(const ChunkTask& task, uint8_t* tile, float* scores, float* partials, ptrdiff_t stride) {
    switch (task.layout.type) {
        case CacheType::f32: return attend_chunk_as<CacheType::f32>(task, tile, scores, partials, stride);
        case CacheType::bf16: return attend_chunk_as<CacheType::bf16>(task, tile, scores, partials, stride);
        case CacheType::int8: return attend_chunk_as<CacheType::int8>(task, tile, scores, partials, stride);
    }
}

// Chunks of a span are weighed against the largest score of all; spans one after the other.
void merge(float* state, const float* partials, ptrdiff_t stride, int count, int padded_head_dim) {
    alignas(64) float factors[SPAN];
    float maximum = -__builtin_inff();
    for (int i = 0; i < SPAN; ++i) {
        factors[i] = i < count ? partials[stride * i + PARTIAL_MAX] : -__builtin_inff();
        maximum = factors[i] > maximum ? factors[i] : maximum;
    }
    if (!(maximum > -__builtin_inff())) return;  // sees nothing there: the bits of the state must not change
    for (int i = 0; i < SPAN; i += LANES) store(factors + i, exponential(load(factors + i) - maximum));
    float old_factor = 0, new_factor = 1, sum = 0;
    const float old_maximum = state[PARTIAL_MAX];
    if (state[PARTIAL_SUM] != 0) {
        const float both = old_maximum > maximum ? old_maximum : maximum;
        old_factor = exponential(splat(old_maximum - both))[0];
        new_factor = exponential(splat(maximum - both))[0];
        maximum = both;
    }
    for (int i = 0; i < count; ++i) sum += factors[i] * partials[stride * i + PARTIAL_SUM];
    state[PARTIAL_MAX] = maximum;
    state[PARTIAL_SUM] = old_factor * state[PARTIAL_SUM] + new_factor * sum;
    for (int e = 0; e < padded_head_dim; e += LANES) {
        V values = V{};
        for (int i = 0; i < count; ++i)
            values = fma(load(partials + stride * i + PARTIAL_VALUES + e), splat(factors[i]), values);
        float* to = state + PARTIAL_VALUES + e;
        store(to, old_factor == 0 ? values * new_factor : fma(load(to), splat(old_factor), values * new_factor));
    }
}
