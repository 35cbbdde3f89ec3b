// Choosing tokens: noise, and the best sums of logits and noise. Included by isa_*.cpp after rows.inl.
//
// The noise of a token is a function of a key and its id alone, and has the same bits in every instruction set, in
// numpy and in PyTorch (src/hopskip/sampling.py): 32-bit integer arithmetic, then float additions and products, each
// rounded by itself. So nothing here may be fused.

// triple32 (Chris Wellons, hash-prospector), with one half of the key before it and the other within.
inline U random_bits(U x, NoiseKey key) {
    x ^= key.first;
    x = (x ^ x >> 17) * 0xed5ad4bbu;
    x = (x ^ x >> 11 ^ key.second) * 0xac4c1b51u;
    x = (x ^ x >> 15) * 0x31848babu;
    return x ^ x >> 14;
}

// log(1 + f) + exponent * log 2 for sqrt(1/2) <= 1 + f < sqrt(2): the polynomial is that of Cephes.
inline V logarithm(V f, V exponent) {
    V y = f * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    const V square = f * f;
    y = y * f * square - exponent * 2.12194440e-4f;
    y = y - square * 0.5f;
    return f + y + exponent * 0.693359375f;
}

// A positive normal number as 2^exponent * (1 + f).
inline V split(V x, V& exponent) {
    typedef int32_t Signed __attribute__((vector_size(LANES * 4)));
    const Signed e = (bits<Signed>(x) - 0x3f3504f3) >> 23;
    exponent = __builtin_convertvector(e, V);
    return bits<V>(bits<Signed>(x) - (e << 23)) - 1.0f;
}

// Gumbel noise: -log(E), E = -log(1 - v), v = (random + 1/2) / 2^32. E has full precision where it is small, which is
// where a token wins.
inline V gumbel(U random) {
    const V halves = splat(0.5f);
    const V v = (to_float(bits<I>(random & 0x3fffffffu)) + halves) * 0x1p-32f;  // where random < 2^30
    const V rest = (to_float(bits<I>(~random >> 1)) + halves) * 0x1p-31f;       // 1 - v elsewhere
    V exponent;
    const V f = split(rest, exponent);
    const V is_small = to_float(bits<I>(random >> 30));  // 0 where random < 2^30
    const V chosen_f = where_less(is_small, halves, -v, f),
            chosen_exponent = where_less(is_small, halves, V{}, exponent);
    const V waiting = -logarithm(chosen_f, chosen_exponent);
    const V g = split(waiting, exponent);
    return -logarithm(g, exponent);
}

// The largest of each CHOICE_BLOCK of numbers. Returns the largest of all; NaN if one of them is that.
float block_maxima(const float* x, int blocks, float* maxima) {
    V largest_of_all = splat(-__builtin_inff());
    U is_nan = U{};
    for (int b = 0; b < blocks; ++b, x += CHOICE_BLOCK) {
        V largest = splat(-__builtin_inff());
        for (int i = 0; i < CHOICE_BLOCK; i += LANES) {
            const V y = load(x + i);
            largest = max(y, largest);
            is_nan |= bits<U>(y != y);
        }
        maxima[b] = reduce_max(largest);
        largest_of_all = max(largest, largest_of_all);
    }
    return any(bits<I>(is_nan)) ? __builtin_nanf("") : reduce_max(largest_of_all);
}

inline U as_lanes(int first) { return bits<U>(to_int(lane_indices())) + static_cast<uint32_t>(first); }

// x <- minus infinity wherever a number does not rank before (value, index): larger, or equal and further in front.
void keep_before(float* x, int blocks, float value, int index) {
    const V hidden = splat(-__builtin_inff()), edge = splat(value), at = splat(static_cast<float>(index));
    for (int i = 0; i < blocks * CHOICE_BLOCK; i += LANES) {
        const V y = load(x + i);
        const V if_equal = where_less(lane_indices() + static_cast<float>(i), at, y, hidden);
        store(x + i, where_less(edge, y, y, where_less(y, edge, hidden, if_equal)));
    }
}

// x <- minus infinity wherever (x - maximum) * scale is below the least.
void keep_from(float* x, int blocks, float maximum, float scale, float least) {
    for (int i = 0; i < blocks * CHOICE_BLOCK; i += LANES) {
        const V y = load(x + i);
        store(x + i, where_less((y - maximum) * scale, splat(least), splat(-__builtin_inff()), y));
    }
}

