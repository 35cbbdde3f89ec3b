// The decoder on packed weights: layers, the head, and drafts. load.cpp sets it up; model.cpp, attention.cpp and
// draft.cpp run it.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "threads.h"

namespace hopskip {

// Cache-line aligned memory that only grows. It starts as zeros, which is what pads rows to whole blocks.
template <class T>
class Buffer {
public:
    T* reserve(ptrdiff_t size) {
        const size_t lines = (size * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
        if (lines > lines_.size()) lines_ = std::vector<Line>(lines);
        return get();
    }
    T* get() { return reinterpret_cast<T*>(lines_.data()); }

private:
    struct alignas(64) Line {
        T values[64 / sizeof(T)];
    };
    std::vector<Line> lines_;
};

// Room for rows of input in all forms that kernels may want.
struct ActivationBuffers {
    Buffer<float> f32, scales, scaled_sums;
    Buffer<uint16_t> bf16;
    Buffer<int8_t> q8;
    Buffer<int32_t> starts, half_starts;

    void reserve(ptrdiff_t blocks, bool has_bf16) {  // of all rows
        f32.reserve(blocks * BLOCK);
        bf16.reserve(has_bf16 ? blocks * BLOCK : 0);
        q8.reserve(blocks * BLOCK);
        scales.reserve(blocks);
        starts.reserve(blocks);
        scaled_sums.reserve(blocks);
        half_starts.reserve(blocks * 2);
    }
    Activations rows_of(int blocks) {
        return {f32.get(),    bf16.get(),        q8.get(),          scales.get(),
                starts.get(), scaled_sums.get(), half_starts.get(), blocks};
    }
};

// Forms of activations that some matrices are multiplied with, beside f32.
struct Needs {
    bool bf16 = false, q8 = false, halves = false;

    void add(Format format) {
        const BlockFormat f = block_format(format);
        bf16 |= format == Format::bf16;
        q8 |= f.is_quantized();
        halves |= f.has_halves;
    }
};

constexpr int MAX_TREE_ROWS = 64;

inline int choice_blocks_of(int tokens) { return (tokens + CHOICE_BLOCK - 1) / CHOICE_BLOCK; }

inline void copy_rows(const float* from, ptrdiff_t from_stride, int count, int size, float* to, ptrdiff_t to_stride) {
    for (int row = 0; row < count; ++row) std::copy_n(from + row * from_stride, size, to + row * to_stride);
}

struct Shape {
    int hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size;
    float rms_norm_eps;
    int sliding_window;  // 0: none

    int group_size() const { return num_heads / num_kv_heads; }
    int queries_size() const { return num_heads * head_dim; }
    int qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
    int padded_head_dim() const { return blocks_of(head_dim) * BLOCK; }
    int partial_size() const { return PARTIAL_VALUES + (head_dim + TILE - 1) / TILE * TILE; }
    int window_start(int position) const { return sliding_window ? std::max(0, position - sliding_window + 1) : 0; }
};

struct PackedMatrix : Matrix {
    std::shared_ptr<const void> owner;  // of the data
};

struct Layer {
    PackedMatrix q, k, v, o, gate, up, down;
    std::vector<float> input_norm, post_norm;
    std::vector<float> q_bias, k_bias, v_bias;  // empty: none
    std::vector<float> q_norm, k_norm;          // empty: none
    int cache_layer = 0;  // where its keys and values lie; a copy of a layer in lower precision shares the original's
};

// Where each row lives. Rows of one sequence are consecutive. Without parent offsets they are in the order of their
// positions; else they may be a tree of tokens, each after its parent. A tree's keys and values lie in the order of the
// rows, so that its branches do not overwrite each other.
struct RowsView {
    int count;
    const int32_t *slots, *positions;
    const int32_t* parent_offsets = nullptr;  // how many rows before each its parent is; 0: starts a sequence

    bool starts_sequence(int row) const { return row == 0 || slots[row] != slots[row - 1]; }
};

// Hidden states to keep on the way: out [rows, count, hidden_size] of the outputs of layers layers[i] - 1, rising.
struct Taps {
    int count = 0;
    const int32_t* layers = nullptr;
    float* out = nullptr;
};

// Where drafts are read: after the embedding, layers of the model, and layers of the exit's own, which have keys and
// values of their own.
struct Exit {
    std::vector<int32_t> model_layers, own_layers;
    std::optional<PackedMatrix> head;        // none: the model's
    std::vector<int32_t> vocabulary;         // tokens that the head's rows stand for; empty: all, in order
    int32_t largest_token = -1;              // of the vocabulary
    std::vector<int32_t> padded_vocabulary;  // to whole blocks of choices
    std::vector<int32_t> row_of_token;       // the other way round; -1: none
    std::optional<PackedMatrix> fuse, mix;   // none: without features; see `Mixing` in trained_exit.py
    int num_features = 0;
    std::vector<float> token_norm, feature_norm;

