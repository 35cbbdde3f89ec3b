// Attention of one layer: queries and keys are rotated, keys and values stored, and chunks of the cache attended to.
// The softmax of a row is taken over fixed chunks of positions, which are folded in their order: its bits depend
// neither on the rows that share the work nor on whether one thread does all chunks of a block or several do one each.
#include <cmath>
#include <cstring>

#include "model.h"

namespace hopskip {

// Queries lie [K, N, G, E padded], so that those of a block of rows and one key/value head are consecutive.
float* Model::queries_of(int row, int kv_head, const Pass& pass) {
    return queries_.get() + (kv_head * pass.rows.count + row) * shape_.group_size() * padded(shape_.head_dim);
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
    const ptrdiff_t place =
        pass.cache.place_of(layer.cache_layer, pass.rows.slots[row], kv_head, pass.place_of_row[row]);
    const auto store = [&](const float* x, const CacheVectors& all) {
        // whole registers are written, which the cache has no room for
        alignas(64) char narrow[MAX_HEAD_DIM * sizeof(float)];
        const CacheVectors to = pass.cache.from(all, place);
        const int size = shape_.padded_head_dim();
        if (pass.cache.type == CacheType::bf16) kernels_.to_bf16(x, size, reinterpret_cast<uint16_t*>(narrow));
        if (pass.cache.type == CacheType::int8)
            *to.scales = kernels_.to_int8(x, size, reinterpret_cast<int8_t*>(narrow));
        std::memcpy(to.data, pass.cache.type == CacheType::f32 ? static_cast<const void*>(x) : narrow,
                    pass.cache.vector_bytes());
    };
    alignas(64) float x[MAX_HEAD_DIM] = {};
    rotate(shape_.num_heads + kv_head, layer.k_norm, 1.0f, x);
    store(x, pass.cache.k);
    std::copy_n(heads + (shape_.num_heads + shape_.num_kv_heads + kv_head) * head_dim, head_dim, x);
    store(x, pass.cache.v);

    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    float* queries = queries_of(row, kv_head, pass);
    for (int g = 0; g < group; ++g)
        rotate(kv_head * group + g, layer.q_norm, scale, queries + g * shape_.padded_head_dim());
}

void Model::attend_chunk(const QueryBlock& block, int index, int kv_head, int chunk, Worker& worker, const Pass& pass,
                         float* partials) {
    const int group = shape_.group_size(), num_queries = block.count * group;
    int *first = worker.range.data(), *last = first + num_queries;
    for (int i = 0; i < num_queries; ++i) {
        last[i] = pass.rows.positions[block.row + i / group];
        first[i] = shape_.window_start(last[i]);
    }
    const CacheView& cache = pass.cache;
    const ptrdiff_t start = cache.place_of(layers_[index].cache_layer, pass.rows.slots[block.row], kv_head, 0);
    ChunkTask task;
    task.queries = queries_of(block.row, kv_head, pass);
    task.num_queries = num_queries;
    task.first_seen = first;
    task.last_seen = last;
    task.queries_per_row = group;
    task.shared_end = block.shared_end;
    task.places = pass.places.data() + block.row * pass.places_per_row;
    task.places_per_row = pass.places_per_row;
    task.keys = cache.from(cache.k, start);
    task.values = cache.from(cache.v, start);
    task.type = cache.type;
    task.head_dim = shape_.head_dim;
    task.padded_head_dim = shape_.padded_head_dim();
    task.begin = chunk * CHUNK;
    task.end = std::min(task.begin + CHUNK, block.end);
    kernels_.attend_chunk(task, worker.scratch.get(), partials);
}

void Model::attend(int item, int index, Worker& worker, const Pass& pass) {
    const int group = shape_.group_size(), stride = shape_.partial_size();
    const int chunks = pass.is_split ? pass.max_chunks : 1;
    const QueryBlock& block = pass.blocks[item / chunks / shape_.num_kv_heads];
    const int kv_head = item / chunks % shape_.num_kv_heads;
    if (pass.is_split) {
        const int chunk = item % chunks;
        float* partials = partials_.get() + static_cast<ptrdiff_t>(item) * stride * MAX_BLOCK_ROWS * group;
        if (chunk < block.num_chunks)
            attend_chunk(block, index, kv_head, block.first_chunk + chunk, worker, pass, partials);
        return;
    }
    const int queries = block.count * group;
    float* partials = worker.partials.get();
    float* states = partials + queries * stride;
    for (int q = 0; q < queries; ++q) states[q * stride + PARTIAL_SUM] = 0;
    for (int chunk = 0; chunk < block.num_chunks; ++chunk) {
        attend_chunk(block, index, kv_head, block.first_chunk + chunk, worker, pass, partials);
        for (int q = 0; q < queries; ++q)
            kernels_.fold(states + q * stride, partials + q * stride, shape_.padded_head_dim());
    }
    for (int q = 0; q < queries; ++q)
        write_head(states + q * stride, kv_head * group + q % group,
                   attention_.get() + padded(shape_.queries_size()) * (block.row + q / group));
}

// One head of a row's attention: the weighted sum of values over the sum of weights.
void Model::write_head(const float* state, int head, float* row) const {
    for (int e = 0; e < shape_.head_dim; ++e)
        row[head * shape_.head_dim + e] = state[PARTIAL_VALUES + e] / state[PARTIAL_SUM];
}

// The attention's output of one row, all heads: merges the chunks, in the order in which an unsplit block folds them.
void Model::merge_attention(int row, const Pass& pass, Worker& worker, float* out) {
    const ptrdiff_t width = padded(shape_.queries_size());
    if (!pass.is_split) {
        std::copy_n(attention_.get() + width * row, width, out);
        return;
    }
    std::fill_n(out, width, 0.0f);
    const int group = shape_.group_size(), stride = shape_.partial_size();
    const int index = pass.block_of_row[row];
    const QueryBlock& block = pass.blocks[index];
    float* state = worker.partials.get();
    for (int head = 0; head < shape_.num_heads; ++head) {
        state[PARTIAL_SUM] = 0;
        const int query = (row - block.row) * group + head % group;
        for (int chunk = 0; chunk < block.num_chunks; ++chunk) {
            const ptrdiff_t item = (index * shape_.num_kv_heads + head / group) * pass.max_chunks + chunk;
            kernels_.fold(state, partials_.get() + (item * MAX_BLOCK_ROWS * group + query) * stride,
                          shape_.padded_head_dim());
        }
        write_head(state, head, out);
    }
}

}  // namespace hopskip
