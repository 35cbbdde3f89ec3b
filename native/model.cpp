// One pass of the decoder. All threads walk through the layers together; a phase (threads.h) ends wherever one needs what
// another has written. Shape letters: N rows, D hidden size, H query heads, K key/value heads, G = H / K, E head dimension.
#include "model.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <limits>
#include <unistd.h>

namespace hopskip {

namespace {

constexpr int MAX_PASS_ROWS = 128;    // more go in several passes: their activations then stay in the second-level cache
constexpr int MAX_PRIVATE_ROWS = 4;   // up to which every thread makes inputs for itself, to save a phase

unsigned bit(Format format) { return 1u << static_cast<int>(format); }

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

float from_f16(uint16_t h) {  // finite values
    const float magnitude = from_bits(static_cast<uint32_t>(h & 0x7fff) << 13) * 0x1p112f;
    return h & 0x8000 ? -magnitude : magnitude;
}

// One output row of packed weights as f32: a row of the embedding, which is the tied head.
void unpack_row(const Matrix& m, int row, float* out) {
    const uint8_t* strip = m.strip(row / TILE);
    const int lane = row % TILE;
    const auto units_at = [&](size_t offset) { return reinterpret_cast<const uint32_t*>(strip + offset) + lane; };
    for (int c = 0; c < m.cols; ++c) {
        const int block = c / BLOCK, in_block = c % BLOCK;
        if (m.format == Format::f32) {
            out[c] = from_bits(units_at(0)[c * TILE]);
            continue;
        }
        if (m.format == Format::bf16) {
            const uint32_t unit = units_at(0)[c / 2 * TILE];
            out[c] = from_bits(c % 2 ? unit & 0xffff0000u : unit << 16);
            continue;
        }
        const auto* head = reinterpret_cast<const uint16_t*>(strip + head_offset(m.format, block));
        const uint32_t* units = units_at(units_offset(m.format, block));
        if (m.format == Format::q8) {
            const int q = static_cast<int>(units[in_block / 4 * TILE] >> (in_block % 4 * 8) & 255) - 128;
            out[c] = from_f16(head[block % 2 * TILE + lane]) * static_cast<float>(q);
        } else {
            const int column = in_block % 16;
            const uint32_t q = units[column / 4 * TILE] >> (column % 4 * 8 + in_block / 16 * 4) & 15;
            out[c] = from_f16(head[lane]) * static_cast<float>(q) + from_f16(head[TILE + lane]);
        }
    }
}

}  // namespace

Model::Model(const Shape& shape, const Kernels& kernels, int threads)
    : shape_(shape), kernels_(kernels), pool_(threads), turn_(new std::recursive_mutex), process_(getpid()),
      workers_(static_cast<size_t>(threads) + 1) {
    widest_ = static_cast<int>(
        padded(std::max({shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim})));
}

Model::~Model() {
    if (process_ == getpid()) delete turn_;
}

std::unique_lock<std::recursive_mutex> Model::lock() {
    if (process_ != getpid()) {  // in the child of a fork, whoever held the lock no longer exists
        turn_ = new std::recursive_mutex;
        process_ = getpid();
    }
    return std::unique_lock(*turn_);
}

void Model::set_edges(const Matrix& embedding, const Matrix& head, std::vector<float> norm) {
    embedding_ = embedding;
    head_ = head;
    norm_ = std::move(norm);
}

void Model::make_room_for(const Branch& branch) {
    if (branch.fuse) widest_ = std::max(widest_, static_cast<int>(padded(std::max(branch.fuse->cols, branch.mix->cols))));
}

void Model::set_rope(const float* cos, const float* sin, int length) {
    const auto guard = lock();
    const size_t size = static_cast<size_t>(length) * static_cast<size_t>(shape_.head_dim / 2);
    cos_.assign(cos, cos + size);
    sin_.assign(sin, sin + size);
    rope_length_ = length;
}

// All memory of a pass is taken here, on the caller's thread, where running out of it can still be reported.
void Model::reserve(int rows) {
    const auto n = static_cast<size_t>(rows);
    const size_t group = static_cast<size_t>(shape_.num_heads / shape_.num_kv_heads);
    const size_t head_dim = padded(shape_.head_dim);
    const size_t qkv = static_cast<size_t>(shape_.num_heads + 2 * shape_.num_kv_heads) * static_cast<size_t>(shape_.head_dim);
    hidden_.reserve(n * padded(shape_.hidden_size));
    qkv_.reserve(n * qkv);
    queries_.reserve(n * static_cast<size_t>(shape_.num_heads) * head_dim);
    attention_.reserve(n * padded(shape_.num_heads * shape_.head_dim));
    activation_.reserve(n * padded(shape_.intermediate_size));
    const auto width = static_cast<size_t>(widest_);
    for (Worker& worker : workers_) {
        worker.f32.reserve(n * width);
        worker.bf16.reserve(kernels_.multiplies_bf16 ? n * width : 0);
        worker.q8.reserve(n * width);
        worker.scales.reserve(n * width / BLOCK);
        worker.starts.reserve(n * width / BLOCK);
        worker.scaled_sums.reserve(n * width / BLOCK);
        worker.products.reserve(n * TILE * 2);
        const size_t queries = MAX_BLOCK_ROWS * group;
        worker.scratch.reserve(TILE * head_dim + queries * CHUNK);
        worker.partials.reserve(queries * (PARTIAL_VALUES + head_dim) * 2);
        worker.range.resize(queries * 2);
        worker.best.assign(n, -std::numeric_limits<float>::infinity());
        worker.best_ids.assign(n, 0);
    }
}

// Makes inputs and shares out the items that multiply with them: make_row(row, to) writes one row, which is then put in every
// form that the weights' formats want; use(inputs, item) is called for every item.
//
// Few rows are made by every thread for itself, when it takes its first item; many are made once, in a phase of their own.
template <class MakeRow, class Use>
void Model::share_with_inputs(Team& team, int rows, int cols, unsigned formats, const MakeRow& make_row, int items, const Use& use) {
    const bool is_shared = rows > MAX_PRIVATE_ROWS;
    Worker& worker = is_shared ? workers_.back() : workers_[static_cast<size_t>(team.thread())];
    const Activations x{worker.f32.get(),    worker.bf16.get(),   worker.q8.get(),
                        worker.scales.get(), worker.starts.get(), worker.scaled_sums.get(), blocks_of(cols)};
    const auto blocks = static_cast<size_t>(x.blocks);
    const auto make = [&](int row) {
        const auto r = static_cast<size_t>(row);
        float* f32 = x.f32 + r * blocks * BLOCK;
        make_row(row, f32);
        if (formats & (bit(Format::q8) | bit(Format::q4)))
            kernels_.quantize(f32, x.blocks, x.q8 + r * blocks * BLOCK, x.scales + r * blocks, x.starts + r * blocks, x.scaled_sums + r * blocks);
        if (kernels_.multiplies_bf16 && formats & bit(Format::bf16)) kernels_.to_bf16(f32, blocks * BLOCK, x.bf16 + r * blocks * BLOCK);
    };
    if (is_shared) team.share(rows, make);
    bool is_ready = is_shared;
    team.share(items, [&](int item) {
        for (int row = 0; row < rows && !is_ready; ++row) make(row);
        is_ready = true;
        use(x, item);
    });
}

// The rows times matrices of the same inputs: use(matrix, strip, products) gets each strip's products [row][16].
template <class MakeRow, class Use>
void Model::multiply(Team& team, int rows, std::initializer_list<const Matrix*> matrices, const MakeRow& make_row, const Use& use) {
    unsigned formats = 0;
    int strips = 0, items = 0;
    for (const Matrix* m : matrices) {
        formats |= bit(m->format);
        strips += m->strips;
    }
    // Items large enough to stream, small enough that a thread which was held up can be helped out.
    const int per_item = std::clamp(strips / (pool_.threads() * 4), 1, 16);
    const auto items_of = [&](const Matrix* m) { return (m->strips + per_item - 1) / per_item; };
    for (const Matrix* m : matrices) items += items_of(m);
    float* products = workers_[static_cast<size_t>(team.thread())].products.get();
    share_with_inputs(team, rows, (*matrices.begin())->cols, formats, make_row, items, [&](const Activations& x, int item) {
        int index = 0;
        const Matrix* const* m = matrices.begin();
        for (; item >= items_of(*m); ++m, ++index) item -= items_of(*m);
        const int end = std::min((*m)->strips, (item + 1) * per_item);
        for (int strip = item * per_item; strip < end; ++strip) {
            kernels_.multiply(**m, strip, x, rows, products);
            use(index, strip, products);
        }
    });
}

namespace {

// Writes or adds one strip's products [rows][16] to columns of a row-major matrix.
template <class Put>
void scatter(const Matrix& m, int strip, const float* products, int rows, float* out, size_t stride, const Put& put) {
    const int first = strip * TILE, lanes = std::min(TILE, m.rows - first);
    for (int row = 0; row < rows; ++row, products += TILE) {
        float* to = out + stride * static_cast<size_t>(row) + first;
        for (int lane = 0; lane < lanes; ++lane) put(to[lane], products[lane], first + lane);
    }
}

}  // namespace

constexpr int MAX_LAYER_PHASES = 10, MAX_HEAD_PHASES = 2;

void Model::run_layer(Team& team, int index, const Pass& pass) {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    Worker& worker = workers_[static_cast<size_t>(team.thread())];
    const int rows = pass.rows.count, head_dim = shape_.head_dim;
    const size_t hidden = padded(shape_.hidden_size), intermediate = padded(shape_.intermediate_size);
    const size_t qkv = static_cast<size_t>(shape_.num_heads + 2 * shape_.num_kv_heads) * static_cast<size_t>(head_dim);
    float* h = hidden_.get();
    const auto norm = [&](const std::vector<float>& weight) {
        return [&, h](int row, float* out) {
            kernels_.rms_norm(h + hidden * static_cast<size_t>(row), weight.data(), shape_.rms_norm_eps, shape_.hidden_size, out);
        };
    };
    const auto add_to_hidden = [&](const Matrix& matrix) {
        return [&, h](int, int strip, const float* products) {
            scatter(matrix, strip, products, rows, h, hidden, [](float& to, float y, int) { to += y; });
        };
    };

    const Matrix* parts[] = {&layer.q, &layer.k, &layer.v};
    const std::vector<float>* biases[] = {&layer.q_bias, &layer.k_bias, &layer.v_bias};
    const int offsets[] = {0, layer.q.rows, layer.q.rows + layer.k.rows};
    multiply(team, rows, {&layer.q, &layer.k, &layer.v}, norm(layer.input_norm), [&](int part, int strip, const float* products) {
        const float* bias = biases[part]->empty() ? nullptr : biases[part]->data();
        scatter(*parts[part], strip, products, rows, qkv_.get() + offsets[part], qkv,
                [&](float& to, float y, int column) { to = bias ? y + bias[column] : y; });
    });
    team.share(rows * shape_.num_kv_heads, [&](int item) { rotate_and_store(item, index, pass); });
    team.share(static_cast<int>(pass.blocks.size()) * shape_.num_kv_heads * (pass.is_split ? pass.max_chunks : 1),
               [&](int item) { attend(item, index, worker, pass); });
    multiply(team, rows, {&layer.o}, [&](int row, float* out) { merge_attention(row, pass, worker, out); }, add_to_hidden(layer.o));
    // Gate and up go together, so that their product needs no phase of its own.
    const unsigned formats = bit(layer.gate.format) | bit(layer.up.format);
    share_with_inputs(team, rows, shape_.hidden_size, formats, norm(layer.post_norm), layer.gate.strips, [&](const Activations& x, int strip) {
        const size_t size = static_cast<size_t>(rows) * TILE;
        float* products = worker.products.get();
        kernels_.multiply(layer.gate, strip, x, rows, products);
        kernels_.multiply(layer.up, strip, x, rows, products + size);
        kernels_.silu_multiply(products, products + size, size, products);
        scatter(layer.gate, strip, products, rows, activation_.get(), intermediate, [](float& to, float y, int) { to = y; });
    });
    multiply(team, rows, {&layer.down}, [&](int row, float* out) {
        std::memcpy(out, activation_.get() + intermediate * static_cast<size_t>(row), intermediate * sizeof(float));
    }, add_to_hidden(layer.down));
}

// Where the rows' keys and values go, and where those of their ancestors in a tree are.
void Model::find_places(Pass& pass) {
    const RowsView& rows = pass.rows;
    pass.place_of_row.assign(rows.positions, rows.positions + rows.count);
    pass.places.clear();
    pass.places_per_row = 0;
    if (!rows.back) return;
    std::vector<int> depths(static_cast<size_t>(rows.count), 0);
    for (int row = 0, root = 0; row < rows.count; ++row) {
        if (rows.back[row] == 0) root = row;
        const auto r = static_cast<size_t>(row);
        pass.place_of_row[r] = rows.positions[root] + row - root;
        depths[r] = rows.positions[row] - rows.positions[root];
        pass.places_per_row = std::max(pass.places_per_row, depths[r]);
    }
    const auto width = static_cast<size_t>(pass.places_per_row);
    for (int row = 0; row < rows.count; ++row) {
        const auto r = static_cast<size_t>(row);
        // a row does not look behind itself, so there any place will do
        pass.places.insert(pass.places.end(), width, pass.place_of_row[r]);
        int* own = pass.places.data() + r * width;
        for (int ancestor = row; depths[static_cast<size_t>(ancestor)]; ancestor -= rows.back[ancestor])
            own[depths[static_cast<size_t>(ancestor)] - 1] = pass.place_of_row[static_cast<size_t>(ancestor)];
    }
}

void Model::run_pass(const float* in, float* out, Pass& pass) {
    const int rows = pass.rows.count;
    find_places(pass);
    pass.blocks.clear();
    pass.block_of_row.resize(static_cast<size_t>(rows));
    pass.max_chunks = 0;
    for (int row = 0; row < rows; ++row) {
        const int position = pass.rows.positions[row];
        const bool goes_on = !pass.blocks.empty() && pass.rows.slots[row - 1] == pass.rows.slots[row];
        if (goes_on && pass.blocks.back().count < MAX_BLOCK_ROWS) {
            ++pass.blocks.back().count;
        } else {
            const int first = shape_.sliding_window ? std::max(0, position - shape_.sliding_window + 1) : 0;
            const int tail = !pass.rows.back ? INT_MAX : goes_on ? pass.blocks.back().tail : position + 1;
            pass.blocks.push_back({row, 1, first / CHUNK, 0, 0, tail});
        }
        Block& block = pass.blocks.back();
        block.end = std::max(block.end, position + 1);
        block.num_chunks = (block.end - 1) / CHUNK + 1 - block.first_chunk;
        pass.max_chunks = std::max(pass.max_chunks, block.num_chunks);
        pass.block_of_row[static_cast<size_t>(row)] = static_cast<int>(pass.blocks.size()) - 1;
    }
    const int items = static_cast<int>(pass.blocks.size()) * shape_.num_kv_heads;
    pass.is_split = pass.max_chunks > 1 && items < 4 * pool_.threads();
    if (pass.is_split) {
        const size_t queries = static_cast<size_t>(MAX_BLOCK_ROWS * (shape_.num_heads / shape_.num_kv_heads));
        partials_.reserve(static_cast<size_t>(items) * static_cast<size_t>(pass.max_chunks) * queries * (PARTIAL_VALUES + padded(shape_.head_dim)));
    }
    reserve(rows);
    const auto size = static_cast<size_t>(shape_.hidden_size);
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row)
        std::memcpy(hidden_.get() + row * padded(shape_.hidden_size), in + row * size, size * sizeof(float));
    pool_.run(static_cast<int>(pass.layers.size()) * MAX_LAYER_PHASES + pass.taps.count, [&](Team& team) {
        int tap = 0;
        for (int32_t layer : pass.layers) {
            run_layer(team, layer, pass);
            if (tap == pass.taps.count || pass.taps.layers[tap] != layer + 1) continue;
            team.share(rows, [&](int row) {
                const auto r = static_cast<size_t>(row);
                float* to = pass.taps.out + (r * static_cast<size_t>(pass.taps.count) + static_cast<size_t>(tap)) * size;
                std::memcpy(to, hidden_.get() + r * padded(shape_.hidden_size), size * sizeof(float));
            });
            ++tap;
        }
    });
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row)
        std::memcpy(out + row * size, hidden_.get() + row * padded(shape_.hidden_size), size * sizeof(float));
}

