// One pass of the decoder. All threads walk through the layers together; a phase (threads.h) ends wherever one needs
// what another has written.
// Shape letters: N rows, D hidden size, H query heads, K key/value heads, G = H / K, E head dimension.
#include "model.h"
#include "pack.h"

#include <bit>
#include <limits>
#include <stdexcept>
#include <utility>

namespace hopskip {

namespace {

constexpr int MAX_PASS_ROWS = 128;   // more go in several passes: their activations then stay in the second-level cache
constexpr int MAX_PRIVATE_ROWS = 4;  // up to which every thread makes inputs for itself, to save a phase

}  // namespace

// All memory of a pass is taken here, on the caller's thread, where running out of it can still be reported.
void Model::reserve(int rows) {
    const ptrdiff_t n = rows;
    hidden_.reserve(n * padded(shape_.hidden_size));
    qkv_.reserve(n * shape_.qkv_size());
    attention_.reserve(n * padded(shape_.queries_size()));
    activation_.reserve(n * padded(shape_.intermediate_size));
    for (Worker& worker : workers_) {
        // inputs of many rows are made once, in the last one
        const ptrdiff_t own = &worker == &workers_.back() ? n : std::min<ptrdiff_t>(n, MAX_PRIVATE_ROWS);
        worker.inputs.reserve(own * widest_ / BLOCK, kernels_.multiplies_bf16);
        worker.products.reserve(n * TILE * 2);
    }
}

// Makes inputs and shares out the items that multiply with them: make_row(row, to) writes one row, which is then put in
// every form that the weights' formats want; use(inputs, item) is called for every item.
//
// Few rows are made by every thread for itself, when it takes its first item; many are made once, in their own phase.
template <class MakeRow, class Use>
void Model::share_with_inputs(Team& team, int rows, int cols, Needs needs, const MakeRow& make_row, int items,
                              const Use& use) {
    const bool is_shared = rows > MAX_PRIVATE_ROWS;
    Worker& worker = is_shared ? workers_.back() : workers_[team.thread()];
    Activations x = worker.inputs.rows_of(blocks_of(cols));
    if (!needs.halves) x.half_starts = nullptr;
    const auto make = [&](int row) {
        const Activations own = x.from(row);
        make_row(row, own.f32);
        if (needs.q8) kernels_.quantize(own.f32, own);
        if (kernels_.multiplies_bf16 && needs.bf16) kernels_.to_bf16(own.f32, padded(cols), own.bf16);
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
void Model::multiply(Team& team, int rows, std::initializer_list<const Matrix*> matrices, const MakeRow& make_row,
                     const Use& use) {
    Needs needs;
    int strips = 0, items = 0;
    for (const Matrix* m : matrices) {
        needs.add(m->format);
        strips += m->strips;
    }
    // Items large enough to stream, small enough that a thread which was held up can be helped out.
    const int per_item = std::clamp(strips / (pool_.threads() * 4), 1, 16);
    const auto items_of = [&](const Matrix* m) { return (m->strips + per_item - 1) / per_item; };
    for (const Matrix* m : matrices) items += items_of(m);
    float* products = workers_[team.thread()].products.get();
    const auto multiply_item = [&](const Activations& x, int item) {
        int index = 0;
        const Matrix* const* m = matrices.begin();
        for (; item >= items_of(*m); ++m, ++index) item -= items_of(*m);
        const int end = std::min((*m)->strips, (item + 1) * per_item);
        for (int strip = item * per_item; strip < end; ++strip) {
            kernels_.multiply(**m, strip, x, rows, products);
            use(index, strip, products);
        }
    };
    share_with_inputs(team, rows, (*matrices.begin())->cols, needs, make_row, items, multiply_item);
}

namespace {

// Writes or adds one strip's products [rows][16] to columns of a row-major matrix.
template <class Put>
void scatter(const Matrix& m, int strip, const float* products, int rows, float* out, ptrdiff_t stride,
             const Put& put) {
    const int first = strip * TILE, lanes = std::min(TILE, m.rows - first);
    for (int row = 0; row < rows; ++row, products += TILE) {
        float* to = out + stride * row + first;
        for (int lane = 0; lane < lanes; ++lane) put(to[lane], products[lane], first + lane);
    }
}

constexpr auto assign = [](float& to, float y, int) { to = y; };
constexpr auto add = [](float& to, float y, int) { to += y; };
constexpr auto nothing = [](Team&, int, int) {};

}  // namespace

constexpr int MAX_LAYER_PHASES = 10, MAX_HEAD_PHASES = 3;

void Model::run_layer(Team& team, int index, const Pass& pass) {
    const Layer& layer = layers_[index];
    Worker& worker = workers_[team.thread()];
    const int rows = pass.rows.count;
    const ptrdiff_t hidden = padded(shape_.hidden_size), intermediate = padded(shape_.intermediate_size);
    float* h = hidden_.get();
    const auto norm = [&](const std::vector<float>& weight) {
        return [&, h](int row, float* out) {
            kernels_.rms_norm(h + hidden * row, weight.data(), shape_.rms_norm_eps, shape_.hidden_size, out);
        };
    };
    const auto add_to_hidden = [&](const Matrix& m) {
        return [&, h](int, int strip, const float* products) { scatter(m, strip, products, rows, h, hidden, add); };
    };

    const Matrix* parts[] = {&layer.q, &layer.k, &layer.v};
    const std::vector<float>* biases[] = {&layer.q_bias, &layer.k_bias, &layer.v_bias};
    const int offsets[] = {0, layer.q.rows, layer.q.rows + layer.k.rows};
    const auto put_qkv = [&](int part, int strip, const float* products) {
        const float* bias = biases[part]->empty() ? nullptr : biases[part]->data();
        const auto put = [&](float& to, float y, int column) { to = bias ? y + bias[column] : y; };
        scatter(*parts[part], strip, products, rows, qkv_.get() + offsets[part], shape_.qkv_size(), put);
    };
    multiply(team, rows, {&layer.q, &layer.k, &layer.v}, norm(layer.input_norm), put_qkv);
    team.share(rows * shape_.num_kv_heads, [&](int item) { rotate_and_store(item, index, pass); });
    team.share(static_cast<int>(pass.pieces.size()), [&](int item) { attend(pass.pieces[item], index, worker, pass); });
    const auto copy_from = [&](Buffer<float>& from, ptrdiff_t width) {
        return [&, width](int row, float* out) { std::copy_n(from.get() + width * row, width, out); };
    };
    multiply(team, rows, {&layer.o}, copy_from(attention_, padded(shape_.queries_size())), add_to_hidden(layer.o));
    // Gate and up go together, so that their product needs no phase of its own.
    Needs needs;
    needs.add(layer.gate.format);
    needs.add(layer.up.format);
    const auto activate = [&](const Activations& x, int strip) {
        const int size = rows * TILE;
        float* products = worker.products.get();
        kernels_.multiply(layer.gate, strip, x, rows, products);
        kernels_.multiply(layer.up, strip, x, rows, products + size);
        kernels_.silu_multiply(products, products + size, size, products);
        scatter(layer.gate, strip, products, rows, activation_.get(), intermediate, assign);
    };
    share_with_inputs(team, rows, shape_.hidden_size, needs, norm(layer.post_norm), layer.gate.strips, activate);
    multiply(team, rows, {&layer.down}, copy_from(activation_, intermediate), add_to_hidden(layer.down));
}

// Asks at most ten times a second: for an answer the caller's thread may have to wait.
bool Model::is_interrupted() {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ < std::chrono::milliseconds(100)) return false;
    asked_ = now;
    asking_ = std::this_thread::get_id();
    interruption_ = ask_();
    asking_ = std::thread::id();
    return interruption_ != nullptr;
}

std::unique_lock<std::mutex> Model::take_turn() {
    if (asking_ == std::this_thread::get_id())
        throw std::runtime_error("a signal handler cannot use the model in the middle of a pass");
    return pool_.take_turn();
}

void Model::run_pass(const float* in, float* out, Pass& pass) {
    const int rows = pass.rows.count;
    find_places(pass);
    find_blocks(pass);
    cut_blocks(pass);
    reserve(rows);
    const int size = shape_.hidden_size;
    const ptrdiff_t stride = padded(size);
    copy_rows(in, size, rows, size, hidden_.get(), stride);
    std::atomic<bool> is_over{false};
    pool_.run(static_cast<int>(pass.layers.size()) * MAX_LAYER_PHASES + pass.taps.count, [&](Team& team) {
        int tap = 0;
        for (int32_t layer : pass.layers) {
            // Who is a layer ahead when the others leave ends it without them.
            if (team.thread() == 0 && is_interrupted()) is_over = true;
            if (is_over) return;
            run_layer(team, layer, pass);
            if (tap == pass.taps.count || pass.taps.layers[tap] != layer + 1) continue;
            team.share(rows, [&](int row) {
                float* to = pass.taps.out + (static_cast<ptrdiff_t>(row) * pass.taps.count + tap) * size;
                std::copy_n(hidden_.get() + row * stride, size, to);
            });
            ++tap;
        }
    });
    if (is_over) std::rethrow_exception(std::exchange(interruption_, nullptr));
    copy_rows(hidden_.get(), stride, rows, size, out, size);
}

void Model::run_layers(const float* in, float* out, std::span<const int32_t> layers, RowsView rows, Cache& cache,
                       Taps taps) {
    const ptrdiff_t size = shape_.hidden_size;
    const int32_t* offsets = rows.parent_offsets;
    Pass pass{};
    pass.cache = &cache;
    pass.layers = layers;
    for (int first = 0, next; first < rows.count; first = next) {
        next = std::min(first + MAX_PASS_ROWS, rows.count);
        while (offsets && next < rows.count && offsets[next]) --next;  // a tree stays whole
        pass.rows = {next - first, rows.slots + first, rows.positions + first, offsets ? offsets + first : nullptr};
        pass.taps = taps;
        taps.out += (next - first) * taps.count * size;
        run_pass(in + size * first, out + size * first, pass);
    }
}

void Model::embed(const int32_t* ids, int count, float* out) const {
    for (int i = 0; i < count; ++i)
        unpack_row(embedding_, ids[i], out + static_cast<ptrdiff_t>(i) * shape_.hidden_size);
}

// Rows [count, matrix columns], through a norm if there is one, times a matrix: use(thread, first row, rows, strip,
// products) gets each strip's products [rows][16]; then then(team, first row, rows) may share out one phase of work.
template <class Use, class Then>
void Model::apply(const Matrix& matrix, const float* norm, const float* in, int count, const Use& use,
                  const Then& then) {
    const int cols = matrix.cols;
    for (int first = 0; first < count; first += MAX_PASS_ROWS) {
        const int rows = std::min(MAX_PASS_ROWS, count - first);
        reserve(rows);
        const auto make_row = [&](int row, float* to) {
            std::copy_n(in + static_cast<ptrdiff_t>(first + row) * cols, cols, to);
            std::fill(to + cols, to + padded(cols), 0.0f);
            if (norm) kernels_.rms_norm(to, norm, shape_.rms_norm_eps, cols, to);
        };
        pool_.run(MAX_HEAD_PHASES, [&](Team& team) {
            multiply(team, rows, {&matrix}, make_row,
                     [&](int, int strip, const float* products) { use(team.thread(), first, rows, strip, products); });
            then(team, first, rows);
        });
    }
}

void Model::linear(const Matrix& matrix, const float* norm, const float* in, int count, float* out) {
    const ptrdiff_t size = matrix.rows;
    const auto put = [&](int, int first, int rows, int strip, const float* products) {
        scatter(matrix, strip, products, rows, out + size * first, size, assign);
    };
    apply(matrix, norm, in, count, put, nothing);
}

void Model::padded_logits(const float* in, int count, const Matrix& head, const Finish& finish) {
    const ptrdiff_t stride = ptrdiff_t{choice_blocks_of(head.rows)} * CHOICE_BLOCK;
    const int most = std::min(count, MAX_PASS_ROWS);
    float* logits = logits_.reserve(stride * most);
    for (int row = 0; row < most; ++row)
        std::fill(logits + stride * row + head.rows, logits + stride * (row + 1),
                  -std::numeric_limits<float>::infinity());
    const auto put = [&](int, int, int rows, int strip, const float* products) {
        scatter(head, strip, products, rows, logits, stride, assign);
    };
    apply(head, norm_.data(), in, count, put,
          [&](Team& team, int first, int rows) { finish(team, first, rows, logits, stride); });
}

void Model::logits(const float* in, int count, const Matrix& head, float* out) {
    linear(head, norm_.data(), in, count, out);
}

void Model::greedy(const float* in, int count, const Matrix& head, int32_t* out) {
    constexpr float INFINITE = std::numeric_limits<float>::infinity();
    constexpr Best NONE{-INFINITE, -1}, NOT_A_NUMBER{INFINITE, -1};  // the one before all others, the other after
    for (Worker& worker : workers_) worker.best.assign(count, NONE);
    const auto compare = [&](int thread, int first, int rows, int strip, const float* products) {
        const int lanes = std::min(TILE, head.rows - strip * TILE);
        for (int row = 0; row < rows; ++row, products += TILE) {
            Best& best = workers_[thread].best[first + row];
            Best found{products[0], strip * TILE};
            bool is_a_number = true;
            for (int lane = 0; lane < lanes; ++lane) {
                is_a_number &= products[lane] == products[lane];
                found.value = products[lane] > found.value ? products[lane] : found.value;
            }
            if (!is_a_number) best = NOT_A_NUMBER;
            if (!(best < found)) continue;
            found.id += static_cast<int32_t>(std::find(products, products + lanes, found.value) - products);
            best = found;
        }
    };
    apply(head, norm_.data(), in, count, compare, nothing);
    for (int row = 0; row < count; ++row) {
        Best best = workers_[0].best[row];
        for (const Worker& worker : workers_) best = std::max(best, worker.best[row]);
        out[row] = best.value < INFINITE ? best.id : -1;
    }
}

}  // namespace hopskip
