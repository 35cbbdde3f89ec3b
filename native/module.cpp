// The Python module. Every array is checked here, before anything computes: shape, type, layout, alignment, ranges.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <numeric>
#include <string>

#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hopskip;

namespace {

using Array = nb::ndarray<>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

std::string shape_of(const Array& array) {
    std::string text = "[";
    for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
    return text + "]";
}

constexpr int64_t ANY = -1;

// The data of a contiguous CPU array of this shape (ANY: whatever it is) and type.
void* checked(const Array& array, const char* name, nb::dlpack::dtype type, std::initializer_list<int64_t> shape, size_t alignment) {
    if (array.device_type() != nb::device::cpu::value) refuse(std::string(name) + " is not in the CPU's memory; pass .cpu()");
    if (array.dtype() != type) refuse(std::string(name) + " has the wrong element type; see the method's documentation");
    bool fits = array.ndim() == shape.size();
    int64_t expected_stride = 1;
    for (size_t i = array.ndim(); fits && i-- > 0;) {
        const int64_t want = shape.begin()[i], size = static_cast<int64_t>(array.shape(i));
        fits = (want == ANY || want == size) && size <= INT32_MAX;
        if (size > 1 && array.stride(i) != expected_stride) refuse(std::string(name) + " is not contiguous; pass .contiguous()");
        expected_stride *= size;
    }
    if (!fits) {
        std::string wanted;
        for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + (size == ANY ? "any" : std::to_string(size));
        refuse(std::string(name) + " has shape " + shape_of(array) + "; it must be [" + wanted + "]");
    }
    if (reinterpret_cast<uintptr_t>(array.data()) % alignment) refuse(std::string(name) + " is misaligned; pass a copy");
    return array.data();
}

template <class T>
T* checked(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
    return static_cast<T*>(checked(array, name, nb::dtype<T>(), shape, alignof(T)));
}

int in_range(int64_t value, const char* name, int64_t low, int64_t high) {
    if (value < low || value > high)
        refuse(std::string(name) + " is " + std::to_string(value) + "; it must be " + std::to_string(low) + " to " + std::to_string(high));
    return static_cast<int>(value);
}

// A matrix, and the array that holds its weights.
struct PackedMatrix {
    Matrix matrix;
    Array owner;
};

PackedMatrix make_matrix(int format_number, int64_t rows, int64_t cols, const Array& data) {
    Matrix m{};
    m.format = static_cast<Format>(in_range(format_number, "format", 0, 3));
    m.rows = in_range(rows, "rows", 1, 1 << 30);
    m.cols = in_range(cols, "cols", 1, 1 << 24);
    m.strips = (m.rows + TILE - 1) / TILE;
    m.blocks = (m.cols + BLOCK - 1) / BLOCK;
    const int per_head = blocks_of_head(m.format);
    const size_t heads = per_head ? static_cast<size_t>((m.blocks + per_head - 1) / per_head) : 0;
    m.strip_bytes = heads * HEAD_BYTES + static_cast<size_t>(m.blocks) * static_cast<size_t>(units_of_block(m.format)) * UNIT_BYTES;
    m.data = static_cast<const uint8_t*>(checked(data, "data", nb::dtype<int32_t>(), {m.strips, static_cast<int64_t>(m.strip_bytes / 4)}, 64));
    return {m, data};
}

std::vector<float> padded_vector(const Array& array, const char* name, int size) {
    const float* data = checked<float>(array, name, {size});
    std::vector<float> out(static_cast<size_t>((size + BLOCK - 1) / BLOCK * BLOCK), 0.0f);
    std::copy(data, data + size, out.begin());
    return out;
}

std::vector<float> padded_vector(const std::optional<Array>& array, const char* name, int size) {
    return array ? padded_vector(*array, name, size) : std::vector<float>{};
}

// An exit, and what its pointers point to.
struct PackedBranch {
    Branch branch{};
    std::optional<PackedMatrix> head, fuse, mix;
    std::optional<Array> vocabulary;
};

PackedBranch make_branch(const Array& entry, int64_t first_layer, int64_t num_layers, const std::optional<PackedMatrix>& head, const std::optional<Array>& vocabulary,
                         const std::optional<PackedMatrix>& fuse, const std::optional<PackedMatrix>& mix, int64_t num_features, const std::optional<Array>& token_norm,
                         const std::optional<Array>& feature_norm) {
    PackedBranch made{{}, head, fuse, mix, vocabulary};
    Branch& branch = made.branch;
    const auto* layers = checked<int32_t>(entry, "entry", {ANY});
    branch.entry.assign(layers, layers + entry.shape(0));
    branch.first_layer = in_range(first_layer, "first_layer", 0, 1 << 20);
    branch.num_layers = in_range(num_layers, "num_layers", 0, 1 << 20);
    branch.num_features = in_range(num_features, "num_features", 0, 1 << 20);
    if (branch.entry.empty() && !num_layers) refuse("a branch needs a layer, or must start after one of the model's");
    if ((num_features > 0) != (fuse && mix && token_norm && feature_norm)) refuse("a branch with features needs fuse, mix and two norms; one without has none of them");
    if (vocabulary) branch.vocabulary = checked<int32_t>(*vocabulary, "vocabulary", {ANY});
    if (token_norm) branch.token_norm = padded_vector(*token_norm, "token_norm", static_cast<int>(token_norm->shape(0)));
    if (feature_norm) branch.feature_norm = padded_vector(*feature_norm, "feature_norm", static_cast<int>(feature_norm->shape(0)));
    return made;
}

class Engine {
public:
    Engine(const std::string& isa, int threads, const Shape& shape) : model_(shape, kernels_for(isa), in_range(threads, "threads", 1, 1024)) {}

