// The Python module. Every array is checked here, before anything computes: shape, type, layout, alignment, ranges.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <numeric>
#include <sstream>
#include <string>

#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace hopskip;

namespace {

using Array = nb::ndarray<>;
using OptionalArray = std::optional<Array>;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw nb::value_error(message.str().c_str());
}

constexpr int64_t ANY = -1;

// The data of a contiguous CPU array of this shape (ANY: whatever it is) and type.
void* checked(const Array& array, const char* name, nb::dlpack::dtype type, std::initializer_list<int64_t> shape,
              size_t alignment) {
    if (array.device_type() != nb::device::cpu::value) refuse(name, " is not in the CPU's memory; pass .cpu()");
    if (array.dtype() != type) refuse(name, " has the wrong element type; see the method's documentation");
    bool fits = array.ndim() == shape.size();
    int64_t expected_stride = 1;
    for (size_t i = array.ndim(); fits && i-- > 0;) {
        const int64_t want = shape.begin()[i], size = static_cast<int64_t>(array.shape(i));
        fits = (want == ANY || want == size) && size <= INT32_MAX;
        if (size > 1 && array.stride(i) != expected_stride) refuse(name, " is not contiguous; pass .contiguous()");
        expected_stride *= std::max<int64_t>(size, 1);  // of nothing, any stride will do
    }
    if (!fits) {
        std::ostringstream found, wanted;
        for (size_t i = 0; i < array.ndim(); ++i) found << (i ? ", " : "") << array.shape(i);
        for (int64_t size : shape)
            wanted << (&size == shape.begin() ? "" : ", ") << (size == ANY ? "any" : std::to_string(size));
        refuse(name, " has shape [", found.str(), "]; it must be [", wanted.str(), "]");
    }
    if (reinterpret_cast<uintptr_t>(array.data()) % alignment) refuse(name, " is misaligned; pass a copy");
    return array.data();
}

template <class T>
T* checked(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
    return static_cast<T*>(checked(array, name, nb::dtype<T>(), shape, alignof(T)));
}

// The same for an array that is asked for if `is_needed`, and else not looked at.
template <class T>
T* checked_if(bool is_needed, const char* who_needs, const OptionalArray& array, const char* name,
              std::initializer_list<int64_t> shape) {
    if (!is_needed) return nullptr;
    if (!array) refuse(who_needs, " ", name);
    return checked<T>(*array, name, shape);
}

int in_range(int64_t value, const char* name, int64_t low, int64_t high) {
    if (value < low || value > high) refuse(name, " is ", value, "; it must be ", low, " to ", high);
    return static_cast<int>(value);
}

int length_of(const Array& array) { return static_cast<int>(array.shape(0)); }  // of one that has been checked

// A matrix, and the array that holds its weights.
struct PackedMatrix : Matrix {
    Array owner;
};

PackedMatrix make_matrix(int format_number, int64_t rows, int64_t cols, const Array& data) {
    PackedMatrix m{{}, data};
    m.format = static_cast<Format>(in_range(format_number, "format", 0, 3));
    m.rows = in_range(rows, "rows", 1, 1 << 30);
    m.cols = in_range(cols, "cols", 1, 1 << 24);
    m.strips = (m.rows + TILE - 1) / TILE;
    m.blocks = blocks_of(m.cols);
    const int per_head = blocks_of_head(m.format), heads = per_head ? (m.blocks + per_head - 1) / per_head : 0;
    m.strip_bytes = static_cast<ptrdiff_t>(heads) * HEAD_BYTES +
                    static_cast<ptrdiff_t>(m.blocks) * units_of_block(m.format) * UNIT_BYTES;
    m.data =
        static_cast<const uint8_t*>(checked(data, "data", nb::dtype<int32_t>(), {m.strips, m.strip_bytes / 4}, 64));
    return m;
}

std::vector<float> padded_vector(const OptionalArray& array, const char* name, int64_t size) {
    if (!array) return {};
    const float* data = checked<float>(*array, name, {size});
    std::vector<float> out(padded(length_of(*array)), 0.0f);
    std::copy_n(data, length_of(*array), out.begin());
    return out;
}

// An exit, and the arrays that it points to.
struct PackedBranch : Branch {
    OptionalArray vocabulary_array;
    std::vector<Array> owners;
};