void Model::run_layers(const float* in, float* out, std::span<const int32_t> layers, RowsView rows, const CacheView& cache, Taps taps) {
    const auto guard = lock();
    const auto size = static_cast<size_t>(shape_.hidden_size);
    Pass pass{};
    pass.cache = cache;
    pass.layers = layers;
    for (int first = 0, next; first < rows.count; first = next) {
        next = std::min(first + MAX_PASS_ROWS, rows.count);
        while (rows.back && next < rows.count && rows.back[next]) --next;  // a tree stays whole
        pass.rows = {next - first, rows.slots + first, rows.positions + first, rows.back ? rows.back + first : nullptr};
        pass.taps = taps;
        taps.out += static_cast<size_t>(next - first) * static_cast<size_t>(taps.count) * size;
        run_pass(in + size * static_cast<size_t>(first), out + size * static_cast<size_t>(first), pass);
    }
}

void Model::embed(const int32_t* ids, int count, float* out) const {
    for (int i = 0; i < count; ++i) unpack_row(embedding_, ids[i], out + static_cast<size_t>(i) * static_cast<size_t>(shape_.hidden_size));
}

// Norm and head of at most MAX_PASS_ROWS rows: use(thread, strip, products [rows][16]).
template <class Use>
void Model::apply_head(const float* in, int count, const Matrix& head, const Use& use) {
    reserve(count);
    const size_t hidden = padded(shape_.hidden_size), size = static_cast<size_t>(shape_.hidden_size);
    for (size_t row = 0; row < static_cast<size_t>(count); ++row)
        std::memcpy(hidden_.get() + row * hidden, in + row * size, size * sizeof(float));
    pool_.run(MAX_HEAD_PHASES, [&](Team& team) {
        const auto norm = [&](int row, float* out) {
            kernels_.rms_norm(hidden_.get() + hidden * static_cast<size_t>(row), norm_.data(), shape_.rms_norm_eps, shape_.hidden_size, out);
        };
        multiply(team, count, {&head}, norm, [&](int, int strip, const float* products) { use(team.thread(), strip, products); });
    });
}