    void add_layer(const PackedMatrix& q, const PackedMatrix& k, const PackedMatrix& v, const PackedMatrix& o, const PackedMatrix& gate,
                   const PackedMatrix& up, const PackedMatrix& down, const Array& input_norm, const Array& post_norm,
                   const std::optional<Array>& q_bias, const std::optional<Array>& k_bias, const std::optional<Array>& v_bias,
                   const std::optional<Array>& q_norm, const std::optional<Array>& k_norm, std::optional<int64_t> cache_layer) {
        const Shape& s = shape();
        const int queries = s.num_heads * s.head_dim, keys = s.num_kv_heads * s.head_dim;
        Layer layer;
        layer.cache_layer = in_range(cache_layer.value_or(model_.num_cache_layers()), "cache_layer", 0, model_.num_cache_layers());
        layer.q = own(q, "q_proj", queries, s.hidden_size);
        layer.k = own(k, "k_proj", keys, s.hidden_size);
        layer.v = own(v, "v_proj", keys, s.hidden_size);
        layer.o = own(o, "o_proj", s.hidden_size, queries);
        layer.gate = own(gate, "gate_proj", s.intermediate_size, s.hidden_size);
        layer.up = own(up, "up_proj", s.intermediate_size, s.hidden_size);
        layer.down = own(down, "down_proj", s.hidden_size, s.intermediate_size);
        layer.input_norm = padded_vector(input_norm, "input_layernorm", s.hidden_size);
        layer.post_norm = padded_vector(post_norm, "post_attention_layernorm", s.hidden_size);
        layer.q_bias = padded_vector(q_bias, "q_proj.bias", queries);
        layer.k_bias = padded_vector(k_bias, "k_proj.bias", keys);
        layer.v_bias = padded_vector(v_bias, "v_proj.bias", keys);
        layer.q_norm = padded_vector(q_norm, "q_norm", s.head_dim);
        layer.k_norm = padded_vector(k_norm, "k_norm", s.head_dim);
        model_.add_layer(std::move(layer));
    }

    void set_edges(const PackedMatrix& embedding, const PackedMatrix& head, const Array& norm) {
        model_.set_edges(own(embedding, "embed_tokens", shape().vocab_size, shape().hidden_size),
                         own(head, "lm_head", shape().vocab_size, shape().hidden_size), padded_vector(norm, "norm", shape().hidden_size));
        is_complete_ = true;
    }

    void set_rope(const Array& cos, const Array& sin) {
        const float* c = checked<float>(cos, "cos", {ANY, shape().head_dim / 2});
        const float* s = checked<float>(sin, "sin", {static_cast<int64_t>(cos.shape(0)), shape().head_dim / 2});
        model_.set_rope(c, s, static_cast<int>(cos.shape(0)));
    }

    void embed(const Array& ids, const Array& out) {
        const int count = check_ids(ids);
        float* to = hidden(out, "out", count);
        const auto* from = static_cast<const int32_t*>(ids.data());
        nb::gil_scoped_release release;
        model_.embed(from, count, to);
    }