PackedBranch make_branch(const Array& entry, int64_t first_layer, int64_t num_layers,
                         const std::optional<PackedMatrix>& head, const OptionalArray& vocabulary,
                         const std::optional<PackedMatrix>& fuse, const std::optional<PackedMatrix>& mix,
                         int64_t num_features, const OptionalArray& token_norm, const OptionalArray& feature_norm) {
    PackedBranch branch{};
    const auto* layers = checked<int32_t>(entry, "entry", {ANY});
    branch.entry.assign(layers, layers + length_of(entry));
    branch.first_layer = in_range(first_layer, "first_layer", 0, 1 << 20);
    branch.num_layers = in_range(num_layers, "num_layers", 0, 1 << 20);
    branch.num_features = in_range(num_features, "num_features", 0, 1 << 20);
    if (branch.entry.empty() && !num_layers) refuse("a branch needs a layer, or must start after one of the model's");
    if ((num_features > 0) != (fuse && mix && token_norm && feature_norm))
        refuse("a branch with features needs fuse, mix and two norms; one without has none of them");
    branch.head = head;
    branch.fuse = fuse;
    branch.mix = mix;
    for (const auto* matrix : {&head, &fuse, &mix})
        if (*matrix) branch.owners.push_back((*matrix)->owner);
    branch.vocabulary_array = vocabulary;
    if (vocabulary) branch.vocabulary = checked<int32_t>(*vocabulary, "vocabulary", {ANY});
    branch.token_norm = padded_vector(token_norm, "token_norm", ANY);
    branch.feature_norm = padded_vector(feature_norm, "feature_norm", ANY);
    return branch;
}

bool runs_here(const std::string& isa) {
#ifdef HOPSKIP_EMULATES_AVX512
    if (isa == "avx512") return true;
#endif
#ifdef HOPSKIP_X86
    __builtin_cpu_init();
    if (isa == "avx2")
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
    return isa == "portable";
}

const Kernels& kernels_for(const std::string& isa) {
    if (!runs_here(isa)) refuse("this processor cannot run the instruction set ", isa);
#ifdef HOPSKIP_X86
    if (isa == "avx2") return avx2_kernels();
    if (isa == "avx512") return avx512_kernels();
#endif
    return portable_kernels();
}

class Engine {
public:
    Engine(const std::string& isa, int threads, const Shape& shape)
        : model_(shape, kernels_for(isa), in_range(threads, "threads", 1, 1024)), shape_(model_.shape()) {}

    const Model& model() const { return model_; }

    void add_layer(const PackedMatrix& q, const PackedMatrix& k, const PackedMatrix& v, const PackedMatrix& o,
                   const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down, const Array& input_norm,
                   const Array& post_norm, const OptionalArray& q_bias, const OptionalArray& k_bias,
                   const OptionalArray& v_bias, const OptionalArray& q_norm, const OptionalArray& k_norm,
                   std::optional<int64_t> cache_layer) {
        const int hidden = shape_.hidden_size, intermediate = shape_.intermediate_size;
        const int queries = shape_.queries_size(), keys = shape_.num_kv_heads * shape_.head_dim;
        Layer layer;
        layer.cache_layer =
            in_range(cache_layer.value_or(model_.num_cache_layers()), "cache_layer", 0, model_.num_cache_layers());
        layer.q = own(q, "q_proj", queries, hidden);
        layer.k = own(k, "k_proj", keys, hidden);
        layer.v = own(v, "v_proj", keys, hidden);
        layer.o = own(o, "o_proj", hidden, queries);
        layer.gate = own(gate, "gate_proj", intermediate, hidden);
        layer.up = own(up, "up_proj", intermediate, hidden);
        layer.down = own(down, "down_proj", hidden, intermediate);
        layer.input_norm = padded_vector(input_norm, "input_layernorm", hidden);
        layer.post_norm = padded_vector(post_norm, "post_attention_layernorm", hidden);
        layer.q_bias = padded_vector(q_bias, "q_proj.bias", queries);
        layer.k_bias = padded_vector(k_bias, "k_proj.bias", keys);
        layer.v_bias = padded_vector(v_bias, "v_proj.bias", keys);
        layer.q_norm = padded_vector(q_norm, "q_norm", shape_.head_dim);
        layer.k_norm = padded_vector(k_norm, "k_norm", shape_.head_dim);
        model_.add_layer(std::move(layer));
    }