// Rows [count, matrix columns] times a matrix: out [count, matrix rows].
void Model::linear(const Matrix& matrix, const float* in, int count, float* out) {
    const auto columns = static_cast<size_t>(matrix.cols), size = static_cast<size_t>(matrix.rows);
    for (int first = 0; first < count; first += MAX_PASS_ROWS, in += columns * MAX_PASS_ROWS, out += size * MAX_PASS_ROWS) {
        const int rows = std::min(MAX_PASS_ROWS, count - first);
        reserve(rows);
        const auto make_row = [&](int row, float* to) {
            std::memcpy(to, in + columns * static_cast<size_t>(row), columns * sizeof(float));
            std::fill(to + columns, to + padded(matrix.cols), 0.0f);
        };
        pool_.run(MAX_HEAD_PHASES, [&](Team& team) {
            multiply(team, rows, {&matrix}, make_row, [&](int, int strip, const float* products) {
                scatter(matrix, strip, products, rows, out, size, [](float& y, float x, int) { y = x; });
            });
        });
    }
}

void Model::logits(const float* in, int count, const Matrix* subset, float* out) {
    const auto guard = lock();
    const Matrix& head = subset ? *subset : head_;
    const auto vocabulary = static_cast<size_t>(head.rows);
    for (int first = 0; first < count; first += MAX_PASS_ROWS) {
        const int rows = std::min(MAX_PASS_ROWS, count - first);
        float* to = out + vocabulary * static_cast<size_t>(first);
        apply_head(in + static_cast<size_t>(first) * static_cast<size_t>(shape_.hidden_size), rows, head,
                   [&](int, int strip, const float* products) {
                       scatter(head, strip, products, rows, to, vocabulary, [](float& y, float x, int) { y = x; });
                   });
    }
}

