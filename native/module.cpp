// The Python module, and what is called for every pass. Arrays are checked here, before anything computes: shape, type,
// layout, alignment, ranges. Integers are copied, so that they stay as they were checked.
#include <cmath>
#include <numeric>

#include "arrays.h"
#include "turns.h"

namespace hopskip {

void bind_cache(nb::module_& m);
void bind_load(nb::module_& m, nb::class_<Model>& engine);
void bind_pack(nb::module_& m);

namespace {

using Owners = std::vector<std::shared_ptr<const void>>;

struct Rows {
    std::vector<int32_t> slots, positions, parent_offsets;
    int32_t largest_slot = -1;
    int64_t largest_place = -1;  // in the cache

    int count() const { return static_cast<int>(slots.size()); }
    RowsView view() const {
        return {count(), slots.data(), positions.data(), parent_offsets.empty() ? nullptr : parent_offsets.data()};
    }
};

Rows make_rows(const Input& slots, const Input& positions, const OptionalInput& parent_offsets) {
    Rows rows;
    rows.slots = copied<int32_t>(slots, "slots");
    rows.positions = copied<int32_t>(positions, "positions", rows.count());
    if (parent_offsets) rows.parent_offsets = copied<int32_t>(*parent_offsets, "parent_offsets", rows.count());
    const RowsView view = rows.view();
    std::vector<int32_t> sequences;  // their slots
    for (int row = 0, first = 0; row < view.count; ++row) {
        const int64_t slot = view.slots[row], position = view.positions[row];
        rows.largest_slot = std::max(rows.largest_slot, in_range(slot, "slot", 0, INT32_MAX));
        in_range(position, "position", 0, INT32_MAX);
        const bool starts = view.starts_sequence(row);
        if (starts) {
            first = row;
            sequences.push_back(view.slots[row]);
        }
        if (view.parent_offsets) {
            in_range(view.parent_offsets[row], "a parent's offset", starts ? 0 : 1, row - first);
            in_range(row - first, "the number of a tree's row", 0, MAX_TREE_ROWS - 1);
        }
        const int64_t parent = row - (view.parent_offsets ? view.parent_offsets[row] : 1);
        if (!starts && position != static_cast<int64_t>(view.positions[parent]) + 1)
            refuse("positions ", view.positions[parent], " and ", position, " of slot ", slot,
                   " follow each other; rows of a sequence must be consecutive");
        rows.largest_place = std::max(rows.largest_place, static_cast<int64_t>(view.positions[first]) + row - first);
    }
    std::sort(sequences.begin(), sequences.end());
    const auto twice = std::adjacent_find(sequences.begin(), sequences.end());
    if (twice != sequences.end()) refuse("slot ", *twice, " occurs in two segments; each must have its own");
    return rows;
}

using SharedRule = std::shared_ptr<Rule>;

int32_t largest_of(const std::vector<int32_t>& tokens) {
    int32_t largest = -1;
    for (int32_t token : tokens) largest = std::max(largest, in_range(token, "token id", 0, INT32_MAX));
    return largest;
}

Rule make_rule(float temperature, uint64_t seed, int64_t top_k, float top_p, float min_p, float repetition,
               float presence, float frequency, std::vector<int32_t> biased, std::vector<float> biases) {
    const auto check = [](const char* name, float value, bool is_right) {
        if (!is_right) refuse(name, " is ", value, ", which is out of range");
    };
    check("temperature", temperature, temperature >= 0);
    check("top_p", top_p, top_p > 0 && top_p <= 1);
    check("min_p", min_p, min_p >= 0 && min_p <= 1);
    check("repetition", repetition, repetition > 0 && std::isfinite(repetition));
    check("presence", presence, std::isfinite(presence));
    check("frequency", frequency, std::isfinite(frequency));
    for (float bias : biases) check("a bias", bias, !std::isnan(bias));
    Rule rule;
    rule.temperature = temperature, rule.top_p = top_p, rule.min_p = min_p;
    rule.top_k = in_range(top_k, "top_k", 0, INT32_MAX);
    rule.seed = seed;
    rule.repetition = repetition, rule.presence = presence, rule.frequency = frequency;
    if (biased.size() != biases.size()) refuse("there are ", biases.size(), " biases for ", biased.size(), " tokens");
    rule.largest_token = largest_of(biased);
    rule.biased = std::move(biased), rule.biases = std::move(biases);
    return rule;
}

void set_counts(Rule& rule, const Input& seen, const Input& counts) {
    std::vector<int32_t> tokens = copied<int32_t>(seen, "seen");
    std::vector<int32_t> generated = copied<int32_t>(counts, "counts", std::ssize(tokens));
    rule.largest_token = std::max(largest_of(tokens), largest_of(rule.biased));
    rule.seen = std::move(tokens), rule.counts = std::move(generated);
}

struct CheckedDraftTask : DraftTask {
    int hidden_size, num_features = 0;  // of the arrays
    Owners owners;
};

CheckedDraftTask make_draft_task(const Input& ids, const Input& limits, float min_confidence,
                                 const OptionalInput& features, const OptionalInput& token_states,
                                 const std::vector<SharedRule>& rules, float sharpness,
                                 std::vector<std::vector<int32_t>> last_tokens, const Output& tokens,
                                 const Output& counts, const Output& states, const OptionalOutput& runner_ups,
                                 const OptionalOutput& sums) {
    CheckedDraftTask task{};
    const auto take = [&]<class T>(const auto& array, const char* name, std::initializer_list<int64_t> shape,
                                   T*& data) {
        data = checked<std::remove_const_t<T>>(array, name, shape);
        task.owners.push_back(owner_of(array));
    };
    if (!(min_confidence >= 0 && min_confidence <= 1))
        refuse("min_confidence is ", min_confidence, "; it must be 0 to 1");
    task.min_confidence = min_confidence;
    task.ids = copied<int32_t>(ids, "ids");
    task.limits = copied<int32_t>(limits, "limits");
    const int64_t rows = std::ssize(task.ids), sequences = std::ssize(task.limits);
    take(tokens, "tokens", {sequences, ANY}, task.tokens);
    const int steps = task.num_draft_tokens = in_range(size_of(tokens, 1), "the width of tokens", 1, 1 << 20);
    for (int32_t limit : task.limits) in_range(limit, "limit", 1, steps);
    take(counts, "counts", {sequences}, task.counts);
    take(states, "states", {sequences, steps, ANY}, task.states);
    task.hidden_size = size_of(states, 2);
    if (features) {
        take(*features, "features", {rows, ANY, task.hidden_size}, task.features);
        task.num_features = size_of(*features, 1);
    }
    if (token_states) take(*token_states, "token_states", {rows, task.hidden_size}, task.token_states);
    if (!!sums != !!runner_ups) refuse("sums and runner_ups go together");
    if (sums) {
        take(*runner_ups, "runner_ups", {sequences, steps, ANY}, task.runner_ups);
        task.num_runner_ups = size_of(*runner_ups, 2);
        take(*sums, "sums", {sequences, steps, task.num_runner_ups + 1}, task.sums);
    }
    if (!rules.empty() && std::ssize(rules) != sequences)
        refuse("there are ", rules.size(), " rules for ", sequences, " sequences");
    task.rules.assign(rules.begin(), rules.end());
    if (!last_tokens.empty() && std::ssize(last_tokens) != sequences)
        refuse("there are ", last_tokens.size(), " lists of last tokens for ", sequences, " sequences");
    task.last_tokens = std::move(last_tokens);
    if (!(sharpness > 0 && std::isfinite(sharpness))) refuse("sharpness is ", sharpness, "; it must be above 0");
    task.sharpness = sharpness;
    return task;
}

void check_ids(const Model& model, const std::vector<int32_t>& ids) {
    if (!model.has_embedding_and_head()) refuse("the model has no embedding yet");
    for (int32_t id : ids) in_range(id, "token id", 0, model.shape().vocab_size - 1);
}

void check_rows(const Model& model, const Rows& rows, Cache& cache) {
    const Shape& shape = model.shape();
    const int head_dim = cache.layout().head_dim;
    if (cache.layers() != model.num_cache_layers() || cache.kv_heads() != shape.num_kv_heads ||
        head_dim != shape.head_dim)
        refuse("the cache has ", cache.layers(), " layers, ", cache.kv_heads(), " key/value heads of size ", head_dim,
               "; the model needs ", model.num_cache_layers(), ", ", shape.num_kv_heads, ", ", shape.head_dim);
    if (!rows.count()) return;
    in_range(rows.largest_slot, "slot", 0, cache.slots() - 1);
    in_range(rows.largest_place, "position", 0, std::min(cache.length(), model.rope_length()) - 1);
}

// The head that is meant; null: the model's own.
const Matrix& check_head(const Model& model, const Matrix* head) {
    if (!model.has_embedding_and_head()) refuse("the model has no head yet");
    if (head && head->cols != model.shape().hidden_size) refuse("the head has ", head->cols, " columns");
    return head ? *head : model.head();
}

void check_exit(const Model& model, const Exit& exit) {
    const int size = model.shape().hidden_size, vocab_size = model.shape().vocab_size;
    for (const auto* layers : {&exit.model_layers, &exit.own_layers})
        for (int32_t layer : *layers) in_range(layer, "a layer of the exit", 0, model.num_layers() - 1);
    const auto fits = [&](const Matrix& m, int64_t cols) { return m.rows == size && m.cols == cols; };
    const bool norms_fit = std::ssize(exit.token_norm) == size && std::ssize(exit.feature_norm) == size;
    const int64_t width = static_cast<int64_t>(size) * exit.num_features;
    if (exit.fuse && !(norms_fit && fits(*exit.fuse, width) && fits(*exit.mix, 2 * size)))
        refuse("the exit's mixing does not fit the model");
    const int head_rows = check_head(model, exit.head ? &*exit.head : nullptr).rows;
    if (exit.vocabulary.empty()) {
        if (head_rows != vocab_size) refuse("a head that lacks tokens needs a draft vocabulary");
        return;
    }
    in_range(exit.largest_token, "token id", 0, vocab_size - 1);
    if (std::ssize(exit.vocabulary) != head_rows) refuse("a draft vocabulary needs a token id per row of its head");
}

void check_task(const Model& model, const Exit& exit, const Rows& rows, Cache& cache, const CheckedDraftTask& task) {
    check_ids(model, task.ids);
    if (!rows.parent_offsets.empty()) refuse("the rows of a draft are no tree; leave out parent_offsets");
    if (rows.count() != std::ssize(task.ids)) refuse("ids and slots differ in length");
    const RowsView view = rows.view();
    const int sequences = static_cast<int>(task.limits.size()), length = std::min(cache.length(), model.rope_length());
    int sequence = -1;
    for (int row = 0; row < view.count; ++row) {
        if (!view.starts_sequence(row) && exit.own_layers.empty())
            refuse("slot ", view.slots[row], " occurs twice; an exit without layers takes one row per sequence");
        sequence += view.starts_sequence(row);
        if (sequence >= sequences) refuse("there are fewer limits than sequences");
        in_range(view.positions[row], "position", 0, length - task.limits[sequence]);
    }
    if (sequence + 1 != sequences) refuse("there are more limits than sequences");
    if (task.hidden_size != model.shape().hidden_size) refuse("states have ", task.hidden_size, " columns");
    if (task.num_features != exit.num_features)
        refuse("the exit needs ", exit.num_features, " features; there are ", task.num_features);
    if (!!task.token_states != exit.needs_token_states())
        refuse(task.token_states ? "the exit takes no token_states" : "the exit needs token_states");
    const int head_rows = exit.head ? exit.head->rows : model.head().rows;
    in_range(task.num_runner_ups, "the number of runner-ups", 0, head_rows - 1);
    for (const auto& rule : task.rules) in_range(rule->largest_token, "token id", -1, model.shape().vocab_size - 1);
}

void embed(Model& model, const Input& ids, const Output& out) {
    const auto tokens = copied<int32_t>(ids, "ids");
    const int count = static_cast<int>(tokens.size());
    float* to = checked<float>(out, "out", {count, model.shape().hidden_size});
    in_turn(model, [&] {
        check_ids(model, tokens);
        model.embed(tokens.data(), count, to);
    });
}

void run_layers(Model& model, const Input& h, const Output& out, int64_t start, int64_t stop, const Rows& rows,
                Cache& cache, const OptionalInput& taps, const OptionalOutput& tapped) {
    const int count = rows.count(), size = model.shape().hidden_size;
    const float* in = checked<float>(h, "h", {count, size});
    float* to = checked<float>(out, "out", {count, size});
    if (!!taps != !!tapped) refuse("taps and tapped go together");
    std::vector<int32_t> tap_layers;
    Taps kept;
    if (taps) {
        tap_layers = copied<int32_t>(*taps, "taps");
        kept = {static_cast<int>(tap_layers.size()), tap_layers.data(), nullptr};
        kept.out = checked<float>(*tapped, "tapped", {count, kept.count, size});
    }
    in_turn(model, [&] {
        const int first = in_range(start, "start", 0, model.num_layers());
        const int last = in_range(stop, "stop", first, model.num_layers());
        for (int i = 0; i < kept.count; ++i)
            in_range(tap_layers[i], "a tap", i ? tap_layers[i - 1] + int64_t{1} : first + 1, last);
        check_rows(model, rows, cache);
        std::vector<int32_t> layers(last - first);
        std::iota(layers.begin(), layers.end(), first);
        model.run_layers(in, to, layers, rows.view(), cache, kept);
    });
}

void logits(Model& model, const Input& h, const Output& out, const PackedMatrix* head) {
    in_turn(model, [&] {
        const Matrix& used = check_head(model, head);
        const float* in = checked<float>(h, "h", {ANY, model.shape().hidden_size});
        float* to = checked<float>(out, "out", {size_of(h, 0), used.rows});
        model.logits(in, size_of(h, 0), used, to);
    });
}

void greedy(Model& model, const Input& h, const Output& out, const PackedMatrix* head) {
    const float* in = checked<float>(h, "h", {ANY, model.shape().hidden_size});
    int32_t* to = checked<int32_t>(out, "out", {size_of(h, 0)});
    in_turn(model, [&] { model.greedy(in, size_of(h, 0), check_head(model, head), to); });
}

// Tokens for hidden states: by a rule each, at a position of the text, after some draft tokens, among allowed ones.
void choose(Model& model, const Input& h, const Output& out, const std::vector<SharedRule>& rules,
            const std::vector<int32_t>& positions, const std::vector<std::vector<int32_t>>& paths,
            const std::vector<OptionalInput>& allowed, std::vector<int32_t> reported, const OptionalOutput& logits) {
    const int vocab_size = model.shape().vocab_size;
    const float* in = checked<float>(h, "h", {ANY, model.shape().hidden_size});
    const size_t count = size_of(h, 0);
    ChoiceTask task{std::vector<Place>(count), checked<int32_t>(out, "out", {static_cast<int64_t>(count)}), {}};
    if (rules.size() != count || positions.size() != count || paths.size() != count || allowed.size() != count)
        refuse("rules, positions, paths and allowed must have ", count, " entries, as h has rows");
    for (size_t row = 0; row < count; ++row) {
        in_range(std::max(rules[row]->largest_token, largest_of(paths[row])), "token id", -1, vocab_size - 1);
        task.places[row] = {rules[row].get(), in_range(positions[row], "position", 0, INT32_MAX), paths[row]};
        if (allowed[row])
            task.places[row].allowed = checked<uint32_t>(*allowed[row], "allowed", {(vocab_size + 31) / 32});
    }
    if (reported.empty() == !!logits) refuse("reported and logits go together");
    for (size_t i = 0; i < reported.size(); ++i)
        in_range(reported[i], "a reported row", i ? reported[i - 1] + int64_t{1} : 0, count - int64_t{1});
    if (logits) task.logits = checked<float>(*logits, "logits", {std::ssize(reported), vocab_size});
    task.reported = std::move(reported);
    in_turn(model, [&] {
        check_head(model, nullptr);
        model.choose(in, count, task);
    });
}

void draft(Model& model, const Exit& exit, const Rows& rows, Cache& cache, const CheckedDraftTask& task) {
    in_turn(model, [&] {
        check_exit(model, exit);
        check_rows(model, rows, cache);
        check_task(model, exit, rows, cache, task);
        if (rows.count()) model.draft(exit, rows.view(), cache, task);
    });
}

void bind_module(nb::module_& m) {
    const auto none = nb::none();
    bind_cache(m);
    nb::class_<Rows>(
        m, "Rows",
        "Where each row lives, int32 [N] each: its slot, its position, and in a tree of tokens how many rows "
        "before it its parent is (0: it starts a sequence). The values are copied.")
        .def("__init__", constructor(&make_rows), nb::kw_only(), "slots"_a, "positions"_a, "parent_offsets"_a = none);
    nb::class_<CheckedDraftTask>(m, "DraftTask",
                                 "What to draft, and arrays for the results; see `DraftTask` in native/model.h.")
        .def("__init__", constructor(&make_draft_task), nb::kw_only(), "ids"_a, "limits"_a, "min_confidence"_a = 0.0f,
             "features"_a = none, "token_states"_a = none, "rules"_a = std::vector<SharedRule>{}, "sharpness"_a = 1.0f,
             "last_tokens"_a = std::vector<std::vector<int32_t>>{}, "tokens"_a, "counts"_a, "states"_a,
             "runner_ups"_a = none, "sums"_a = none);
    nb::class_<Rule>(m, "Rule", "How the tokens of one text are chosen; see native/model.h.")
        .def("__init__", constructor(&make_rule), nb::kw_only(), "temperature"_a = 0.0f, "seed"_a = 0, "top_k"_a = 0,
             "top_p"_a = 1.0f, "min_p"_a = 0.0f, "repetition"_a = 1.0f, "presence"_a = 0.0f, "frequency"_a = 0.0f,
             "biased"_a = std::vector<int32_t>{}, "biases"_a = std::vector<float>{})
        .def("set_counts", &set_counts, "seen"_a, "counts"_a,
             "int32: tokens of the text, each once, and how often each was generated. The values are copied.");
    nb::class_<Model> engine(m, "Engine", "The decoder. Results are written to the arrays given for them.");
    bind_load(m, engine);
    bind_pack(m);
    engine.def("embed", &embed, "ids"_a, "out"_a, "int32 [N] -> float32 [N, D].")
        .def("run_layers", &run_layers, "h"_a, "out"_a, "start"_a, "stop"_a, "rows"_a, "cache"_a, "taps"_a = none,
             "tapped"_a = none,
             "Layers start..stop-1: float32 [N, D] -> [N, D]; also the outputs of layers int32 taps[i] - 1, rising: "
             "tapped [N, taps, D].")
        .def("logits", &logits, "h"_a, "out"_a, "head"_a = none, "float32 [N, D] -> [N, rows of the head].")
        .def("greedy", &greedy, "h"_a, "out"_a, "head"_a = none,
             "float32 [N, D] -> int32 [N], rows of the head; -1 where a logit is not a number.")
        .def(
            "choose", &choose, "h"_a, "out"_a, nb::kw_only(), "rules"_a, "positions"_a, "paths"_a, "allowed"_a,
            "reported"_a = std::vector<int32_t>{}, "logits"_a = none,
            "float32 [N, D] -> int32 [N], a token for each row by its rule, at a position of its text, after a path of "
            "draft tokens, among those that `allowed` (uint32, a bit for each token; None: all) names; -1 where none "
            "can be chosen. Also the rows `reported` of the logits.")
        .def("draft", &draft, "exit"_a, "rows"_a, "cache"_a, "task"_a);
}

}  // namespace

}  // namespace hopskip

NB_MODULE(_native, m) { hopskip::bind_module(m); }