    void set_edges(const PackedMatrix& embedding, const PackedMatrix& head, const Array& norm) {
        model_.set_edges(own(embedding, "embed_tokens", shape_.vocab_size, shape_.hidden_size),
                         own(head, "lm_head", shape_.vocab_size, shape_.hidden_size),
                         padded_vector(norm, "norm", shape_.hidden_size));
        is_complete_ = true;
    }

    void set_rope(const Array& cos, const Array& sin) {
        const float* c = checked<float>(cos, "cos", {ANY, shape_.head_dim / 2});
        const float* s = checked<float>(sin, "sin", {length_of(cos), shape_.head_dim / 2});
        model_.set_rope(c, s, length_of(cos));
    }

    void embed(const Array& ids, const Array& out) {
        const int32_t* from = check_ids(ids);
        float* to = hidden(out, "out", length_of(ids));
        nb::gil_scoped_release release;
        model_.embed(from, length_of(ids), to);
    }

    void run_layers(const Array& h, const Array& out, int64_t start, int64_t stop, const Array& slots,
                    const Array& positions, const Array& k, const Array& v, const OptionalArray& k_scales,
                    const OptionalArray& v_scales, const OptionalArray& back, const OptionalArray& taps,
                    const OptionalArray& tapped) {
        const int first = in_range(start, "start", 0, model_.num_layers()),
                  last = in_range(stop, "stop", first, model_.num_layers());
        const CacheView cache = check_cache(k, v, k_scales, v_scales);
        const RowsView rows = check_rows(slots, positions, back, cache);
        const float* in = hidden(h, "h", rows.count);
        float* to = hidden(out, "out", rows.count);
        Taps kept;
        if (taps.has_value() != tapped.has_value()) refuse("taps and tapped go together");
        if (taps) {
            kept.layers = checked<int32_t>(*taps, "taps", {ANY});
            kept.count = length_of(*taps);
            kept.out = checked<float>(*tapped, "tapped", {rows.count, kept.count, shape_.hidden_size});
            for (int i = 0; i < kept.count; ++i)
                in_range(kept.layers[i], "a tap", i ? kept.layers[i - 1] + 1 : first + 1, last);
        }
        std::vector<int32_t> layers(last - first);
        std::iota(layers.begin(), layers.end(), first);
        nb::gil_scoped_release release;
        model_.run_layers(in, to, layers, rows, cache, kept);
    }

    void logits(const Array& h, const Array& out, const PackedMatrix* subset) {
        const Matrix& head = check_head(subset);
        const float* in = hidden(h, "h", ANY);
        float* to = checked<float>(out, "out", {length_of(h), head.rows});
        nb::gil_scoped_release release;
        model_.logits(in, length_of(h), head, to);
    }

    void greedy(const Array& h, const Array& out, const PackedMatrix* subset) {
        const Matrix& head = check_head(subset);
        const float* in = hidden(h, "h", ANY);
        int32_t* to = checked<int32_t>(out, "out", {length_of(h)});
        nb::gil_scoped_release release;
        model_.greedy(in, length_of(h), head, to);
    }