    void run_layers(const Array& h, const Array& out, int64_t start, int64_t stop, const Array& slots, const Array& positions, const Array& k, const Array& v,
                    const std::optional<Array>& k_scales, const std::optional<Array>& v_scales, const std::optional<Array>& back,
                    const std::optional<Array>& taps, const std::optional<Array>& tapped) {
        const int first = in_range(start, "start", 0, model_.num_layers()), last = in_range(stop, "stop", first, model_.num_layers());
        const CacheView cache = check_cache(k, v, k_scales, v_scales);
        const RowsView rows = check_rows(slots, positions, back, cache);
        const float* in = hidden(h, "h", rows.count);
        float* to = hidden(out, "out", rows.count);
        Taps kept;
        if (taps.has_value() != tapped.has_value()) refuse("taps and tapped go together");
        if (taps) {
            kept.layers = checked<int32_t>(*taps, "taps", {ANY});
            kept.count = static_cast<int>(taps->shape(0));
            kept.out = checked<float>(*tapped, "tapped", {rows.count, kept.count, shape().hidden_size});
            for (int i = 0; i < kept.count; ++i) in_range(kept.layers[i], "a tap", i ? kept.layers[i - 1] + 1 : first + 1, last);
        }
        std::vector<int32_t> layers(static_cast<size_t>(last - first));
        std::iota(layers.begin(), layers.end(), first);
        nb::gil_scoped_release release;
        model_.run_layers(in, to, layers, rows, cache, kept);
    }

    void logits(const Array& h, const Array& out, const PackedMatrix* subset) {
        const int count = check_head(h, subset), vocabulary = subset ? subset->matrix.rows : shape().vocab_size;
        float* to = checked<float>(out, "out", {count, vocabulary});
        const auto* in = static_cast<const float*>(h.data());
        nb::gil_scoped_release release;
        model_.logits(in, count, subset ? &subset->matrix : nullptr, to);
    }

    void greedy(const Array& h, const Array& out, const PackedMatrix* subset) {
        const int count = check_head(h, subset);
        auto* to = checked<int32_t>(out, "out", {count});
        const auto* in = static_cast<const float*>(h.data());
        nb::gil_scoped_release release;
        model_.greedy(in, count, subset ? &subset->matrix : nullptr, to);
    }

