// Attention of one layer: queries and keys are rotated, keys and values stored, and chunks of the cache attended to.
// The softmax of a row is taken over fixed chunks of positions, which are merged in fixed spans: its bits depend
// neither on the rows that share the work nor on which thread does which chunks.
#include <climits>
#include <cmath>
#include <limits>

#include "model.h"

namespace hopskip {

namespace {

constexpr int MIN_BLOCK_ROWS = 8, MAX_BLOCK_ROWS = 32, MAX_BLOCK_QUERIES = 96;  // that attend together
constexpr int PIECES_PER_THREAD = 4;          // of attention, so that one which is held up can be helped out
constexpr float LARGEST_VALUE = 0x1.fep127f;  // bfloat16 rounds what is larger to infinity

}  // namespace

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

// Queries lie [K, N, G, E padded], so that those of a block of rows and one key/value head are consecutive.
int Model::first_query(int row, int kv_head, const Pass& pass) const {
    return (kv_head * pass.rows.count + row) * shape_.group_size();
}

// One row's share of one key/value head: q and k normed and rotated, k and v written to the cache.
void Model::rotate_and_store(int item, int index, const Pass& pass) {
    const Layer& layer = layers_[index];
    const int row = item / shape_.num_kv_heads, kv_head = item % shape_.num_kv_heads;
    const int group = shape_.group_size(), head_dim = shape_.head_dim, half = head_dim / 2;
    const ptrdiff_t position = pass.rows.positions[row];
    const float *cos = cos_.data() + position * half, *sin = sin_.data() + position * half;
    const float* heads = qkv_.get() + row * shape_.qkv_size();

    const auto rotate = [&](int head, const std::vector<float>& norm, float scale, float* out) {
        alignas(64) float x[MAX_HEAD_DIM] = {};
        std::copy_n(heads + head * head_dim, head_dim, x);
        if (!norm.empty()) kernels_.rms_norm(x, norm.data(), shape_.rms_norm_eps, head_dim, x);
        for (int i = 0; i < half; ++i) {
            out[i] = (x[i] * cos[i] - x[i + half] * sin[i]) * scale;
            out[i + half] = (x[i + half] * cos[i] + x[i] * sin[i]) * scale;
        }
    };
    Cache& cache = *pass.cache;
    const int slot = pass.rows.slots[row], place = pass.place_of_row[row];
    alignas(64) float key[MAX_HEAD_DIM] = {}, value[MAX_HEAD_DIM] = {};
    rotate(shape_.num_heads + kv_head, layer.k_norm, 1.0f, key);
    std::copy_n(heads + (shape_.num_heads + shape_.num_kv_heads + kv_head) * head_dim, head_dim, value);
    // Even a weight of zero would let a value that is not finite reach rows that do not see it. Scores do not, so that
    // the key says it in its place.
    if (!std::all_of(value, value + head_dim, [](float x) { return std::abs(x) < LARGEST_VALUE; })) {
        std::fill_n(key, head_dim, std::numeric_limits<float>::quiet_NaN());
        std::fill_n(value, head_dim, 0.0f);
    }
    cache.store_key(cache.keys(layer.cache_layer, slot, kv_head), place, key, kernels_);
    cache.store_value(cache.values(layer.cache_layer, slot, kv_head), place, value, kernels_);

    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    Activations queries = queries_.rows_of(blocks_of(head_dim));
    queries.half_starts = nullptr;
    for (int g = 0; g < group; ++g) {
        const Activations own = queries.from(first_query(row, kv_head, pass) + g);
        rotate(kv_head * group + g, layer.q_norm, scale, own.f32);
        if (cache.layout().type == CacheType::int8 && kernels_.dots_bytes) kernels_.quantize(own.f32, own);
    }
}

void Model::attend_chunk(const QueryBlock& block, int index, int kv_head, int chunk, Worker& worker, const Pass& pass,
                         float* partials) {
    const int group = shape_.group_size(), num_queries = block.count * group;
    int *first = worker.range.data(), *last = first + num_queries;
    for (int i = 0; i < num_queries; ++i) {
        last[i] = pass.rows.positions[block.row + i / group];
        first[i] = shape_.window_start(last[i]);
    }
    const int layer = layers_[index].cache_layer, slot = pass.rows.slots[block.row];
    ChunkTask task;
    task.queries = queries_.rows_of(blocks_of(shape_.head_dim)).from(first_query(block.row, kv_head, pass));
    task.num_queries = num_queries;
    task.first_seen = first;
    task.last_seen = last;
    task.queries_per_row = group;
    task.shared_end = block.shared_end;
    task.places = pass.places.data() + block.row * pass.places_per_row;
    task.places_per_row = pass.places_per_row;
    task.keys = pass.cache->keys(layer, slot, kv_head);
    task.values = pass.cache->values(layer, slot, kv_head);
    task.layout = pass.cache->layout();
    task.begin = chunk * CHUNK;
    task.end = std::min(task.begin + CHUNK, block.end);
    kernels_.attend_chunk(task, worker.tile.get(), worker.scores.get(), partials, shape_.partial_size());
}

void Model::attend(const Piece& piece, int index, Worker& worker, const Pass& pass) {
    const QueryBlock& block = pass.blocks[piece.block];
    const int group = shape_.group_size(), queries = block.count * group, size = shape_.partial_size();
    const ptrdiff_t stride = static_cast<ptrdiff_t>(queries) * size;
    float* states = worker.partials.get();
    const auto merge_span = [&](const float* partials, int count) {
        for (int q = 0; q < queries; ++q)
            kernels_.merge(states + q * size, partials + q * size, stride, count, size - PARTIAL_VALUES);
    };
    // Chunks of one span each: use(first chunk, number).
    const auto for_spans = [&](const auto& use) {
        for (int q = 0; q < queries; ++q) states[q * size + PARTIAL_SUM] = 0;
        for (int chunk = block.first_chunk, end = chunk + block.num_chunks; chunk < end;) {
            const int next = std::min(end, (chunk / SPAN + 1) * SPAN);
            use(chunk, next - chunk);
            chunk = next;
        }
        for (int q = 0; q < queries; ++q)
            write_head(states + q * size, piece.kv_head * group + q % group,
                       attention_.get() + padded(shape_.queries_size()) * (block.row + q / group));
    };
    if (block.num_pieces == 1) {
        float* partials = states + stride;
        return for_spans([&](int first, int count) {
            for (int i = 0; i < count; ++i)
                attend_chunk(block, index, piece.kv_head, first + i, worker, pass, partials + stride * i);
            merge_span(partials, count);
        });
    }
    float* partials = partials_.get() + block.partials + stride * block.num_chunks * piece.kv_head;
    const auto partial_of = [&](int chunk) { return partials + stride * (chunk - block.first_chunk); };
    for (int i = 0; i < piece.num_chunks; ++i)
        attend_chunk(block, index, piece.kv_head, piece.first_chunk + i, worker, pass,
                     partial_of(piece.first_chunk + i));
    // Who finishes last merges.
    std::atomic<int>& left = pieces_left_[piece.block * shape_.num_kv_heads + piece.kv_head];
    if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    left.store(block.num_pieces, std::memory_order_relaxed);
    for_spans([&](int first, int count) { merge_span(partial_of(first), count); });
}

// One head of a row's attention: the weighted sum of values over the sum of weights.
void Model::write_head(const float* state, int head, float* row) const {
    for (int e = 0; e < shape_.head_dim; ++e)
        row[head * shape_.head_dim + e] = state[PARTIAL_VALUES + e] / state[PARTIAL_SUM];
}

}  // namespace hopskip
