// What the engine and the kernels share: the forms of activations, the layout of caches, and the table of kernels.
//
// A kernel file is compiled once per instruction set (isa_*.cpp), each in a namespace of its own. Kernels see raw
// pointers only: load.cpp and module.cpp have checked every size, alignment and range before one of them runs.
#pragma once

#include "formats.h"

namespace hopskip {

constexpr int MAX_HEAD_DIM = 512;
constexpr int CHUNK = 256;  // cache positions that one softmax partial covers

// Rows of input, in each of the forms that some weight format multiplies with. Columns beyond the model's are zero.
struct Activations {
    float* f32;            // [rows][blocks * 32]
    uint16_t* bf16;        // [rows][blocks * 32], only where the instruction set multiplies bf16
    int8_t* q8;            // [rows][blocks * 32], -127..127
    float* scales;         // [rows][blocks] of q8
    int32_t* starts;       // [rows][blocks] -128 * (sum of q8's integers): where sums begin, as q8 weights are w + 128
    float* scaled_sums;    // [rows][blocks] of q8's integers, times the scale
    int32_t* half_starts;  // [rows][blocks][2] -32 * (sum of q8's integers) of 16 columns; null: not wanted
    int blocks;

    ptrdiff_t block(int row) const { return static_cast<ptrdiff_t>(row) * blocks; }  // number of a row's first one
    Activations from(int row) const {
        const ptrdiff_t b = block(row), at = b * BLOCK;
        return {f32 + at,
                bf16 + at,
                q8 + at,
                scales + b,
                starts + b,
                scaled_sums + b,
                half_starts ? half_starts + 2 * b : nullptr,
                blocks};
    }
};

enum class CacheType : int { f32, bf16, int8 };

// Keys and values of one head lie in blocks of TILE positions, in the layout of weights. Keys are strips: lane t of a
// unit belongs to position t of the block and holds one f32, two bf16 or four int8 elements, these as value + 128.
// Values are units of as many positions, lane e of a strip being element e, int8 ones signed: [units][strips][16]. So
// neither products of a query and keys nor sums of values need a sum across lanes. int8 blocks begin with the
// positions' scales, f32 [16].
struct CacheLayout {
    CacheType type;
    int head_dim;

    constexpr int element_size() const { return type == CacheType::f32 ? 4 : type == CacheType::bf16 ? 2 : 1; }
    constexpr int per_unit() const { return 4 / element_size(); }
    constexpr int header_bytes() const { return type == CacheType::int8 ? HEADER_BYTES : 0; }
    constexpr int key_units() const { return (head_dim + per_unit() - 1) / per_unit(); }
    constexpr int value_units() const { return TILE / per_unit(); }
    constexpr int value_strips() const { return (head_dim + TILE - 1) / TILE; }
    constexpr ptrdiff_t key_block_bytes() const { return header_bytes() + key_units() * UNIT_BYTES; }
    constexpr ptrdiff_t value_block_bytes() const {
        return header_bytes() + value_units() * value_strips() * UNIT_BYTES;
    }
    // Bytes from the start of a block to an element of position `lane`.
    constexpr ptrdiff_t key_offset(int lane, int element) const {
        return header_bytes() + element / per_unit() * UNIT_BYTES + lane * 4 + element % per_unit() * element_size();
    }
    constexpr ptrdiff_t value_offset(int lane, int element) const {
        const int unit = lane / per_unit() * value_strips() + element / TILE;
        return header_bytes() + unit * UNIT_BYTES + element % TILE * 4 + lane % per_unit() * element_size();
    }
};

// One chunk of positions begin..end-1 of one key/value head, for the queries of all rows that share it. They see the
// same keys and values before `shared_end`; from there on a tree of tokens has branched, and rows have places of their
// own in the cache.
struct ChunkTask {
    Activations queries;  // scaled by 1 / sqrt(head_dim), RoPE applied
    int num_queries;
    const int *first_seen, *last_seen;  // [num_queries] positions
    int queries_per_row;
    int shared_end;     // INT_MAX: the rows are no tree
    const int* places;  // [rows][places_per_row], where positions shared_end, shared_end + 1, .. lie in the cache
    int places_per_row;
    const uint8_t *keys, *values;  // blocks from place 0 on; a position before shared_end is its own place
    CacheLayout layout;
    int begin, end;  // begin is a multiple of CHUNK, end <= begin + CHUNK
};

// Result of one or more chunks for one query, float [16 + padded head_dim]: maximum score, sum of exp(score - maximum),
// and the sum of values weighted by it. A sum of zero says that the query sees no position there.
constexpr int PARTIAL_MAX = 0, PARTIAL_SUM = 1, PARTIAL_SCALE = 2, PARTIAL_VALUES = TILE;  // the scale is used within

constexpr int SPAN = 16;  // chunks that are merged at once, the first of them a multiple of it

// What noise is made from: two halves of a hash of seed and position (model.h).
struct NoiseKey {
    uint32_t first, second;
};

constexpr int CHOICE_BLOCK = 64;  // logits that share a maximum; rows of them are padded to it with minus infinity

struct LogitsView {
    const float *x, *maxima;  // logits, and the largest of each block or above it
    int blocks;
    const int32_t* ids;   // of the tokens that the logits stand for, padded as well; null: their indices
    const NoiseKey* key;  // null: without noise
    float maximum, scale;
};

struct Kernels {
    const char* name;
    bool multiplies_bf16;  // wants Activations::bf16, not f32, beside bf16 weights
    bool dots_bytes;       // wants Activations::q8, not f32, beside int8 keys

    // out[row][16] = weights[strip] . x[row] for all rows. Every output has one accumulator that takes the columns in
    // order, so its bits do not depend on `rows`.
    void (*multiply)(const Matrix&, int strip, const Activations&, int rows, float* out);

    void (*rms_norm)(const float* x, const float* weight, float eps, int cols, float* out);
    void (*quantize)(const float* x, const Activations& row);  // to q8 and what belongs to it
    // pack.inl: 32 columns of 16 rows, float [32][16], to the scales or the header and the units of a block
    void (*pack_q8)(const float* columns, uint16_t* scales, uint8_t* units);
    void (*pack_q4)(const float* columns, const float* weights, uint16_t* header, uint8_t* units);

    void (*to_bf16)(const float* x, size_t count, uint16_t* out);
    float (*to_int8)(const float* x, int count, int8_t* out);  // returns the scale; count: a multiple of 16
    void (*silu_multiply)(const float* gate, const float* up, size_t count, float* out);  // count: a multiple of 16

    // choose.inl
    float (*block_maxima)(const float* x, int blocks, float* maxima);  // returns the largest; NaN if one is that
    void (*keep_before)(float* x, int blocks, float value, int index);
    void (*keep_from)(float* x, int blocks, float maximum, float scale, float least);
    double (*mass_before)(const LogitsView&, float value, int index);
    void (*best_sums)(const LogitsView&, int number, float* sums, int32_t* indices, double* mass);

    // attend.inl. tile: room for a block of keys or values; scores: [num_queries][CHUNK]; partials: [num_queries], each
    // `stride` after the other
    void (*attend_chunk)(const ChunkTask&, uint8_t* tile, float* scores, float* partials, ptrdiff_t stride);
    // state <- state, then the partials of `count` chunks, at most SPAN
    void (*merge)(float* state, const float* partials, ptrdiff_t stride, int count, int padded_head_dim);
};

}  // namespace hopskip