    void draft(const PackedBranch& branch, const Array& ids, const Array& slots, const Array& positions,
               const OptionalArray& features, const OptionalArray& token_states, int64_t k, const Array& limits,
               float min_confidence, const Array& keys, const Array& values, const OptionalArray& k_scales,
               const OptionalArray& v_scales, const Array& tokens, const Array& counts, const Array& states,
               const OptionalArray& probabilities, const OptionalArray& runner_ups, const OptionalArray& temperatures,
               const OptionalArray& uniforms, const OptionalArray& distributions) {
        const int size = shape_.hidden_size, steps = in_range(k, "num_draft_tokens", 1, 1 << 20);
        if (!(min_confidence >= 0 && min_confidence <= 1))
            refuse("min_confidence is ", min_confidence, "; it must be 0 to 1");
        check_branch(branch);
        DraftTask task{};
        task.ids = check_ids(ids);
        if (!length_of(ids)) return;
        const CacheView cache = check_cache(keys, values, k_scales, v_scales);
        const RowsView rows = task.rows = check_rows(slots, positions, std::nullopt, cache);
        if (rows.count != length_of(ids)) refuse("ids and slots differ in length");
        task.k = steps;
        task.min_confidence = min_confidence;
        task.limits = checked<int32_t>(limits, "limits", {ANY});
        const int sequences = length_of(limits), length = std::min(cache.length, model_.rope_length());
        int sequence = -1;
        for (int row = 0; row < rows.count; ++row) {
            const bool goes_on = rows.goes_on(row);
            if (goes_on && !branch.num_layers)
                refuse("slot ", rows.slots[row], " occurs twice; an exit without layers takes one row per sequence");
            sequence += !goes_on;
            if (sequence >= sequences) refuse("there are fewer limits than sequences");
            in_range(task.limits[sequence], "limit", 1, steps);
            in_range(rows.positions[row], "position", 0, length - task.limits[sequence]);
        }
        if (sequence + 1 != sequences) refuse("there are more limits than sequences");
        const bool enters_later = !branch.entry.empty() && branch.num_layers;
        task.features = checked_if<float>(!!branch.fuse, "the branch needs", features, "features",
                                          {rows.count, branch.num_features, size});
        task.token_states =
            checked_if<float>(enters_later, "the branch needs", token_states, "token_states", {rows.count, size});
        task.tokens = checked<int32_t>(tokens, "tokens", {sequences, steps});
        task.counts = checked<int32_t>(counts, "counts", {sequences});
        task.states = checked<float>(states, "states", {sequences, steps, size});
        const int vocabulary = head_of(branch).rows;
        if (probabilities) {
            task.runner_ups =
                checked_if<int32_t>(true, "probabilities need", runner_ups, "runner_ups", {sequences, steps, ANY});
            task.num_runner_ups =
                in_range(static_cast<int64_t>(runner_ups->shape(2)), "the number of runner-ups", 0, vocabulary - 1);
            task.probabilities =
                checked<float>(*probabilities, "probabilities", {sequences, steps, task.num_runner_ups + 1});
        }
        if (temperatures) {
            const float* given = task.temperatures = checked<float>(*temperatures, "temperatures", {sequences});
            const char* who = "temperatures need";
            task.uniforms = checked_if<double>(true, who, uniforms, "uniforms", {sequences, steps});
            task.distributions =
                checked_if<float>(true, who, distributions, "distributions", {sequences, steps, vocabulary});
            for (int i = 0; i < sequences; ++i)
                if (!(given[i] >= 0)) refuse("a temperature is ", given[i], "; it must be at least 0");
        }
        nb::gil_scoped_release release;
        model_.make_room_for(branch);
        model_.draft(branch, cache, task);
    }

private:
    Matrix own(const PackedMatrix& packed, const char* name, int rows, int cols) {
        if (packed.rows != rows || packed.cols != cols)
            refuse(name, " is [", packed.rows, ", ", packed.cols, "]; the model's config asks for [", rows, ", ", cols,
                   "]");
        owners_.push_back(packed.owner);
        return packed;
    }

    float* hidden(const Array& array, const char* name, int64_t rows) {
        return checked<float>(array, name, {rows, shape_.hidden_size});
    }

    const Matrix& head_of(const Branch& branch) const { return branch.head ? *branch.head : model_.head(); }

    // The head that is meant; null: the model's own.
    const Matrix& check_head(const PackedMatrix* subset) {
        if (!is_complete_) refuse("the model has no head yet");
        if (subset && subset->cols != shape_.hidden_size) refuse("the subset's head has ", subset->cols, " columns");
        return subset ? *subset : model_.head();
    }

    const int32_t* check_ids(const Array& ids) {
        if (!is_complete_) refuse("the model has no embedding yet");
        const auto* data = checked<int32_t>(ids, "ids", {ANY});
        for (int i = 0; i < length_of(ids); ++i) in_range(data[i], "token id", 0, shape_.vocab_size - 1);
        return data;
    }

