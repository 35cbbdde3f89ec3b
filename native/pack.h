// From stored weights to strips (formats.h), and back.
#pragma once

#include "kernels.h"
#include "stored.h"
#include "threads.h"

namespace hopskip {

enum class PackError : int { none, not_finite, scale_too_large };

// Some rows of a matrix, a multiple of TILE but at its end.
struct PackTask {
    Stored stored;
    const uint8_t* rows;
    ptrdiff_t row_bytes;
    const int32_t* order;  // which of them each row is; null: as they come
    const float* weights;  // [blocks * 32], how much errors of a column count: q4 only
    Matrix matrix;         // of these rows; its data is not read
    uint8_t* out;
};

// The blocks of ggml's types that have a format of their own are rearranged, bit by bit; plain values are converted.
PackError pack(Pool& pool, const Kernels& kernels, const PackTask& task);

// f32 [cols] of one row of packed weights.
void unpack_row(const Matrix& matrix, int row, float* out);

// Some rows of a packed matrix, as a matrix of the same format.
void select_rows(const Matrix& from, const int32_t* rows, int count, uint8_t* out);

}  // namespace hopskip
