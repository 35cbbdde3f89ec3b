// Attention of one layer: queries and keys are rotated, keys and values stored, and chunks of the cache attended to. The softmax
// of a row is taken over fixed chunks of positions, which are folded in their order: its bits depend neither on the rows that
// share the work nor on whether one thread does all chunks of a block or several do one each.
#include <algorithm>
#include <cmath>

#include "model.h"

namespace hopskip {

// One row's share of one key/value head: q and k normed and rotated, k and v written to the cache.
void Model::rotate_and_store(int item, int index, const Pass& pass) {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    const int row = item / shape_.num_kv_heads, kv_head = item % shape_.num_kv_heads;
    const int group = shape_.num_heads / shape_.num_kv_heads, head_dim = shape_.head_dim, half = head_dim / 2;
    const auto size = static_cast<size_t>(head_dim);
    const int position = pass.rows.positions[row];
    const float* cos = cos_.data() + static_cast<size_t>(position) * static_cast<size_t>(half);
    const float* sin = sin_.data() + static_cast<size_t>(position) * static_cast<size_t>(half);
    const int num_heads = shape_.num_heads + 2 * shape_.num_kv_heads;
    const float* heads = qkv_.get() + static_cast<size_t>(row) * static_cast<size_t>(num_heads) * size;

    const auto rotate = [&](int head, const std::vector<float>& norm, float scale, float* out) {
        alignas(64) float x[MAX_HEAD_DIM] = {};
        std::memcpy(x, heads + static_cast<size_t>(head) * size, size * sizeof(float));
        if (!norm.empty()) kernels_.rms_norm(x, norm.data(), shape_.rms_norm_eps, head_dim, x);
        for (int i = 0; i < half; ++i) {
            out[i] = (x[i] * cos[i] - x[i + half] * sin[i]) * scale;
            out[i + half] = (x[i + half] * cos[i] + x[i] * sin[i]) * scale;
        }
    };
    const size_t at = pass.cache.position(layer.cache_layer, pass.rows.slots[row], kv_head, pass.place_of_row[static_cast<size_t>(row)]);
    const auto store = [&](const float* x, void* cache, float* scales) {
        alignas(64) char narrow[MAX_HEAD_DIM * sizeof(float)];  // whole registers are written, which the cache has no room for
        const void* from = x;
        switch (pass.cache.type) {
            case CacheType::f32: break;
            case CacheType::bf16: kernels_.to_bf16(x, padded(head_dim), reinterpret_cast<uint16_t*>(narrow)), from = narrow; break;
            case CacheType::int8: scales[at] = kernels_.to_int8(x, static_cast<int>(padded(head_dim)), reinterpret_cast<int8_t*>(narrow)), from = narrow; break;
        }
        const size_t bytes = size * static_cast<size_t>(pass.cache.element_size());
        std::memcpy(static_cast<char*>(cache) + at * bytes, from, bytes);
    };
    alignas(64) float x[MAX_HEAD_DIM] = {};
    rotate(shape_.num_heads + kv_head, layer.k_norm, 1.0f, x);
    store(x, pass.cache.k, pass.cache.k_scales);
    std::memcpy(x, heads + static_cast<size_t>(shape_.num_heads + shape_.num_kv_heads + kv_head) * size, size * sizeof(float));
    store(x, pass.cache.v, pass.cache.v_scales);

    // Queries lie [K, N, G, E padded], so that those of a block of rows and one key/value head are consecutive.
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    const size_t query = (static_cast<size_t>(kv_head) * static_cast<size_t>(pass.rows.count) + static_cast<size_t>(row)) * static_cast<size_t>(group);
    for (int g = 0; g < group; ++g)
        rotate(kv_head * group + g, layer.q_norm, scale, queries_.get() + (query + static_cast<size_t>(g)) * padded(head_dim));
}

void Model::attend_chunk(const Block& block, int index, int kv_head, int chunk, Worker& worker, const Pass& pass, float* partials) {
    const int group = shape_.num_heads / shape_.num_kv_heads;
    const auto size = static_cast<size_t>(shape_.head_dim);
    std::vector<int>& range = worker.range;
    const int num_queries = block.count * group;
    for (int i = 0; i < num_queries; ++i) {
        const int last = pass.rows.positions[block.row + i / group];
        range[static_cast<size_t>(i)] = shape_.sliding_window ? std::max(0, last - shape_.sliding_window + 1) : 0;
        range[static_cast<size_t>(num_queries + i)] = last;
    }
    const CacheView& cache = pass.cache;
    const size_t start = cache.position(layers_[static_cast<size_t>(index)].cache_layer, pass.rows.slots[block.row], kv_head, 0);
    const size_t bytes = start * size * static_cast<size_t>(cache.element_size());
    const size_t query = (static_cast<size_t>(kv_head) * static_cast<size_t>(pass.rows.count) + static_cast<size_t>(block.row)) * static_cast<size_t>(group);
    ChunkTask task;
    task.queries = queries_.get() + query * padded(shape_.head_dim);
    task.num_queries = num_queries;
    task.first = range.data();
    task.last = range.data() + num_queries;
    task.queries_per_row = group;
    task.tail = block.tail;
    task.places = pass.places.data() + static_cast<size_t>(block.row) * static_cast<size_t>(pass.places_per_row);
    task.places_per_row = pass.places_per_row;
    task.keys = static_cast<const char*>(cache.k) + bytes;
    task.values = static_cast<const char*>(cache.v) + bytes;
    task.key_scales = cache.k_scales ? cache.k_scales + start : nullptr;
    task.value_scales = cache.v_scales ? cache.v_scales + start : nullptr;
    task.type = cache.type;
    task.element_size = cache.element_size();
    task.head_dim = shape_.head_dim;
    task.padded_head_dim = static_cast<int>(padded(shape_.head_dim));
    task.begin = chunk * CHUNK;
    task.end = std::min(task.begin + CHUNK, block.end);
    kernels_.attend_chunk(task, worker.scratch.get(), partials);
}

void Model::attend(int item, int index, Worker& worker, const Pass& pass) {
    const int group = shape_.num_heads / shape_.num_kv_heads, head_dim = static_cast<int>(padded(shape_.head_dim));
    const size_t stride = PARTIAL_VALUES + static_cast<size_t>(head_dim);
    const int per_block = shape_.num_kv_heads * (pass.is_split ? pass.max_chunks : 1);
    const Block& block = pass.blocks[static_cast<size_t>(item / per_block)];
    const int kv_head = item % per_block / (pass.is_split ? pass.max_chunks : 1);
    if (pass.is_split) {
        const int chunk = item % pass.max_chunks;
        if (chunk >= block.num_chunks) return;
        float* partials = partials_.get() + static_cast<size_t>(item) * stride * static_cast<size_t>(MAX_BLOCK_ROWS * group);
        attend_chunk(block, index, kv_head, block.first_chunk + chunk, worker, pass, partials);
        return;
    }
    const auto queries = static_cast<size_t>(block.count * group);
    float* partials = worker.partials.get();
    float* states = partials + queries * stride;
    for (size_t q = 0; q < queries; ++q) states[q * stride + PARTIAL_SUM] = 0;
    for (int chunk = 0; chunk < block.num_chunks; ++chunk) {
        attend_chunk(block, index, kv_head, block.first_chunk + chunk, worker, pass, partials);
        for (size_t q = 0; q < queries; ++q) kernels_.fold(states + q * stride, partials + q * stride, head_dim);
    }
    for (int q = 0; q < block.count * group; ++q) {
        const float* state = states + static_cast<size_t>(q) * stride;
        float* out = attention_.get() + padded(shape_.num_heads * shape_.head_dim) * static_cast<size_t>(block.row + q / group) +
                     (kv_head * group + q % group) * shape_.head_dim;
        for (int e = 0; e < shape_.head_dim; ++e) out[e] = state[PARTIAL_VALUES + e] / state[PARTIAL_SUM];
    }
}

// The attention's output of one row, all heads: merges the chunks, in the order in which an unsplit block folds them.
void Model::merge_attention(int row, const Pass& pass, Worker& worker, float* out) {
    const size_t width = padded(shape_.num_heads * shape_.head_dim);
    if (!pass.is_split) {
        std::memcpy(out, attention_.get() + width * static_cast<size_t>(row), width * sizeof(float));
        return;
    }
    std::memset(out, 0, width * sizeof(float));
    const int group = shape_.num_heads / shape_.num_kv_heads, head_dim = static_cast<int>(padded(shape_.head_dim));
    const size_t stride = PARTIAL_VALUES + static_cast<size_t>(head_dim);
    const int index = pass.block_of_row[static_cast<size_t>(row)];
    const Block& block = pass.blocks[static_cast<size_t>(index)];
    float* state = worker.partials.get();
    for (int head = 0; head < shape_.num_heads; ++head) {
        state[PARTIAL_SUM] = 0;
        const size_t query = static_cast<size_t>((row - block.row) * group + head % group);
        for (int chunk = 0; chunk < block.num_chunks; ++chunk) {
            const auto item = static_cast<size_t>((index * shape_.num_kv_heads + head / group) * pass.max_chunks + chunk);
            kernels_.fold(state, partials_.get() + (item * static_cast<size_t>(MAX_BLOCK_ROWS * group) + query) * stride, head_dim);
        }
        for (int e = 0; e < shape_.head_dim; ++e) out[head * shape_.head_dim + e] = state[PARTIAL_VALUES + e] / state[PARTIAL_SUM];
    }
}

}  // namespace hopskip