    bool needs_token_states() const { return !model_layers.empty() && !own_layers.empty(); }
};

// How the tokens of one text are chosen: penalties, biases, temperature (0: the best token), truncations, noise.
struct Rule {
    float temperature = 0, top_p = 1, min_p = 0;  // top_p 1, min_p 0, top_k 0: none
    int top_k = 0;
    uint64_t seed = 0;
    float repetition = 1, presence = 0, frequency = 0;
    std::vector<int32_t> seen, counts;  // tokens of the text, and how often each was generated
    std::vector<int32_t> biased;        // tokens,
    std::vector<float> biases;          // and what is added to their logits
    int32_t largest_token = -1;         // of both

    bool has_penalties() const { return repetition != 1 || presence != 0 || frequency != 0; }
    bool is_plain() const { return temperature == 0 && !has_penalties() && biased.empty(); }
};

// Where a token is to be chosen: after a text, and some draft tokens.
struct Place {
    const Rule* rule;
    int32_t position;  // of the token in the text
    std::span<const int32_t> path;
    const uint32_t* allowed = nullptr;  // a bit for each token; null: all are
};

struct ChoiceTask {
    std::vector<Place> places;      // of each row
    int32_t* tokens;                // [rows]; -1 where none can be chosen: none is allowed, or a logit is not a number
    std::vector<int32_t> reported;  // rows, rising, whose logits are wanted,
    float* logits = nullptr;        // [reported, vocabulary], as the head gives them
};

// Draft tokens for some sequences. A sequence's last row holds its last token; those before it, tokens that an exit
// with layers of its own has yet to see.
struct DraftTask {
    std::vector<int32_t> ids;                        // [rows]
    std::vector<int32_t> limits;                     // [sequences], most tokens to draft, at most num_draft_tokens
    std::vector<std::shared_ptr<const Rule>> rules;  // [sequences], truncations left out; empty: take the best token
    std::vector<std::vector<int32_t>> last_tokens;   // [sequences], that end a text, and its draft; empty: none do
    float sharpness;                                 // what scaled logits are multiplied by before noise is added
    float min_confidence;                            // a sequence stops after its first token that is less probable
    int num_draft_tokens, num_runner_ups;
    const float* features;      // [rows, num_features, hidden_size], what the model left behind of the token before
    const float* token_states;  // [rows, hidden_size], outputs of the model's layers; a sequence's last one is not read

    // Results [sequences, num_draft_tokens, ..], of as many tokens as `counts` says; null: not wanted.
    int32_t* tokens;
    int32_t* counts;      // [sequences]
    float* states;        // [.., hidden_size], which the tokens were read from
    int32_t* runner_ups;  // [.., num_runner_ups], next best tokens, best first
    float* sums;          // [.., 1 + num_runner_ups], by which the token and its runner-ups were chosen

    bool ends_text(int sequence, int32_t token) const {
        return !last_tokens.empty() && std::ranges::count(last_tokens[sequence], token) > 0;
    }
};

// Asked now and then in the middle of a pass, on the caller's thread: what is to end the pass, if anything.
using Interruption = std::exception_ptr (*)();

class Model {
public:
    Model(const Shape& shape, const Kernels& kernels, int threads, Interruption interruption);

    // All calls but those of `threads`, `isa`, `shape` and `rope_length` are for who has the turn. Throws
    // std::runtime_error where an interruption asks for one, as the pass that it is in the middle of has it.
    std::unique_lock<std::mutex> take_turn();

    void add_layer(Layer layer);
    void set_embedding_and_head(const PackedMatrix& embedding, const PackedMatrix& head, std::vector<float> norm);
    // A table that is no longer than the one there is changes nothing: passes may have been checked against that.
    void set_rope(const float* cos, const float* sin, int length);

    const Shape& shape() const { return shape_; }
    const Matrix& head() const { return head_; }
    bool has_embedding_and_head() const { return head_.data; }
    int num_layers() const { return static_cast<int>(layers_.size()); }
    int num_cache_layers() const { return num_cache_layers_; }
    int rope_length() const { return rope_length_; }
    int threads() const { return pool_.threads(); }
    const char* isa() const { return kernels_.name; }

