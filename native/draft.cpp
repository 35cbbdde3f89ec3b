// Drafts: a loop of steps in one call. The draft of one sequence is a chain, so its steps cannot share a pass; those of
// several sequences do.
#include <cmath>
#include <numeric>

#include "choose.h"

namespace hopskip {

namespace {

// Scales `size` numbers to a root mean square of 1, times a weight each if there are any.
void unit_rms(const float* in, const float* weight, int size, float eps, float* out) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += static_cast<double>(in[i]) * in[i];
    const float scale = 1.0f / std::sqrt(static_cast<float>(sum / size) + eps);
    for (int i = 0; i < size; ++i) out[i] = in[i] * scale * (weight ? weight[i] : 1.0f);
}

}  // namespace

// The drafts of one call. Sequences that go on are open. What is kept of each open sequence moves up as others close.
class Model::Drafter {
public:
    Drafter(Model& model, const Exit& exit, RowsView rows, Cache& cache, const DraftTask& task)
        : model_(model), exit_(exit), rows_(rows), cache_(cache), task_(task),
          head_(exit.head ? *exit.head : model.head_), size_(model.shape_.hidden_size), open_(task.limits.size()),
          token_states_(rows.count * size_), hidden_(open_.size() * size_), best_(open_.size()),
          is_sure_(open_.size(), true) {
        std::iota(open_.begin(), open_.end(), 0);
        for (int row = 0; row < rows.count; ++row) {
            if (rows.starts_sequence(row)) last_rows_.push_back(row);
            last_rows_.back() = row;
        }
        for (int row : last_rows_) {
            ids_.push_back(task.ids[row]);
            slots_.push_back(rows.slots[row]);
            positions_.push_back(rows.positions[row]);
        }
    }

    // Brings the exit's own layers up to date with all rows, and gives the first hidden states.
    void enter() {
        if (exit_.own_layers.empty()) return run_model_layers(hidden_.data());
        float* states = token_states_.data();
        if (exit_.model_layers.empty()) {
            model_.embed(task_.ids.data(), rows_.count, states);
        } else {
            std::copy_n(task_.token_states, token_states_.size(), states);
            run_model_layers(hidden_.data());
            for (int sequence : open_)
                std::copy_n(&hidden_[sequence * size_], size_, states + last_rows_[sequence] * size_);
        }
        if (exit_.fuse) mix(states, fused_features().data(), rows_.count, states);
        model_.run_layers(states, states, exit_.own_layers, rows_, cache_);
        for (int sequence : open_)
            std::copy_n(states + last_rows_[sequence] * size_, size_, &hidden_[sequence * size_]);
    }

    // Chooses the tokens of one step, and closes the sequences that end with them. Says whether any is still open.
    bool choose(int step) {
        const int count = static_cast<int>(open_.size());
        const bool is_plain = std::ranges::all_of(task_.rules, [](const auto& rule) { return rule->is_plain(); });
        if (is_plain && !task_.runner_ups && task_.min_confidence == 0) {
            model_.greedy(hidden_.data(), count, head_, best_.data());
        } else {
            model_.padded_logits(
                hidden_.data(), count, head_, [&](Team& team, int first, int rows, float* logits, ptrdiff_t stride) {
                    team.share(rows, [&](int i) {
                        choose_by_logits(first + i, step, logits + stride * i, model_.workers_[team.thread()]);
                    });
                });
        }
        int num_open = 0;
        for (int i = 0; i < count; ++i) {
            const int sequence = open_[i];
            const ptrdiff_t at = place_of(sequence, step);
            task_.counts[sequence] = step + (best_[i] >= 0);
            if (best_[i] < 0) continue;
            const int32_t token = task_.tokens[at] = token_of(best_[i]);
            const float* state = &hidden_[i * size_];
            std::copy_n(state, size_, task_.states + size_ * at);
            if (!is_sure_[i] || step + 1 == task_.limits[sequence] || task_.ends_text(sequence, token)) continue;
            std::copy_n(state, size_, &hidden_[num_open * size_]);
            open_[num_open] = sequence;
            ids_[num_open] = token;
            slots_[num_open] = slots_[i];
            positions_[num_open] = positions_[i] + 1;
            ++num_open;
        }
        open_.resize(num_open);
        return num_open > 0;
    }

    // Runs the open sequences' latest tokens, and gives the next step's hidden states.
    void advance() {
        if (exit_.own_layers.empty()) return run_model_layers(hidden_.data());
        run_model_layers(token_states_.data());
        const RowsView latest = latest_rows();
        if (exit_.mix)
            mix(token_states_.data(), hidden_.data(), latest.count, hidden_.data());
        else
            std::copy_n(token_states_.data(), latest.count * size_, hidden_.data());
        model_.run_layers(hidden_.data(), hidden_.data(), exit_.own_layers, latest, cache_);
    }

private:
    RowsView latest_rows() const { return {static_cast<int>(open_.size()), slots_.data(), positions_.data()}; }