inline V weight_of(const LogitsView& logits, V x) { return exponential((x - logits.maximum) * logits.scale); }

// The largest of a block as its log-probability beside that of the best token.
inline float largest_of(const LogitsView& logits, int block) {
    return (logits.maxima[block] - logits.maximum) * logits.scale;
}

// The sum of exp((x - maximum) * scale) over what ranks before (value, index). Few blocks have any of it.
double mass_before(const LogitsView& logits, float value, int index) {
    const V edge = splat(value);
    double mass = 0;
    for (int b = 0; b < logits.blocks; ++b) {
        if (logits.maxima[b] < value) continue;
        V sum = V{};
        for (int i = b * CHOICE_BLOCK; i < (b + 1) * CHOICE_BLOCK; i += LANES) {
            const V x = load(logits.x + i), weight = weight_of(logits, x);
            const V at = lane_indices() + static_cast<float>(i);
            const V if_equal = where_less(at, splat(static_cast<float>(index)), weight, V{});
            sum += where_less(edge, x, weight, where_less(x, edge, V{}, if_equal));
        }
        mass += reduce_add(sum);
    }
    return mass;
}

// The best sums so far of `best_sums`, in their order.
struct Leaders {
    int last;
    float* sums;
    int32_t* indices;

    void take(float sum, int32_t index) {
        int place = last;
        for (; place > 0 && sum > sums[place - 1]; --place) {
            sums[place] = sums[place - 1];
            indices[place] = indices[place - 1];
        }
        sums[place] = sum;
        indices[place] = index;
    }
};

inline U random_of(const LogitsView& logits, int i) {
    return random_bits(logits.ids ? load_as<U>(logits.ids + i) : as_lanes(i), *logits.key);
}

// Whether some noise of a block could be enough to come `missing` further. Noise of g needs E = exp(-g), and E >= v: so
// the random bits must not be above a limit. Some more, for rounding.
inline bool may_win(const LogitsView& logits, int block, float missing) {
    constexpr float MAX_NOISE = 23;
    if (missing > MAX_NOISE) return false;
    const float share = exponential(splat(-missing))[0] * 1.001f;
    if (!(share < 0.5f)) return true;
    const uint32_t limit = static_cast<uint32_t>(share * 0x1p32f) + 1;
    U hits = U{};
    for (int i = 0; i < CHOICE_BLOCK; i += LANES) hits |= bits<U>(random_of(logits, block * CHOICE_BLOCK + i) <= limit);
    return any(bits<I>(hits));
}

// The `number` best of (x - maximum) * scale + noise, best first; of equals, the one in front. Without a key the best
// of the first term. Fewer, if there are not so many above minus infinity: the index of the others is -1. Where it is
// asked for, also the sum of exp((x - maximum) * scale) over all.
void best_sums(const LogitsView& logits, int number, float* sums, int32_t* indices, double* mass) {
    constexpr float NEGLIGIBLE = -30;  // of any number of tokens, below the rounding of the sum
    for (int i = 0; i < number; ++i) sums[i] = -__builtin_inff(), indices[i] = -1;
    Leaders leaders{number - 1, sums, indices};
    const float& least = sums[number - 1];
    if (mass) *mass = 0;
    for (int b = 0; b < logits.blocks; ++b) {
        const float largest = largest_of(logits, b);
        const int begin = b * CHOICE_BLOCK, end = begin + CHOICE_BLOCK;
        if (mass && largest > NEGLIGIBLE) {
            V sum = V{};
            for (int i = begin; i < end; i += LANES) sum += weight_of(logits, load(logits.x + i));
            *mass += reduce_add(sum);
        }
        if (logits.key ? !(largest > -__builtin_inff()) || !may_win(logits, b, least - largest) : !(largest > least))
            continue;
        for (int i = begin; i < end; i += LANES) {
            V sum = (load(logits.x + i) - logits.maximum) * logits.scale;
            if (logits.key) sum += gumbel(random_of(logits, i));
            if (!any_above(sum, least)) continue;
            float found[LANES];
            store(found, sum);
            for (int lane = 0; lane < LANES; ++lane)
                if (found[lane] > least) leaders.take(found[lane], i + lane);
        }
    }
}

const Kernels TABLE = {NAME,        MULTIPLIES_BF16, DOTS_BYTES,  multiply,  rms_norm,      quantize,
                       pack_q8,     pack_q4,         to_bf16,     to_int8,   silu_multiply, block_maxima,
                       keep_before, keep_from,       mass_before, best_sums, attend_chunk,  merge};