    void check_branch(const PackedBranch& branch) {
        const int size = shape_.hidden_size;
        for (int32_t layer : branch.entry) in_range(layer, "a layer of the branch's entry", 0, model_.num_layers() - 1);
        in_range(branch.first_layer + branch.num_layers, "the branch's end", 0, model_.num_layers());
        if (branch.head && branch.head->cols != size) refuse("the branch's head has ", branch.head->cols, " columns");
        const auto fits = [&](const Matrix& m, int64_t cols) { return m.rows == size && m.cols == cols; };
        const int64_t width = static_cast<int64_t>(size) * branch.num_features;
        if (branch.fuse && !(fits(*branch.fuse, width) && fits(*branch.mix, 2 * size) &&
                             std::ssize(branch.token_norm) >= size && std::ssize(branch.feature_norm) >= size))
            refuse("the branch's mixing does not fit the model");
        const OptionalArray& vocabulary = branch.vocabulary_array;
        if (vocabulary) check_ids(*vocabulary);
        if (!vocabulary && head_of(branch).rows != shape_.vocab_size)
            refuse("a head that lacks tokens needs a draft vocabulary");
        if (vocabulary && length_of(*vocabulary) != head_of(branch).rows)
            refuse("a draft vocabulary needs a token id per row of its head");
    }

    CacheView check_cache(const Array& k, const Array& v, const OptionalArray& k_scales,
                          const OptionalArray& v_scales) {
        const nb::dlpack::dtype bf16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}, type = k.dtype();
        CacheView cache{};
        cache.type = type == bf16 ? CacheType::bf16 : type == nb::dtype<int8_t>() ? CacheType::int8 : CacheType::f32;
        if (cache.type == CacheType::f32 && type != nb::dtype<float>())
            refuse("the cache's k is neither float32, bfloat16 nor int8");
        const int64_t layers = cache.layers = model_.num_cache_layers(), heads = cache.kv_heads = shape_.num_kv_heads;
        const int64_t head_dim = cache.head_dim = shape_.head_dim, alignment = element_size(cache.type);
        cache.k.data = checked(k, "the cache's k", type, {layers, ANY, heads, ANY, head_dim}, alignment);
        const int64_t slots = cache.slots = static_cast<int>(k.shape(1)),
                      length = cache.length = static_cast<int>(k.shape(3));
        cache.v.data = checked(v, "the cache's v", type, {layers, slots, heads, length, head_dim}, alignment);
        const bool is_int8 = cache.type == CacheType::int8;
        cache.k.scales =
            checked_if<float>(is_int8, "an int8 cache needs", k_scales, "k_scales", {layers, slots, heads, length});
        cache.v.scales =
            checked_if<float>(is_int8, "an int8 cache needs", v_scales, "v_scales", {layers, slots, heads, length});
        return cache;
    }

    RowsView check_rows(const Array& slots, const Array& positions, const OptionalArray& back, const CacheView& cache) {
        const auto* slot = checked<int32_t>(slots, "slots", {ANY});
        const int count = length_of(slots), last = std::min(cache.length, model_.rope_length()) - 1;
        const auto* position = checked<int32_t>(positions, "positions", {count});
        const int32_t* steps = back ? checked<int32_t>(*back, "back", {count}) : nullptr;
        std::vector<bool> seen(cache.slots, false);
        for (int i = 0, first = 0; i < count; ++i) {
            in_range(slot[i], "slot", 0, cache.slots - 1);
            in_range(position[i], "position", 0, last);
            const bool goes_on = i > 0 && slot[i] == slot[i - 1];
            if (!goes_on) {
                first = i;
                if (seen[slot[i]]) refuse("slot ", slot[i], " occurs in two segments; each must have its own");
                seen[slot[i]] = true;
            }
            if (steps) {
                in_range(steps[i], "back", goes_on ? 1 : 0, i - first);
                in_range(i - first, "the number of a tree's row", 0, MAX_TREE_ROWS - 1);
                in_range(position[first] + i - first, "the place of a tree's row", 0, last);
            }
            const int parent = i - (steps ? steps[i] : 1);
            if (goes_on && position[i] != position[parent] + 1)
                refuse("positions ", position[parent], " and ", position[i], " of slot ", slot[i],
                       " follow each other; rows of a sequence must be consecutive");
        }
        return {count, slot, position, steps};
    }

    Model model_;
    const Shape& shape_;
    std::vector<Array> owners_;
    bool is_complete_ = false;
};