    void draft(const PackedBranch& exit, const Array& ids, const Array& slots, const Array& positions, const std::optional<Array>& features,
               const std::optional<Array>& token_states, int64_t k, const Array& limits, float min_confidence, const Array& keys, const Array& values,
               const std::optional<Array>& k_scales, const std::optional<Array>& v_scales, const Array& tokens, const Array& counts, const Array& states,
               const std::optional<Array>& probabilities, const std::optional<Array>& runner_ups, const std::optional<Array>& temperatures,
               const std::optional<Array>& uniforms, const std::optional<Array>& distributions) {
        const Branch& branch = exit.branch;
        const int size = shape().hidden_size, steps = in_range(k, "num_draft_tokens", 1, 1 << 20);
        for (int32_t layer : branch.entry) in_range(layer, "a layer of the branch's entry", 0, model_.num_layers() - 1);
        in_range(branch.first_layer + branch.num_layers, "the branch's end", 0, model_.num_layers());
        if (!(min_confidence >= 0 && min_confidence <= 1)) refuse("min_confidence is " + std::to_string(min_confidence) + "; it must be 0 to 1");
        if (branch.head && branch.head->cols != size) refuse("the branch's head has " + std::to_string(branch.head->cols) + " columns");
        if (branch.fuse && (branch.fuse->rows != size || branch.fuse->cols != size * branch.num_features || branch.mix->rows != size || branch.mix->cols != 2 * size ||
                            branch.token_norm.size() < static_cast<size_t>(size) || branch.feature_norm.size() < static_cast<size_t>(size)))
            refuse("the branch's mixing does not fit the model");
        const int count = check_ids(ids);
        if (!count) return;
        const CacheView cache = check_cache(keys, values, k_scales, v_scales);
        const RowsView rows = check_rows(slots, positions, std::nullopt, cache);
        if (rows.count != count) refuse("ids and slots differ in length");
        const auto* limit = checked<int32_t>(limits, "limits", {ANY});
        const auto sequences = static_cast<int>(limits.shape(0));
        const int64_t length = std::min(cache.length, model_.rope_length());
        int sequence = -1;
        for (int row = 0; row < count; ++row) {
            const bool goes_on = row && rows.slots[row] == rows.slots[row - 1];
            if (goes_on && !branch.num_layers) refuse("slot " + std::to_string(rows.slots[row]) + " occurs twice; an exit without layers takes one row per sequence");
            sequence += !goes_on;
            if (sequence >= sequences) refuse("there are fewer limits than sequences");
            in_range(limit[sequence], "limit", 1, steps);
            in_range(rows.positions[row], "position", 0, length - limit[sequence]);
        }
        if (sequence + 1 != sequences) refuse("there are more limits than sequences");
        DraftInputs inputs{};
        if (branch.fuse) {
            if (!features) refuse("the branch needs features");
            inputs.features = checked<float>(*features, "features", {count, branch.num_features, size});
        }
        if (!branch.entry.empty() && branch.num_layers) {
            if (!token_states) refuse("the branch needs token_states");
            inputs.token_states = checked<float>(*token_states, "token_states", {count, size});
        }
        const int vocabulary = branch.head ? branch.head->rows : shape().vocab_size;
        if (exit.vocabulary) {
            if (check_ids(*exit.vocabulary) != vocabulary) refuse("a draft vocabulary needs a token id for each row of its head");
        } else if (vocabulary != shape().vocab_size) {
            refuse("a head of its own that lacks tokens needs a draft vocabulary");
        }
        const auto* from = static_cast<const int32_t*>(ids.data());
        DraftOutputs outputs{};
        outputs.tokens = checked<int32_t>(tokens, "tokens", {sequences, steps});
        outputs.counts = checked<int32_t>(counts, "counts", {sequences});
        outputs.states = checked<float>(states, "states", {sequences, steps, size});
        if (probabilities) {
            if (!runner_ups) refuse("probabilities need runner_ups, which may have a size of 0");
            outputs.runner_ups = checked<int32_t>(*runner_ups, "runner_ups", {sequences, steps, ANY});
            outputs.num_runner_ups = in_range(static_cast<int64_t>(runner_ups->shape(2)), "the number of runner-ups", 0, vocabulary - 1);
            outputs.probabilities = checked<float>(*probabilities, "probabilities", {sequences, steps, outputs.num_runner_ups + 1});
        }
        if (temperatures) {
            if (!uniforms || !distributions) refuse("temperatures need uniforms and distributions");
            inputs.temperatures = checked<float>(*temperatures, "temperatures", {sequences});
            inputs.uniforms = checked<double>(*uniforms, "uniforms", {sequences, steps});
            outputs.distributions = checked<float>(*distributions, "distributions", {sequences, steps, vocabulary});
            for (int i = 0; i < sequences; ++i)
                if (!(inputs.temperatures[i] >= 0)) refuse("a temperature is " + std::to_string(inputs.temperatures[i]) + "; it must be at least 0");
        }
        nb::gil_scoped_release release;
        model_.make_room_for(branch);
        model_.draft(branch, from, rows, inputs, steps, limit, min_confidence, cache, outputs);
    }

    const char* isa() const { return model_.isa(); }
    int threads() const { return model_.threads(); }
    int rope_length() const { return model_.rope_length(); }

private:
    static const Kernels& kernels_for(const std::string& isa) {
        if (isa == "portable") return portable_kernels();
#ifdef HOPSKIP_X86
        if (isa == "avx2") return avx2_kernels();
        if (isa == "avx512") return avx512_kernels();
#endif
        refuse("instruction set " + isa + " is not built in");
    }

    const Shape& shape() const { return model_.shape(); }

    Matrix own(const PackedMatrix& packed, const char* name, int rows, int cols) {
        if (packed.matrix.rows != rows || packed.matrix.cols != cols)
            refuse(std::string(name) + " is [" + std::to_string(packed.matrix.rows) + ", " + std::to_string(packed.matrix.cols) + "]; the model's config asks for [" +
                   std::to_string(rows) + ", " + std::to_string(cols) + "]");
        owners_.push_back(packed.owner);
        return packed.matrix;
    }

    float* hidden(const Array& array, const char* name, int rows) { return checked<float>(array, name, {rows, shape().hidden_size}); }

    int check_head(const Array& h, const PackedMatrix* subset) {
        if (!is_complete_) refuse("the model has no head yet");
        checked<float>(h, "h", {ANY, shape().hidden_size});
        check_subset(subset);
        return static_cast<int>(h.shape(0));
    }

    void check_subset(const PackedMatrix* subset) {
        if (subset && subset->matrix.cols != shape().hidden_size) refuse("the subset's head has " + std::to_string(subset->matrix.cols) + " columns");
    }

