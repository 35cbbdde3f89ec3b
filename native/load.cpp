// What is set up once: the instruction set, the model's shape, its layers, head and RoPE tables, and exits.
#include <cmath>

#include "arrays.h"
#include "isa.h"
#include "turns.h"

namespace hopskip {

Model::Model(const Shape& shape, const Kernels& kernels, int threads, Interruption interruption)
    : shape_(shape), kernels_(kernels), pool_(threads),
      widest_(padded(std::max({shape.hidden_size, shape.intermediate_size, shape.queries_size()}))),
      workers_(threads + 1), ask_(interruption) {}

void Model::add_layer(Layer layer) {
    for (auto* norm : {&layer.input_norm, &layer.post_norm, &layer.q_norm, &layer.k_norm})
        norm->resize(padded(static_cast<int>(norm->size())));
    num_cache_layers_ = std::max(num_cache_layers_, layer.cache_layer + 1);
    layers_.push_back(std::move(layer));
}

void Model::set_embedding_and_head(const PackedMatrix& embedding, const PackedMatrix& head, std::vector<float> norm) {
    embedding_ = embedding;
    head_ = head;
    norm_ = std::move(norm);
    norm_.resize(padded(static_cast<int>(norm_.size())));
}

void Model::set_rope(const float* cos, const float* sin, int length) {
    if (length <= rope_length_) return;
    const ptrdiff_t size = static_cast<ptrdiff_t>(length) * (shape_.head_dim / 2);
    cos_.assign(cos, cos + size);
    sin_.assign(sin, sin + size);
    rope_length_ = length;
}

const Kernels& kernels_for(const std::string& isa) {
    const InstructionSet* found = find_isa(isa);
    if (!found || !found->runs_here()) refuse("this processor cannot run the instruction set ", isa);
    return found->kernels();
}

namespace {

Shape make_shape(int64_t hidden_size, int64_t intermediate_size, int64_t num_heads, int64_t num_kv_heads,
                 int64_t head_dim, int64_t vocab_size, float rms_norm_eps, int64_t sliding_window) {
    Shape shape{};
    shape.hidden_size = in_range(hidden_size, "hidden_size", 1, 1 << 20);
    shape.intermediate_size = in_range(intermediate_size, "intermediate_size", 1, 1 << 20);
    shape.num_heads = in_range(num_heads, "num_attention_heads", 1, 1024);
    shape.num_kv_heads = in_range(num_kv_heads, "num_key_value_heads", 1, num_heads);
    shape.head_dim = in_range(head_dim, "head_dim", 2, MAX_HEAD_DIM);
    shape.vocab_size = in_range(vocab_size, "vocab_size", 1, 1 << 28);
    shape.rms_norm_eps = rms_norm_eps;
    shape.sliding_window = in_range(sliding_window, "sliding_window", 0, INT32_MAX);
    if (shape.num_heads % shape.num_kv_heads || shape.head_dim % 2) refuse("heads do not divide evenly");
    return shape;
}

PackedMatrix make_matrix(int format, int64_t rows, int64_t cols, const Input& data) {
    PackedMatrix m{};
    static_cast<Matrix&>(m) = checked_shape(format, rows, cols);
    m.data =
        static_cast<const uint8_t*>(checked(data, "data", nb::dtype<int32_t>(), {m.strips, m.strip_bytes / 4}, 64));
    m.owner = owner_of(data);
    return m;
}

// Empty if there is no such vector.
std::vector<float> vector_of(const OptionalInput& array, const char* name) {
    if (!array) return {};
    auto values = copied<float>(*array, name);
    if (values.empty()) refuse(name, " has no elements; pass None for none");
    return values;
}

Layer make_layer(const PackedMatrix& q, const PackedMatrix& k, const PackedMatrix& v, const PackedMatrix& o,
                 const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down, const Input& input_norm,
                 const Input& post_norm, const OptionalInput& q_bias, const OptionalInput& k_bias,
                 const OptionalInput& v_bias, const OptionalInput& q_norm, const OptionalInput& k_norm) {
    return {q,
            k,
            v,
            o,
            gate,
            up,
            down,
            vector_of(input_norm, "input_layernorm"),
            vector_of(post_norm, "post_attention_layernorm"),
            vector_of(q_bias, "q_proj.bias"),
            vector_of(k_bias, "k_proj.bias"),
            vector_of(v_bias, "v_proj.bias"),
            vector_of(q_norm, "q_norm"),
            vector_of(k_norm, "k_norm"),
            0};
}

Exit make_exit(const Input& model_layers, const OptionalInput& own_layers, const std::optional<PackedMatrix>& head,
               const OptionalInput& vocabulary, const std::optional<PackedMatrix>& fuse,
               const std::optional<PackedMatrix>& mix, int64_t num_features, const OptionalInput& token_norm,
               const OptionalInput& feature_norm) {
    Exit exit{};
    exit.model_layers = copied<int32_t>(model_layers, "model_layers");
    if (own_layers) exit.own_layers = copied<int32_t>(*own_layers, "own_layers");
    if (exit.model_layers.empty() && exit.own_layers.empty())
        refuse("an exit needs a layer, of the model or of its own");
    exit.num_features = in_range(num_features, "num_features", 0, 1 << 20);
    const int parts = !!fuse + !!mix + !!token_norm + !!feature_norm;
    if (parts != (num_features > 0 ? 4 : 0))
        refuse("an exit with features needs fuse, mix and two norms; one without has none of them");
    if (num_features > 0 && exit.own_layers.empty()) refuse("an exit without layers of its own cannot use features");
    exit.head = head;
    exit.fuse = fuse;
    exit.mix = mix;
    exit.token_norm = vector_of(token_norm, "token_norm");
    exit.feature_norm = vector_of(feature_norm, "feature_norm");
    if (!vocabulary) return exit;
    exit.vocabulary = copied<int32_t>(*vocabulary, "vocabulary");
    if (exit.vocabulary.empty()) refuse("vocabulary has no tokens");
    for (int32_t token : exit.vocabulary)
        exit.largest_token = std::max(exit.largest_token, in_range(token, "token id", 0, 1 << 24));
    exit.padded_vocabulary = exit.vocabulary;
    exit.padded_vocabulary.resize(choice_blocks_of(std::ssize(exit.vocabulary)) * CHOICE_BLOCK);
    exit.row_of_token.assign(exit.largest_token + 1, -1);
    for (int row = 0; row < std::ssize(exit.vocabulary); ++row) exit.row_of_token[exit.vocabulary[row]] = row;
    return exit;
}

void check_size(const PackedMatrix& m, const char* name, int rows, int cols) {
    if (m.rows == rows && m.cols == cols) return;
    refuse(name, " is ", listed(std::vector{m.rows, m.cols}), "; the model's config asks for ",
           listed(std::vector{rows, cols}));
}

void check_size(const std::vector<float>& values, const char* name, int size) {
    if (!values.empty() && std::ssize(values) != size)
        refuse(name, " has ", values.size(), " elements; the model's config asks for ", size);
    for (float value : values)
        if (!std::isfinite(value)) refuse(name, " has an element that is ", value, "; weights must be finite");
}

void add_layer(Model& model, Layer layer, std::optional<int64_t> cache_layer) {
    const Shape& shape = model.shape();
    const int hidden = shape.hidden_size, intermediate = shape.intermediate_size;
    const int queries = shape.queries_size(), keys = shape.num_kv_heads * shape.head_dim;
    check_size(layer.q, "q_proj", queries, hidden);
    check_size(layer.k, "k_proj", keys, hidden);
    check_size(layer.v, "v_proj", keys, hidden);
    check_size(layer.o, "o_proj", hidden, queries);
    check_size(layer.gate, "gate_proj", intermediate, hidden);
    check_size(layer.up, "up_proj", intermediate, hidden);
    check_size(layer.down, "down_proj", hidden, intermediate);
    check_size(layer.input_norm, "input_layernorm", hidden);
    check_size(layer.post_norm, "post_attention_layernorm", hidden);
    check_size(layer.q_bias, "q_proj.bias", queries);
    check_size(layer.k_bias, "k_proj.bias", keys);
    check_size(layer.v_bias, "v_proj.bias", keys);
    check_size(layer.q_norm, "q_norm", shape.head_dim);
    check_size(layer.k_norm, "k_norm", shape.head_dim);
    in_turn(model, [&] {
        const int next = model.num_cache_layers();
        layer.cache_layer = in_range(cache_layer.value_or(next), "cache_layer", 0, next);
        model.add_layer(std::move(layer));
    });
}

void set_embedding_and_head(Model& model, const PackedMatrix& embedding, const PackedMatrix& head, const Input& norm) {
    const Shape& shape = model.shape();
    check_size(embedding, "embed_tokens", shape.vocab_size, shape.hidden_size);
    check_size(head, "lm_head", shape.vocab_size, shape.hidden_size);
    auto weights = copied<float>(norm, "norm", shape.hidden_size);
    check_size(weights, "norm", shape.hidden_size);
    in_turn(model, [&] { model.set_embedding_and_head(embedding, head, std::move(weights)); });
}

void set_rope(Model& model, const Input& cos, const Input& sin) {
    const int half = model.shape().head_dim / 2;
    const float* cosines = checked<float>(cos, "cos", {ANY, half});
    const float* sines = checked<float>(sin, "sin", {size_of(cos, 0), half});
    in_turn(model, [&] { model.set_rope(cosines, sines, size_of(cos, 0)); });
}

}  // namespace

void bind_load(nb::module_& m, nb::class_<Model>& engine) {
    const auto none = nb::none();
    nb::list names;
    for (const InstructionSet& isa : instruction_sets()) names.append(isa.name);
    m.attr("ISAS") = nb::tuple(names);
    m.def(
        "runs_here",
        [](const std::string& isa) {
            const InstructionSet* found = find_isa(isa);
            return found && found->runs_here();
        },
        "isa"_a, "Whether this processor has an instruction set, one of ISAS: those with kernels here, best first.");
    nb::class_<Shape>(m, "Shape", "Sizes of a model, from its config.")
        .def("__init__", constructor(&make_shape), nb::kw_only(), "hidden_size"_a, "intermediate_size"_a, "num_heads"_a,
             "num_kv_heads"_a, "head_dim"_a, "vocab_size"_a, "rms_norm_eps"_a, "sliding_window"_a = 0);
    nb::class_<PackedMatrix>(m, "Matrix", "Packed weights [rows, cols]: int32 [strips, words of a strip].")
        .def("__init__", constructor(&make_matrix), "format"_a, "rows"_a, "cols"_a, "data"_a);
    nb::class_<Layer>(m, "Layer", "A decoder layer: matrices, and float32 vectors.")
        .def("__init__", constructor(&make_layer), nb::kw_only(), "q"_a, "k"_a, "v"_a, "o"_a, "gate"_a, "up"_a,
             "down"_a, "input_norm"_a, "post_norm"_a, "q_bias"_a = none, "k_bias"_a = none, "v_bias"_a = none,
             "q_norm"_a = none, "k_norm"_a = none);
    nb::class_<Exit>(m, "Exit",
                     "Where drafts are read: after int32 `model_layers`, then int32 `own_layers`, by number in the "
                     "engine, through `head` (None: the model's), whose rows stand for the tokens int32 `vocabulary`.")
        .def("__init__", constructor(&make_exit), nb::kw_only(), "model_layers"_a, "own_layers"_a = none,
             "head"_a = none, "vocabulary"_a = none, "fuse"_a = none, "mix"_a = none, "num_features"_a = 0,
             "token_norm"_a = none, "feature_norm"_a = none);
    engine
        .def(
            "__init__",
            [](Model* self, const std::string& isa, int64_t threads, const Shape& shape) {
                new (self) Model(shape, kernels_for(isa), in_range(threads, "threads", 1, 1024), &raised_by_signal);
            },
            "isa"_a, "threads"_a, "shape"_a)
        .def("add_layer", &add_layer, "layer"_a, "cache_layer"_a = none,
             "The next layer. Its keys and values lie in `cache_layer` of the cache; None: in one of its own.")
        .def("set_embedding_and_head", &set_embedding_and_head, "embedding"_a, "head"_a, "norm"_a)
        .def("set_rope", &set_rope, "cos"_a, "sin"_a,
             "float32 [positions, head_dim / 2] each. Tables that are no longer than those there are change nothing.")
        .def_prop_ro("isa", &Model::isa)
        .def_prop_ro("threads", &Model::threads)
        .def_prop_ro("rope_length", &Model::rope_length);
}

}  // namespace hopskip