void make_engine(Engine* self, const std::string& isa, int threads, int64_t hidden_size, int64_t intermediate_size,
                 int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t vocab_size, float rms_norm_eps,
                 int64_t sliding_window) {
    Shape s{};
    s.hidden_size = in_range(hidden_size, "hidden_size", 1, 1 << 20);
    s.intermediate_size = in_range(intermediate_size, "intermediate_size", 1, 1 << 20);
    s.num_heads = in_range(num_heads, "num_attention_heads", 1, 1024);
    s.num_kv_heads = in_range(num_kv_heads, "num_key_value_heads", 1, num_heads);
    s.head_dim = in_range(head_dim, "head_dim", 2, MAX_HEAD_DIM);
    s.vocab_size = in_range(vocab_size, "vocab_size", 1, 1 << 28);
    s.rms_norm_eps = rms_norm_eps;
    s.sliding_window = in_range(sliding_window, "sliding_window", 0, INT32_MAX);
    if (s.num_heads % s.num_kv_heads || s.head_dim % 2) refuse("heads do not divide evenly");
    new (self) Engine(isa, threads, s);
}

}  // namespace

NB_MODULE(_native, m) {
    const auto none = nb::none();
    m.def("runs_here", &runs_here, "isa"_a,
          "Whether this processor has the instruction set: avx512, avx2 or portable.");
    nb::class_<PackedMatrix>(m, "Matrix").def(nb::new_(&make_matrix), "format"_a, "rows"_a, "cols"_a, "data"_a);
    nb::class_<PackedBranch>(m, "Branch")
        .def(nb::new_(&make_branch), nb::kw_only(), "entry"_a, "first_layer"_a, "num_layers"_a, "head"_a = none,
             "vocabulary"_a = none, "fuse"_a = none, "mix"_a = none, "num_features"_a = 0, "token_norm"_a = none,
             "feature_norm"_a = none);
    nb::class_<Engine>(m, "Engine")
        .def("__init__", &make_engine, "isa"_a, "threads"_a, nb::kw_only(), "hidden_size"_a, "intermediate_size"_a,
             "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "vocab_size"_a, "rms_norm_eps"_a, "sliding_window"_a)
        .def("add_layer", &Engine::add_layer, nb::kw_only(), "q"_a, "k"_a, "v"_a, "o"_a, "gate"_a, "up"_a, "down"_a,
             "input_norm"_a, "post_norm"_a, "q_bias"_a = none, "k_bias"_a = none, "v_bias"_a = none, "q_norm"_a = none,
             "k_norm"_a = none, "cache_layer"_a = none)
        .def("set_edges", &Engine::set_edges, "embedding"_a, "head"_a, "norm"_a)
        .def("set_rope", &Engine::set_rope, "cos"_a, "sin"_a)
        .def("embed", &Engine::embed, "ids"_a, "out"_a)
        .def("run_layers", &Engine::run_layers, "h"_a, "out"_a, "start"_a, "stop"_a, "slots"_a, "positions"_a, "k"_a,
             "v"_a, "k_scales"_a = none, "v_scales"_a = none, "back"_a = none, "taps"_a = none, "tapped"_a = none)
        .def("logits", &Engine::logits, "h"_a, "out"_a, "subset"_a = none)
        .def("greedy", &Engine::greedy, "h"_a, "out"_a, "subset"_a = none)
        .def("draft", &Engine::draft, "branch"_a, "ids"_a, "slots"_a, "positions"_a, "features"_a, "token_states"_a,
             "num_draft_tokens"_a, "limits"_a, "min_confidence"_a, "k"_a, "v"_a, "k_scales"_a, "v_scales"_a, "tokens"_a,
             "counts"_a, "states"_a, "probabilities"_a = none, "runner_ups"_a = none, "temperatures"_a = none,
             "uniforms"_a = none, "distributions"_a = none)
        .def_prop_ro("isa", [](const Engine& engine) { return engine.model().isa(); })
        .def_prop_ro("threads", [](const Engine& engine) { return engine.model().threads(); })
        .def_prop_ro("rope_length", [](const Engine& engine) { return engine.model().rope_length(); });
}
