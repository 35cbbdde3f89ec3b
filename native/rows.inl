// What happens to single rows between the products: norm, quantization, SiLU.
// Counts are padded to whole registers by the caller unless said otherwise; padding is zero.

inline V exponential(V x) {
    // exp(x) = 2^n * exp(r), |r| <= ln 2 / 2; the polynomial is that of Cephes, good to about a unit in the last place.
    V clamped = min(splat(88.0f), max(splat(-87.0f), x));  // in this order what is not a number stays so
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
    const int size = static_cast<int>(padded(cols));
    V squares = V{};
    for (int i = 0; i < size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const float scale = 1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(cols) + eps);
    for (int i = 0; i < size; i += LANES) store(out + i, load(weight + i) * (load(x + i) * scale));
}

// Multiples of a step that are nearest to x[0..count-1]; returns their sum, which is exact, and not a number if one of
// x is not finite.
inline float round_to_int8(const float* x, int count, float inverse_step, int8_t* out) {
    V sum = V{};
    for (int i = 0; i < count; i += LANES) {
        V rounded = round_even(load(x + i) * inverse_step);
        store_bytes(out + i, to_int(rounded));
        sum += rounded;
    }
    return reduce_add(sum);
}

// 127 steps to the maximum. The inverse of what is tiny would be infinite: such numbers become zeros.
inline float inverse_step(float maximum) { return maximum > 1e-30f ? 127.0f / maximum : 0.0f; }

// The scale is not a number where the sum is not: integers cannot say that, so all that is multiplied by it does.
inline float scale_of(float maximum, float sum) { return maximum / 127.0f + (sum - sum); }

inline int32_t to_integer(float sum) { return sum == sum ? static_cast<int32_t>(sum) : 0; }

// int8 per block of 32 columns, the largest magnitude (isa_*.cpp) at 127.
void quantize(const float* x, const Activations& row) {
    constexpr int HALF = BLOCK / 2;
    for (int b = 0; b < row.blocks; ++b, x += BLOCK) {
        V largest = V{};
        for (int i = 0; i < BLOCK; i += LANES) largest = max(magnitude(load(x + i)), largest);
        const float maximum = reduce_max(largest), inverse = inverse_step(maximum);
        int8_t* q8 = row.q8 + b * BLOCK;
        float sum;
        if (row.half_starts) {
            const float sums[] = {round_to_int8(x, HALF, inverse, q8),
                                  round_to_int8(x + HALF, HALF, inverse, q8 + HALF)};
            for (int half = 0; half < 2; ++half) row.half_starts[b * 2 + half] = -32 * to_integer(sums[half]);
            sum = sums[0] + sums[1];
        } else {
            sum = round_to_int8(x, BLOCK, inverse, q8);
        }
        row.scales[b] = scale_of(maximum, sum);
        row.starts[b] = -128 * to_integer(sum);
        row.scaled_sums[b] = row.scales[b] * sum;
    }
}

float to_int8(const float* x, int count, int8_t* out) {
    V largest = V{};
    for (int i = 0; i < count; i += LANES) largest = max(absolute(load(x + i)), largest);
    const float maximum = reduce_max(largest);
    return scale_of(maximum, round_to_int8(x, count, inverse_step(maximum), out));
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
