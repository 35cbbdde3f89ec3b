// One pass of the decoder. All threads walk through the layers together; a phase (threads.h) ends wherever one needs
// what another has written.
// Shape letters: N rows, D hidden size, H query heads, K key/value heads, G = H / K, E head dimension.
#include "model.h"
#include "pack.h"

#include <bit>
#include <climits>
#include <limits>

namespace hopskip {

namespace {

constexpr int MAX_PASS_ROWS = 128;  // more go in several passes: their activations then stay in the second-level cache
constexpr int MIN_BLOCK_ROWS = 8, MAX_BLOCK_ROWS = 32, MAX_BLOCK_QUERIES = 96;  // that attend together
constexpr int PIECES_PER_THREAD = 4;  // of attention, so that one which is held up can be helped out
constexpr int MAX_PRIVATE_ROWS = 4;   // up to which every thread makes inputs for itself, to save a phase

}  // namespace

// All memory of a pass is taken here, on the caller's thread, where running out of it can still be reported.
void Model::reserve(int rows) {
    const ptrdiff_t n = rows;
    hidden_.reserve(n * padded(shape_.hidden_size));
    qkv_.reserve(n * shape_.qkv_size());
    attention_.reserve(n * padded(shape_.queries_size()));
    activation_.reserve(n * padded(shape_.intermediate_size));
    for (Worker& worker : workers_) {
        worker.inputs.reserve(n * widest_ / BLOCK, kernels_.multiplies_bf16);
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

// Where the rows' keys and values go, and where those of their ancestors in a tree are.
void Model::find_places(Pass& pass) {
    const RowsView& rows = pass.rows;
    pass.place_of_row.assign(rows.positions, rows.positions + rows.count);
    pass.places.clear();
    pass.places_per_row = 0;
    if (!rows.parent_offsets) return;
    std::vector<int> depths(rows.count);
    for (int row = 0, root = 0; row < rows.count; ++row) {
        if (rows.parent_offsets[row] == 0) root = row;
        pass.place_of_row[row] = rows.positions[root] + row - root;
        depths[row] = rows.positions[row] - rows.positions[root];
        pass.places_per_row = std::max(pass.places_per_row, depths[row]);
    }
    for (int row = 0; row < rows.count; ++row) {
        // a row does not look behind itself, so there any place will do
        pass.places.insert(pass.places.end(), pass.places_per_row, pass.place_of_row[row]);
        int* own = pass.places.data() + row * pass.places_per_row;
        for (int ancestor = row; depths[ancestor]; ancestor -= rows.parent_offsets[ancestor])
            own[depths[ancestor] - 1] = pass.place_of_row[ancestor];
    }
}

// Rows of one sequence that share one reading of its keys and values: more of them where there is work for all threads
// anyway, as scores and sums of more would leave the second-level cache.
void Model::find_blocks(Pass& pass) {
    const RowsView& rows = pass.rows;
    const int most = std::clamp(MAX_BLOCK_QUERIES / shape_.group_size(), MIN_BLOCK_ROWS, MAX_BLOCK_ROWS);
    int block_rows = MIN_BLOCK_ROWS;
    while (block_rows * 2 <= most && rows.count / (block_rows * 2) * shape_.num_kv_heads >= 4 * pool_.threads())
        block_rows *= 2;
    pass.blocks.clear();
    for (int row = 0; row < rows.count; ++row) {
        const int position = rows.positions[row];
        const bool starts_sequence = rows.starts_sequence(row);
        if (starts_sequence || pass.blocks.back().count == block_rows) {
            // blocks of one tree share what comes up to its root
            const int root_end = starts_sequence ? position + 1 : pass.blocks.back().shared_end;
            const int shared_end = rows.parent_offsets ? root_end : INT_MAX;
            pass.blocks.push_back({row, 0, shape_.window_start(position) / CHUNK, 0, 0, shared_end, 1});
        }
        QueryBlock& block = pass.blocks.back();
        ++block.count;
        block.end = std::max(block.end, position + 1);
        // of a tree, a later row may come before the first
        block.first_chunk = std::min(block.first_chunk, shape_.window_start(position) / CHUNK);
        block.num_chunks = (block.end - 1) / CHUNK + 1 - block.first_chunk;
    }
}

// Cuts long blocks into pieces of whole chunks, so that all threads get about the same work, and takes the memory for
// it.
void Model::cut_blocks(Pass& pass) {
    const int group = shape_.group_size(), heads = shape_.num_kv_heads, size = shape_.partial_size();
    const auto work_of = [&](const QueryBlock& block) { return static_cast<int64_t>(block.num_chunks) * block.count; };
    int64_t work = 0;
    for (const QueryBlock& block : pass.blocks) work += work_of(block) * heads;
    const int64_t per_piece = std::max<int64_t>(work / (pool_.threads() * PIECES_PER_THREAD), 1);
    pass.pieces.clear();
    ptrdiff_t partials = 0;
    int queries = 0;
    for (int index = 0; index < static_cast<int>(pass.blocks.size()); ++index) {
        QueryBlock& block = pass.blocks[index];
        const int64_t wanted = pool_.threads() == 1 ? 1 : work_of(block) / per_piece;
        block.num_pieces = static_cast<int>(std::clamp<int64_t>(wanted, 1, block.num_chunks));
        block.partials = partials;
        if (block.num_pieces > 1)
            partials += static_cast<ptrdiff_t>(heads) * block.num_chunks * block.count * group * size;
        queries = std::max(queries, block.count * group);
        for (int head = 0; head < heads; ++head)
            for (int piece = 0; piece < block.num_pieces; ++piece) {
                const auto chunk_at = [&](int i) { return block.num_chunks * i / block.num_pieces; };
                pass.pieces.push_back(
                    {index, head, block.first_chunk + chunk_at(piece), chunk_at(piece + 1) - chunk_at(piece)});
            }
    }
    if (pieces_left_.size() < pass.blocks.size() * heads)
        pieces_left_ = std::vector<std::atomic<int>>(pass.blocks.size() * heads);
    for (size_t i = 0; i < pass.blocks.size() * heads; ++i) pieces_left_[i] = pass.blocks[i / heads].num_pieces;
    partials_.reserve(partials);
    const CacheLayout& layout = pass.cache->layout();
    queries_.reserve(static_cast<ptrdiff_t>(pass.rows.count) * shape_.num_heads * blocks_of(shape_.head_dim), false);
    for (Worker& worker : workers_) {
        worker.tile.reserve(std::max(layout.key_block_bytes(), layout.value_block_bytes()));
        worker.scores.reserve(static_cast<ptrdiff_t>(queries) * CHUNK);
        worker.partials.reserve(static_cast<ptrdiff_t>(queries) * (SPAN * size + size));
        worker.range.resize(queries * 2);
    }
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
    pool_.run(static_cast<int>(pass.layers.size()) * MAX_LAYER_PHASES + pass.taps.count, [&](Team& team) {
        int tap = 0;
        for (int32_t layer : pass.layers) {
            run_layer(team, layer, pass);
            if (tap == pass.taps.count || pass.taps.layers[tap] != layer + 1) continue;
            team.share(rows, [&](int row) {
                float* to = pass.taps.out + (static_cast<ptrdiff_t>(row) * pass.taps.count + tap) * size;
                std::copy_n(hidden_.get() + row * stride, size, to);
            });
            ++tap;
        }
    });
    copy_rows(hidden_.get(), stride, rows, size, out, size);
}

void Model::run_layers(const float* in, float* out, std::span<const int32_t> layers, RowsView rows, Cache& cache,
                       Taps taps) {
    const auto turn = pool_.take_turn();
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
    const auto turn = pool_.take_turn();
    linear(head, norm_.data(), in, count, out);
}

void Model::greedy(const float* in, int count, const Matrix& head, int32_t* out) {
    const auto turn = pool_.take_turn();
    for (Worker& worker : workers_) worker.best.assign(count, {-std::numeric_limits<float>::infinity(), 0});
    const auto compare = [&](int thread, int first, int rows, int strip, const float* products) {
        const int lanes = std::min(TILE, head.rows - strip * TILE);
        for (int row = 0; row < rows; ++row, products += TILE) {
            Best& best = workers_[thread].best[first + row];
            Best found{products[0], strip * TILE};
            for (int lane = 1; lane < lanes; ++lane)
                found.value = products[lane] > found.value ? products[lane] : found.value;
            if (!(best < found)) continue;
            found.id += static_cast<int32_t>(std::find(products, products + lanes, found.value) - products);
            best = found;
        }
    };
    apply(head, norm_.data(), in, count, compare, nothing);
    for (int row = 0; row < count; ++row) {
        Best best = workers_[0].best[row];
        for (const Worker& worker : workers_) best = std::max(best, worker.best[row]);
        out[row] = best.id;
    }
}

}  // namespace hopskip
