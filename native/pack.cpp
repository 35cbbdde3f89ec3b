// See pack.h. Blocks are taken apart as ggml-quants.c of llama.cpp puts them together.
#include "pack.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>

namespace hopskip {

namespace {

template <class T>
T read(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

bool is_finite_f16(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

float from_f16(uint16_t h) {
    if (!is_finite_f16(h)) return std::nanf("");
    const float magnitude = std::bit_cast<float>((h & 0x7fffu) << 13) * 0x1p112f;
    return h & 0x8000 ? -magnitude : magnitude;
}

uint16_t to_f16(float x) {  // to the nearest, of two the even one
    const uint32_t b = std::bit_cast<uint32_t>(x) & 0x7fffffff, sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000;
    if (b >= 0x477ff000) return sign | 0x7c00;
    if (b < 0x38800000) return sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(b) + 0.5f) - 0x3f000000);
    return sign | ((b + 0xfff + (b >> 13 & 1) - 0x38000000) >> 13);
}

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

struct Block {
    uint8_t q[BLOCK];
    uint16_t scale = 0, minimum = 0;  // f16; with factors, what these are multiplied with
    uint8_t factors[2] = {};          // in the order of formats.h
};

void read_nibbles(const uint8_t* bytes, uint8_t* q) {  // of 32 columns: the first half in the low ones
    for (int c = 0; c < 16; ++c) {
        q[c] = bytes[c] & 15;
        q[c + 16] = bytes[c] >> 4;
    }
}

// The factors of scale and minimum of one of eight blocks, 6 bits each.
void read_k_factors(const uint8_t* s, int block, uint8_t* factors) {
    if (block < 4) {
        factors[0] = s[block] & 63;
        factors[1] = s[block + 4] & 63;
    } else {
        factors[0] = (s[block + 4] & 15) | s[block - 4] >> 6 << 4;
        factors[1] = s[block + 4] >> 4 | s[block] >> 6 << 4;
    }
}

// 32 columns of a row.
Block read_block(Stored stored, const uint8_t* row, int index) {
    Block block;
    const StoredType type = stored_type(stored);
    const int per_stored = type.values / BLOCK, part = index % per_stored;
    const uint8_t* p = row + static_cast<ptrdiff_t>(index / per_stored) * type.bytes;
    uint8_t* q = block.q;
    const auto add_bits = [&](const uint8_t* bytes, int shift, int mask, int to) {  // of 32 columns, a byte each
        for (int c = 0; c < BLOCK; ++c) q[c] |= (bytes[c] >> shift & mask) << to;
    };
    const auto k_nibbles = [&](const uint8_t* bytes) {  // 64 columns in 32 bytes
        for (int c = 0; c < BLOCK; ++c) q[c] = bytes[part / 2 * 32 + c] >> part % 2 * 4 & 15;
    };
    const auto add_high_bits = [&](uint32_t high) {
        for (int c = 0; c < BLOCK; ++c) q[c] |= (high >> c & 1) << 4;
    };
    const auto take_scales = [&](const uint8_t* at) {  // a minimum is taken away in ggml, and added here
        block.scale = read<uint16_t>(at);
        block.minimum = read<uint16_t>(at + 2) ^ 0x8000;
    };
    switch (stored) {
        case Stored::q8_0:
            block.scale = read<uint16_t>(p);
            for (int c = 0; c < BLOCK; ++c) q[c] = p[2 + c] ^ 0x80;
            break;
        case Stored::q4_0:
        case Stored::iq4_nl:
            block.scale = read<uint16_t>(p);
            read_nibbles(p + 2, q);
            break;
        case Stored::q4_1:
            block.scale = read<uint16_t>(p);
            block.minimum = read<uint16_t>(p + 2);
            read_nibbles(p + 4, q);
            break;
        case Stored::q5_0:
            block.scale = read<uint16_t>(p);
            read_nibbles(p + 6, q);
            add_high_bits(read<uint32_t>(p + 2));
            break;
        case Stored::q5_1:
            block.scale = read<uint16_t>(p);
            block.minimum = read<uint16_t>(p + 2);
            read_nibbles(p + 8, q);
            add_high_bits(read<uint32_t>(p + 4));
            break;
        case Stored::iq4_xs: {
            const int low = p[4 + part / 2] >> part % 2 * 4 & 15, high = read<uint16_t>(p + 2) >> 2 * part & 3;
            const float scale = from_f16(read<uint16_t>(p)) * static_cast<float>((low | high << 4) - 32);
            block.scale = to_f16(scale);
            if (!(std::abs(from_f16(block.scale) - scale) <= std::abs(scale) * 0x1p-11f) && scale == scale)
                block.scale = 0x7c00;  // it would lose more than a rounding: said to be too large
            read_nibbles(p + 8 + part * 16, q);
            break;
        }
        case Stored::mxfp4:
            block.scale = to_f16(std::ldexp(1.0f, p[0] - 128));
            if (!block.scale) block.scale = 0x7c00;
            read_nibbles(p + 1, q);
            break;
        case Stored::q2_k:
            take_scales(p + 80);
            for (int c = 0; c < BLOCK; ++c) q[c] = p[16 + part / 4 * 32 + c] >> part % 4 * 2 & 3;
            std::memcpy(block.factors, p + part * 2, 2);
            break;
        case Stored::q3_k: {
            block.scale = read<uint16_t>(p + 108);
            for (int c = 0; c < BLOCK; ++c) q[c] = p[32 + part / 4 * 32 + c] >> part % 4 * 2 & 3;
            add_bits(p, part, 1, 2);
            for (int half = 0; half < 2; ++half) {
                const int i = part * 2 + half, low = p[96 + i % 8] >> i / 8 * 4 & 15;
                block.factors[half] = static_cast<uint8_t>((low | (p[104 + i % 4] >> i / 4 * 2 & 3) << 4) - 32);
            }
            break;
        }
        case Stored::q4_k:
        case Stored::q5_k:
            take_scales(p);
            read_k_factors(p + 4, part, block.factors);
            k_nibbles(p + (stored == Stored::q4_k ? 16 : 48));
            if (stored == Stored::q5_k) add_bits(p + 16, part, 1, 4);
            break;
        case Stored::q6_k:
            block.scale = read<uint16_t>(p + 208);
            for (int c = 0; c < BLOCK; ++c) q[c] = p[part / 4 * 64 + part % 2 * 32 + c] >> part % 4 / 2 * 4 & 15;
            add_bits(p + 128 + part / 4 * 32, part % 4 * 2, 3, 4);
            std::memcpy(block.factors, p + 192 + part * 2, 2);
            break;
        default: break;
    }
    return block;
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

StoredType stored_type(Stored stored) {
    switch (stored) {
        case Stored::f32: return {1, 4, Format::f32};
        case Stored::f16: return {1, 2, Format::f32};
        case Stored::bf16: return {1, 2, Format::bf16};
        case Stored::q8_0: return {32, 34, Format::q8};
        case Stored::q4_0: return {32, 18, Format::q4_0};
        case Stored::q4_1: return {32, 20, Format::q4};
        case Stored::q5_0: return {32, 22, Format::q5_0};
        case Stored::q5_1: return {32, 24, Format::q5_1};
        case Stored::iq4_nl: return {32, 18, Format::iq4};
        case Stored::iq4_xs: return {256, 136, Format::iq4};
        case Stored::mxfp4: return {32, 17, Format::mxfp4};
        case Stored::q2_k: return {256, 84, Format::q2_k};
        case Stored::q3_k: return {256, 110, Format::q3_k};
        case Stored::q4_k: return {256, 144, Format::q4_k};
        case Stored::q5_k: return {256, 176, Format::q5_k};
        case Stored::q6_k: return {256, 210, Format::q6_k};
    }
    return {};
}

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