    int check_ids(const Array& ids) {
        if (!is_complete_) refuse("the model has no embedding yet");
        const auto* data = checked<int32_t>(ids, "ids", {ANY});
        const int count = static_cast<int>(ids.shape(0));
        for (int i = 0; i < count; ++i) in_range(data[i], "token id", 0, shape().vocab_size - 1);
        return count;
    }

    CacheView check_cache(const Array& k, const Array& v, const std::optional<Array>& k_scales, const std::optional<Array>& v_scales) {
        const nb::dlpack::dtype bf16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}, type = k.dtype();
        CacheView cache{};
        cache.type = type == bf16 ? CacheType::bf16 : type == nb::dtype<int8_t>() ? CacheType::int8 : CacheType::f32;
        if (cache.type == CacheType::f32 && type != nb::dtype<float>()) refuse("the cache's k is neither float32, bfloat16 nor int8");
        const int64_t layers = cache.layers = model_.num_cache_layers(), heads = cache.kv_heads = shape().num_kv_heads;
        const auto alignment = static_cast<size_t>(cache.element_size());
        cache.k = checked(k, "the cache's k", type, {layers, ANY, heads, ANY, shape().head_dim}, alignment);
        const int64_t slots = cache.slots = static_cast<int>(k.shape(1)), length = cache.length = static_cast<int>(k.shape(3));
        cache.v = checked(v, "the cache's v", type, {layers, slots, heads, length, shape().head_dim}, alignment);
        if (cache.type == CacheType::int8) {
            if (!k_scales || !v_scales) refuse("an int8 cache needs scales");
            cache.k_scales = checked<float>(*k_scales, "the cache's k_scales", {layers, slots, heads, length});
            cache.v_scales = checked<float>(*v_scales, "the cache's v_scales", {layers, slots, heads, length});
        }
        return cache;
    }

    RowsView check_rows(const Array& slots, const Array& positions, const std::optional<Array>& back, const CacheView& cache) {
        const auto* slot = checked<int32_t>(slots, "slots", {ANY});
        const int count = static_cast<int>(slots.shape(0));
        const auto* position = checked<int32_t>(positions, "positions", {count});
        const int32_t* steps = back ? checked<int32_t>(*back, "back", {count}) : nullptr;
        const int64_t length = std::min(cache.length, model_.rope_length());
        std::vector<bool> seen(static_cast<size_t>(cache.slots), false);
        for (int i = 0, first = 0; i < count; ++i) {
            in_range(slot[i], "slot", 0, cache.slots - 1);
            in_range(position[i], "position", 0, length - 1);
            const bool goes_on = i > 0 && slot[i] == slot[i - 1];
            if (!goes_on) {
                first = i;
                if (seen[static_cast<size_t>(slot[i])]) refuse("slot " + std::to_string(slot[i]) + " occurs in two segments; each must have its own");
                seen[static_cast<size_t>(slot[i])] = true;
            }
            if (steps) {
                in_range(steps[i], "back", goes_on ? 1 : 0, i - first);
                in_range(i - first, "the number of a tree's row", 0, MAX_TREE_ROWS - 1);
                in_range(position[first] + i - first, "the place of a tree's row", 0, length - 1);
            }
            const int parent = i - (steps ? steps[i] : 1);
            if (goes_on && position[i] != position[parent] + 1)
                refuse("positions " + std::to_string(position[parent]) + " and " + std::to_string(position[i]) + " of slot " + std::to_string(slot[i]) +
                       " follow each other; rows of a sequence must be consecutive");
        }
        return {count, slot, position, steps};
    }

    Model model_;
    std::vector<Array> owners_;
    bool is_complete_ = false;
};

bool runs_here(const std::string& isa) {
#ifdef HOPSKIP_EMULATES_AVX512
    if (isa == "avx512") return true;
#endif
#ifdef HOPSKIP_X86
    __builtin_cpu_init();
    if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
    return isa == "portable";
}

}  // namespace