    // The states of the open sequences' latest tokens after the model's layers.
    void run_model_layers(float* out) {
        model_.embed(ids_.data(), latest_rows().count, out);
        if (!exit_.model_layers.empty()) model_.run_layers(out, out, exit_.model_layers, latest_rows(), cache_);
    }

    // Features of the rows, each normed, as one vector a row.
    std::vector<float> fused_features() {
        std::vector<float> normed(rows_.count * exit_.num_features * size_), fused(rows_.count * size_);
        for (ptrdiff_t i = 0; i < std::ssize(normed); i += size_) unit_rms(task_.features + i, nullptr, &normed[i]);
        model_.linear(*exit_.fuse, nullptr, normed.data(), rows_.count, fused.data());
        return fused;
    }

    // What enters the exit's own layers: features + mix . [norm(token state), norm(features)]. `out` may be `features`.
    void mix(const float* token_states, const float* features, int count, float* out) {
        float* both = model_.mixed_.reserve(count * size_ * 3);
        float* added = both + count * size_ * 2;
        for (int row = 0; row < count; ++row) {
            float* to = both + row * size_ * 2;
            unit_rms(token_states + row * size_, exit_.token_norm.data(), to);
            unit_rms(features + row * size_, exit_.feature_norm.data(), to + size_);
        }
        model_.linear(*exit_.mix, nullptr, both, count, added);
        for (ptrdiff_t i = 0; i < count * size_; ++i) out[i] = features[i] + added[i];
    }

    void unit_rms(const float* in, const float* weight, float* out) const {
        hopskip::unit_rms(in, weight, model_.shape_.hidden_size, model_.shape_.rms_norm_eps, out);
    }

    int32_t token_of(int32_t head_row) const {
        return exit_.vocabulary.empty() ? head_row : exit_.vocabulary[head_row];
    }

    ptrdiff_t place_of(int sequence, int step) const {  // in the results
        return static_cast<ptrdiff_t>(sequence) * task_.num_draft_tokens + step;
    }

    // Chooses the token of the i-th open sequence, into best_, and writes what is wanted beside it; -1 where none can
    // be chosen.
    void choose_by_logits(int i, int step, float* logits, Worker& worker) {
        static const Rule plain{};
        const Rule& rule = task_.rules.empty() ? plain : *task_.rules[open_[i]];
        const ptrdiff_t at = place_of(open_[i], step);
        adjust(rule, {task_.tokens + at - step, static_cast<size_t>(step)}, exit_.row_of_token, logits);
        const int blocks = choice_blocks_of(head_.rows), number = 1 + task_.num_runner_ups;
        worker.maxima.resize(blocks);
        const float maximum = model_.kernels_.block_maxima(logits, blocks, worker.maxima.data());
        best_[i] = -1;
        if (!is_number(maximum)) return;
        const float scale = rule.temperature > 0 ? scale_of(rule) * task_.sharpness : 1;
        const NoiseKey key = noise_key(rule.seed, positions_[i] + 1);
        const int32_t* ids = exit_.vocabulary.empty() ? nullptr : exit_.padded_vocabulary.data();
        std::vector<float> sums(number);
        std::vector<int32_t> found(number);
        const LogitsView view{logits, worker.maxima.data(), blocks, ids, rule.temperature > 0 ? &key : nullptr, maximum,
                              scale};
        double mass;
        model_.kernels_.best_sums(view, number, sums.data(), found.data(), task_.min_confidence > 0 ? &mass : nullptr);
        best_[i] = std::max(found[0], 0);
        if (task_.min_confidence > 0)
            is_sure_[i] = std::exp((logits[best_[i]] - maximum) * scale) / mass >= task_.min_confidence;
        if (!task_.runner_ups) return;
        std::ranges::copy(sums, task_.sums + number * at);
        for (int rank = 1; rank < number; ++rank)
            task_.runner_ups[task_.num_runner_ups * at + rank - 1] = token_of(std::max(found[rank], 0));
    }

    Model& model_;
    const Exit& exit_;
    const RowsView rows_;
    Cache& cache_;
    const DraftTask& task_;
    const Matrix& head_;
    const ptrdiff_t size_;
    std::vector<int> open_, last_rows_;             // sequences; the last row of each sequence
    std::vector<int32_t> ids_, slots_, positions_;  // of the open sequences' latest tokens
    std::vector<float> token_states_, hidden_;      // the next tokens are read from hidden_
    std::vector<int32_t> best_;                     // the head's rows that the open sequences take; -1: none
    std::vector<char> is_sure_;                     // whether the open sequences may go on after them
};

void Model::draft(const Exit& exit, RowsView rows, Cache& cache, const DraftTask& task) {
    if (exit.fuse) widest_ = std::max(widest_, padded(std::max(exit.fuse->cols, exit.mix->cols)));
    Drafter drafter(*this, exit, rows, cache, task);
    drafter.enter();
    for (int step = 0; drafter.choose(step); ++step) drafter.advance();
}

}  // namespace hopskip