    // All that follow take f32 rows of hidden_size, unpadded.
    void embed(const int32_t* ids, int count, float* out) const;
    // The layers in the order given. Throws what interrupts it: the rows' keys and values are then those of some
    // layers.
    void run_layers(const float* in, float* out, std::span<const int32_t> layers, RowsView rows, Cache& cache,
                    Taps taps = {});
    // Logits [count, head rows] of hidden states, through the final norm.
    void logits(const float* in, int count, const Matrix& head, float* out);
    // Best row of the head for each hidden state; of equals, the lowest. -1 where a logit is not a number.
    void greedy(const float* in, int count, const Matrix& head, int32_t* out);
    // Tokens for hidden states, by the model's head and a rule each.
    void choose(const float* in, int count, const ChoiceTask& task);
    void draft(const Exit& exit, RowsView rows, Cache& cache, const DraftTask& task);

private:
    class Drafter;
    struct Best {
        float value;
        int32_t id;
        bool operator<(const Best& other) const {
            return value < other.value || (value == other.value && id > other.id);
        }
    };
    struct Worker {  // what each thread has for itself
        ActivationBuffers inputs;
        Buffer<float> products, scores, partials;
        Buffer<uint8_t> tile;
        std::vector<int> range;  // first and last position of each query
        std::vector<Best> best;  // of each row
        std::vector<float> maxima;
        std::vector<std::pair<float, int>> ranked;
    };
    struct QueryBlock {  // rows of one sequence that attend together
        int row, count;
        int first_chunk, num_chunks;  // of the positions that any of them sees, all before `end`
        int end;
        int shared_end;          // see ChunkTask
        int num_pieces;          // that its chunks are cut into
        ptrdiff_t partials = 0;  // if there are several, where theirs lie: [kv heads][chunks][queries]
    };
    struct Piece {  // work of one thread
        int block, kv_head, first_chunk, num_chunks;
    };
    struct Pass {
        RowsView rows;
        Cache* cache;
        std::span<const int32_t> layers;
        Taps taps;
        std::vector<QueryBlock> blocks;
        std::vector<Piece> pieces;
        std::vector<int> place_of_row;
        std::vector<int> places;  // [rows][places_per_row], of trees
        int places_per_row;
    };

    void run_pass(const float* in, float* out, Pass& pass);
    void find_places(Pass& pass);
    void find_blocks(Pass& pass);
    void cut_blocks(Pass& pass);
    void run_layer(Team& team, int index, const Pass& pass);
    void rotate_and_store(int item, int index, const Pass& pass);
    int first_query(int row, int kv_head, const Pass& pass) const;
    void attend(const Piece& piece, int index, Worker& worker, const Pass& pass);
    void attend_chunk(const QueryBlock& block, int index, int kv_head, int chunk, Worker& worker, const Pass& pass,
                      float* partials);
    void write_head(const float* state, int head, float* row) const;
    template <class MakeRow, class Use>
    void share_with_inputs(Team& team, int rows, int cols, Needs needs, const MakeRow& make_row, int items,
                           const Use& use);
    template <class MakeRow, class Use>
    void multiply(Team& team, int rows, std::initializer_list<const Matrix*> matrices, const MakeRow& make_row,
                  const Use& use);
    template <class Use, class Then>
    void apply(const Matrix& matrix, const float* norm, const float* in, int count, const Use& use, const Then& then);
    void linear(const Matrix& matrix, const float* norm, const float* in, int count, float* out);
    // Logits in rows of whole blocks of choices, and finish(team, first row, rows, logits, stride) to share out a
    // phase.
    using Finish = std::function<void(Team&, int, int, float*, ptrdiff_t)>;
    void padded_logits(const float* in, int count, const Matrix& head, const Finish& finish);
    int32_t choose_row(const Rule& rule, const Place& place, float* logits, Worker& worker) const;
    void reserve(int rows);
    bool is_interrupted();

    Shape shape_;
    const Kernels& kernels_;
    Pool pool_;
    std::vector<Layer> layers_;
    int num_cache_layers_ = 0;
    ptrdiff_t widest_;  // padded columns of the widest input
    PackedMatrix embedding_{}, head_{};
    std::vector<float> norm_, cos_, sin_;
    std::atomic<int> rope_length_ = 0;
    std::vector<Worker> workers_;  // the last one is shared: inputs of many rows, prepared once for all threads
    Buffer<float> hidden_, qkv_, attention_, activation_, partials_, mixed_, logits_;
    ActivationBuffers queries_;
    std::vector<std::atomic<int>> pieces_left_;  // of each block and key/value head
    Interruption ask_;
    std::chrono::steady_clock::time_point asked_{};  // when it was last asked
    std::exception_ptr interruption_;                // what it has answered in this pass
    std::atomic<std::thread::id> asking_{};          // the thread that waits for its answer
};

}  // namespace hopskip