NB_MODULE(_native, m) {
    m.def("runs_here", &runs_here, "isa"_a, "Whether this processor has the instruction set: avx512, avx2 or portable.");
    nb::class_<PackedMatrix>(m, "Matrix")
        .def("__init__", [](PackedMatrix* self, int format, int64_t rows, int64_t cols, const Array& data) { new (self) PackedMatrix(make_matrix(format, rows, cols, data)); },
             "format"_a, "rows"_a, "cols"_a, "data"_a);
    nb::class_<PackedBranch>(m, "Branch")
        .def("__init__",
             [](PackedBranch* self, const Array& entry, int64_t first_layer, int64_t num_layers, const std::optional<PackedMatrix>& head, const std::optional<Array>& vocabulary,
                const std::optional<PackedMatrix>& fuse, const std::optional<PackedMatrix>& mix, int64_t num_features, const std::optional<Array>& token_norm,
                const std::optional<Array>& feature_norm) {
                 new (self) PackedBranch(make_branch(entry, first_layer, num_layers, head, vocabulary, fuse, mix, num_features, token_norm, feature_norm));
                 const auto at = [](const std::optional<PackedMatrix>& matrix) { return matrix ? &matrix->matrix : nullptr; };
                 self->branch.head = at(self->head), self->branch.fuse = at(self->fuse), self->branch.mix = at(self->mix);
             },
             nb::kw_only(), "entry"_a, "first_layer"_a, "num_layers"_a, "head"_a = nb::none(), "vocabulary"_a = nb::none(), "fuse"_a = nb::none(), "mix"_a = nb::none(),
             "num_features"_a = 0, "token_norm"_a = nb::none(), "feature_norm"_a = nb::none());
    nb::class_<Engine>(m, "Engine")
        .def("__init__",
             [](Engine* self, const std::string& isa, int threads, int64_t hidden_size, int64_t intermediate_size, int64_t num_heads, int64_t num_kv_heads,
                int64_t head_dim, int64_t vocab_size, float rms_norm_eps, int64_t sliding_window) {
                 Shape s{in_range(hidden_size, "hidden_size", 1, 1 << 20),    in_range(intermediate_size, "intermediate_size", 1, 1 << 20),
                         in_range(num_heads, "num_attention_heads", 1, 1024), in_range(num_kv_heads, "num_key_value_heads", 1, num_heads),
                         in_range(head_dim, "head_dim", 2, MAX_HEAD_DIM),              in_range(vocab_size, "vocab_size", 1, 1 << 28),
                         rms_norm_eps,                                        in_range(sliding_window, "sliding_window", 0, INT32_MAX)};
                 if (s.num_heads % s.num_kv_heads || s.head_dim % 2) refuse("heads do not divide evenly");
                 if (!runs_here(isa)) refuse("this processor cannot run the instruction set " + isa);
                 new (self) Engine(isa, threads, s);
             },
             "isa"_a, "threads"_a, nb::kw_only(), "hidden_size"_a, "intermediate_size"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "vocab_size"_a, "rms_norm_eps"_a,
             "sliding_window"_a)
        .def("add_layer", &Engine::add_layer, nb::kw_only(), "q"_a, "k"_a, "v"_a, "o"_a, "gate"_a, "up"_a, "down"_a, "input_norm"_a, "post_norm"_a,
             "q_bias"_a = nb::none(), "k_bias"_a = nb::none(), "v_bias"_a = nb::none(), "q_norm"_a = nb::none(), "k_norm"_a = nb::none(),
             "cache_layer"_a = nb::none())
        .def("set_edges", &Engine::set_edges, "embedding"_a, "head"_a, "norm"_a)
        .def("set_rope", &Engine::set_rope, "cos"_a, "sin"_a)
        .def("embed", &Engine::embed, "ids"_a, "out"_a)
        .def("run_layers", &Engine::run_layers, "h"_a, "out"_a, "start"_a, "stop"_a, "slots"_a, "positions"_a, "k"_a, "v"_a, "k_scales"_a = nb::none(),
             "v_scales"_a = nb::none(), "back"_a = nb::none(), "taps"_a = nb::none(), "tapped"_a = nb::none())
        .def("logits", &Engine::logits, "h"_a, "out"_a, "subset"_a = nb::none())
        .def("greedy", &Engine::greedy, "h"_a, "out"_a, "subset"_a = nb::none())
        .def("draft", &Engine::draft, "branch"_a, "ids"_a, "slots"_a, "positions"_a, "features"_a, "token_states"_a, "num_draft_tokens"_a, "limits"_a, "min_confidence"_a,
             "k"_a, "v"_a, "k_scales"_a, "v_scales"_a, "tokens"_a, "counts"_a, "states"_a, "probabilities"_a = nb::none(),
             "runner_ups"_a = nb::none(), "temperatures"_a = nb::none(), "uniforms"_a = nb::none(), "distributions"_a = nb::none())
        .def_prop_ro("isa", &Engine::isa)
        .def_prop_ro("threads", &Engine::threads)
        .def_prop_ro("rope_length", &Engine::rope_length);
}
