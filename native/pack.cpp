// See pack.h.
#include "pack.h"

#include <algorithm>
#include <atomic>

namespace hopskip {

namespace {

constexpr uint32_t EACH_BYTE = 0x01010101;

// The integers of a block, column by column, to units of one lane, and back. See formats.h.
void to_units(int bits, const uint8_t* q, uint32_t* units) {
    uint32_t groups[8];
    std::memcpy(groups, q, sizeof groups);
    if (bits == 8) {
        for (int g = 0; g < 8; ++g) units[g * TILE] = groups[g];
        return;
    }
    int shift = 0;
    if (bits & 4) {
        for (int u = 0; u < 4; ++u, units += TILE)
            *units = (groups[u] & 15 * EACH_BYTE) | (groups[u + 4] & 15 * EACH_BYTE) << 4;
        shift = 4;
    }
    for (const int width : {2, 1}) {
        if (!(bits & width)) continue;
        const int per_unit = 8 / width;
        for (int first = 0; first < 8; first += per_unit, units += TILE) {
            *units = 0;
            for (int i = 0; i < per_unit; ++i)
                *units |= (groups[first + i] >> shift & ((1 << width) - 1) * EACH_BYTE) << i * width;
        }
        shift += width;
    }
}

void from_units(int bits, const uint32_t* units, uint8_t* q) {
    uint32_t groups[8] = {};
    if (bits == 8)
        for (int g = 0; g < 8; ++g) groups[g] = units[g * TILE];
    int shift = 0;
    if (bits & 4) {
        for (int u = 0; u < 4; ++u, units += TILE) {
            groups[u] = *units & 15 * EACH_BYTE;
            groups[u + 4] = *units >> 4 & 15 * EACH_BYTE;
        }
        shift = 4;
    }
    for (const int width : {2, 1}) {
        if (!(bits & width)) continue;
        const int per_unit = 8 / width;
        for (int g = 0; g < 8; ++g)
            groups[g] |= (units[g / per_unit * TILE] >> g % per_unit * width & ((1 << width) - 1) * EACH_BYTE) << shift;
        units += 8 / per_unit * TILE;
        shift += width;
    }
    std::memcpy(q, groups, sizeof groups);
}

// Columns of one row that a block takes, as float; false if one of them is infinite or not a number.
bool read_floats(Stored stored, const uint8_t* row, int first, int count, float* out) {
    uint32_t wrong = 0;
    for (int c = 0; c < count; ++c) {
        uint32_t b;
        if (stored == Stored::f32)
            b = read<uint32_t>(row + (first + c) * ptrdiff_t{4});
        else if (stored == Stored::bf16)
            b = static_cast<uint32_t>(read<uint16_t>(row + (first + c) * ptrdiff_t{2})) << 16;
        else
            b = std::bit_cast<uint32_t>(from_f16(read<uint16_t>(row + (first + c) * ptrdiff_t{2})));
        wrong |= (b & 0x7f800000) == 0x7f800000;
        out[c] = std::bit_cast<float>(b);
    }
    std::fill(out + count, out + BLOCK, 0.0f);
    return !wrong;
}

uint16_t to_bf16(float x) {
    const uint32_t b = std::bit_cast<uint32_t>(x);
    return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// Packs one strip, whose memory is zeros.
class StripPacker {
public:
    StripPacker(const PackTask& task, const Kernels& kernels, int strip)
        : task_(task), kernels_(kernels), m_(task.matrix), f_(block_format(m_.format)),
          lanes_(std::min(TILE, m_.rows - strip * TILE)), out_(task.out + m_.strip_bytes * strip) {
        for (int lane = 0; lane < lanes_; ++lane) {
            const int row = strip * TILE + lane;
            rows_[lane] = task.rows + task.row_bytes * (task.order ? task.order[row] : row);
        }
    }

    PackError run() {
        if (task_.stored > Stored::bf16) return run_blocks();
        return f_.is_quantized() ? quantize() : convert();
    }

private:
    uint16_t* header_of(int block) { return reinterpret_cast<uint16_t*>(out_ + header_offset(m_.format, block)); }
    uint8_t* units_of(int block) { return out_ + units_offset(m_.format, block); }

    PackError run_blocks() {
        const int slots = f_.has_factors() || f_.has_minima() ? 1 : f_.blocks_per_header;  // that scales take turns in
        for (int b = 0; b < m_.blocks; ++b) {
            uint16_t* header = header_of(b);
            auto* factors = reinterpret_cast<uint8_t*>(header) + HEADER_BYTES + b % f_.blocks_per_header * FACTOR_BYTES;
            for (int lane = 0; lane < lanes_; ++lane) {
                const Block block = read_block(task_.stored, rows_[lane], b);
                if (!is_finite_f16(block.scale) || !is_finite_f16(block.minimum))
                    return is_rounded() ? PackError::scale_too_large : PackError::not_finite;
                header[b % slots * TILE + lane] = block.scale;
                if (f_.has_minima()) header[TILE + lane] = block.minimum;
                if (f_.has_factors())
                    for (int i = 0; i < 2; ++i) factors[i * TILE + lane] = block.factors[i];
                to_units(f_.bits, block.q, reinterpret_cast<uint32_t*>(units_of(b)) + lane);
            }
        }
        return PackError::none;
    }
    bool is_rounded() const { return task_.stored == Stored::iq4_xs || task_.stored == Stored::mxfp4; }

    template <class Use>
    bool each_row_of(int block, const Use& use) {  // false if a value is not finite
        const int first = block * BLOCK, count = std::min(BLOCK, m_.cols - first);
        bool is_finite = true;
        for (int lane = 0; lane < lanes_; ++lane) {
            float row[BLOCK];
            is_finite &= read_floats(task_.stored, rows_[lane], first, count, row);
            use(lane, row);
        }
        return is_finite;
    }

    PackError convert() {
        auto* units = reinterpret_cast<uint32_t*>(out_);
        const int per_block = units_per_block(m_.format);
        for (int b = 0; b < m_.blocks; ++b, units += per_block * TILE) {
            const bool is_finite = each_row_of(b, [&](int lane, const float* row) {
                if (m_.format == Format::f32)
                    for (int c = 0; c < BLOCK; ++c) units[c * TILE + lane] = std::bit_cast<uint32_t>(row[c]);
                else
                    for (int c = 0; c < BLOCK; c += 2)
                        units[c / 2 * TILE + lane] = to_bf16(row[c]) | static_cast<uint32_t>(to_bf16(row[c + 1])) << 16;
            });
            if (!is_finite) return PackError::not_finite;
        }
        return PackError::none;
    }

    PackError quantize() {
        alignas(64) float columns[BLOCK * TILE] = {};
        for (int b = 0; b < m_.blocks; ++b) {
            const bool is_finite = each_row_of(b, [&](int lane, const float* row) {
                for (int c = 0; c < BLOCK; ++c) columns[c * TILE + lane] = row[c];
            });
            if (!is_finite) return PackError::not_finite;
            uint16_t* header = header_of(b);
            uint16_t* const scales = header + (m_.format == Format::q8 ? b % 2 * TILE : 0);
            if (m_.format == Format::q8)
                kernels_.pack_q8(columns, scales, units_of(b));
            else
                kernels_.pack_q4(columns, task_.weights + b * BLOCK, scales, units_of(b));
            const int written = m_.format == Format::q8 ? TILE : 2 * TILE;
            if (!std::all_of(scales, scales + written, is_finite_f16)) return PackError::scale_too_large;
        }
        return PackError::none;
    }

    const PackTask& task_;
    const Kernels& kernels_;
    const Matrix& m_;
    const BlockFormat f_;
    const int lanes_;
    uint8_t* const out_;
    const uint8_t* rows_[TILE];
};

// Calls use(offset, bytes) for everything that a strip consists of: [16] elements of so many bytes, one for each lane.
template <class Use>
void each_element(const Matrix& m, const Use& use) {
    const BlockFormat f = block_format(m.format);
    ptrdiff_t at = 0;
    const auto elements = [&](int count, int bytes) {
        for (int i = 0; i < count; ++i, at += TILE * bytes) use(at, bytes);
    };
    for (int b = 0; b < m.blocks; ++b) {
        if (f.is_quantized() && b % f.blocks_per_header == 0) {
            elements(2, 2);
            if (f.has_factors()) elements(f.blocks_per_header * 2, 1);
        }
        elements(units_per_block(m.format), 4);
    }
}

}  // namespace

PackError pack(Pool& pool, const Kernels& kernels, const PackTask& task) {
    const auto turn = pool.take_turn();
    std::atomic<int> error{0};
    pool.run(1, [&](Team& team) {
        team.share(task.matrix.strips, [&](int strip) {
            if (error.load(std::memory_order_relaxed)) return;
            std::memset(task.out + task.matrix.strip_bytes * strip, 0, task.matrix.strip_bytes);
            const PackError found = StripPacker(task, kernels, strip).run();
            if (found != PackError::none) error = static_cast<int>(found);
        });
    });
    return static_cast<PackError>(error.load());
}

void unpack_row(const Matrix& m, int row, float* out) {
    const uint8_t* strip = m.strip(row / TILE);
    const int lane = row % TILE;
    const BlockFormat f = block_format(m.format);
    if (!f.is_quantized()) {
        const auto* units = reinterpret_cast<const uint32_t*>(strip) + lane;
        for (int c = 0; c < m.cols; ++c) {
            const uint32_t unit = units[(m.format == Format::f32 ? c : c / 2) * TILE];
            out[c] = std::bit_cast<float>(m.format == Format::f32 ? unit : c % 2 ? unit & 0xffff0000u : unit << 16);
        }
        return;
    }
    for (int b = 0; b < m.blocks; ++b) {
        const int index = b % f.blocks_per_header;
        const uint8_t* header = strip + header_offset(m.format, b);
        const auto f16 = [&](int i) { return from_f16(read<uint16_t>(header + (i * TILE + lane) * 2)); };
        const auto factor = [&](int i) {
            return static_cast<int8_t>(header[HEADER_BYTES + index * FACTOR_BYTES + i * TILE + lane]);
        };
        uint8_t q[BLOCK];
        from_units(f.bits, reinterpret_cast<const uint32_t*>(strip + units_offset(m.format, b)) + lane, q);
        for (int c = 0; c < std::min(BLOCK, m.cols - b * BLOCK); ++c) {
            float scale = f16(f.has_factors() || f.has_minima() ? 0 : index), minimum = f.has_minima() ? f16(1) : 0.0f;
            if (f.has_halves && f.has_minima()) {
                const auto both = static_cast<uint8_t>(factor(c / 16));
                scale *= static_cast<float>(both & 15);
                minimum *= static_cast<float>(both >> 4);
            } else if (f.has_factors()) {
                scale *= factor(f.has_halves ? c / 16 : 0);
                minimum *= factor(1);
            }
            const int level = (f.has_table ? table_of(m.format)[q[c]] : q[c]) - f.center;
            out[b * BLOCK + c] = scale * static_cast<float>(level) + minimum;
        }
    }
}

void select_rows(const Matrix& from, const int32_t* rows, int count, uint8_t* out) {
    const Matrix to = matrix_of(from.format, count, from.cols);
    std::memset(out, 0, to.strip_bytes * to.strips);
    for (int row = 0; row < count; ++row) {
        const uint8_t* source = from.strip(rows[row] / TILE);
        uint8_t* target = out + to.strip_bytes * (row / TILE);
        each_element(from, [&](ptrdiff_t at, int bytes) {
            std::memcpy(target + at + row % TILE * bytes, source + at + rows[row] % TILE * bytes, bytes);
        });
    }
}

}  // namespace hopskip
