// What verifying and drafting share in choosing tokens.
#pragma once

#include <cmath>

#include "model.h"

namespace hopskip {

// The noise of a text's token at a position. Seeds and positions may follow each other: both go through a hash.
NoiseKey noise_key(uint64_t seed, int32_t position);

// What logits are divided by, as a factor. A temperature of 0 divides by nothing, and takes the best.
float scale_of(const Rule& rule);

// Penalties and biases, for the token after `path`. No `row_of_token`: each token has the row of its number.
void adjust(const Rule& rule, std::span<const int32_t> path, const std::vector<int32_t>& row_of_token, float* logits);

// Whether the largest of some logits can be chosen. It is NaN if any of them is, and minus infinity if none is allowed.
inline bool is_number(float largest) { return std::isfinite(largest); }

}  // namespace hopskip