void Model::greedy(const float* in, int count, const Matrix* subset, int32_t* out) {
    const auto guard = lock();
    const Matrix& head = subset ? *subset : head_;
    for (int first = 0; first < count; first += MAX_PASS_ROWS) {
        const int rows = std::min(MAX_PASS_ROWS, count - first);
        apply_head(in + static_cast<size_t>(first) * static_cast<size_t>(shape_.hidden_size), rows, head,
                   [&](int thread, int strip, const float* products) {
                       Worker& worker = workers_[static_cast<size_t>(thread)];
                       const int lanes = std::min(TILE, head.rows - strip * TILE);
                       for (int row = 0; row < rows; ++row, products += TILE) {
                           float& best = worker.best[static_cast<size_t>(row)];
                           int32_t& best_id = worker.best_ids[static_cast<size_t>(row)];
                           float largest = products[0];
                           for (int lane = 1; lane < lanes; ++lane) largest = products[lane] > largest ? products[lane] : largest;
                           if (!(largest > best || (largest == best && strip * TILE < best_id))) continue;
                           const auto* at = std::find(products, products + lanes, largest);
                           best = largest;
                           best_id = strip * TILE + static_cast<int32_t>(at - products);
                       }
                   });
        for (int row = 0; row < rows; ++row) {
            const auto r = static_cast<size_t>(row);
            const Worker* best = &workers_[0];
            for (const Worker& worker : workers_)
                if (worker.best[r] > best->best[r] || (worker.best[r] == best->best[r] && worker.best_ids[r] < best->best_ids[r])) best = &worker;
            out[first + row] = best->best_ids[r];
        }
    }
}

}  // namespace hopskip
