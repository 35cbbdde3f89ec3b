// Drafts: a loop of steps in one call. The draft of one sequence is a chain, so its steps cannot share a pass; those of
// several sequences do.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "model.h"

namespace hopskip {

namespace {

// Scales `size` numbers to a root mean square of 1, times a weight each if there are any.
void unit_rms(const float* in, const float* weight, int size, float eps, float* out) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += static_cast<double>(in[i]) * in[i];
    const float scale = 1.0f / std::sqrt(static_cast<float>(sum / size) + eps);
    for (int i = 0; i < size; ++i) out[i] = in[i] * scale * (weight ? weight[i] : 1.0f);
}

// The token at a point of the cumulative sum of their weights.
int32_t drawn(const float* weights, size_t count, double point) {
    double sum = 0;
    int32_t last = 0;
    for (size_t token = 0; token < count && sum <= point; ++token) {
        sum += weights[token];
        if (weights[token] > 0) last = static_cast<int32_t>(token);
    }
    return last;
}

}  // namespace

// What enters a branch's layers: features + mix . [norm(token state), norm(features)]. `out` may be `features`.
void Model::mix(const Branch& branch, const float* token_states, const float* features, int count, float* out) {
    const auto size = static_cast<size_t>(shape_.hidden_size), n = static_cast<size_t>(count);
    float* both = mixed_.reserve(n * size * 3);
    float* added = both + n * size * 2;
    for (size_t row = 0; row < n; ++row) {
        unit_rms(token_states + row * size, branch.token_norm.data(), shape_.hidden_size, shape_.rms_norm_eps, both + row * size * 2);
        unit_rms(features + row * size, branch.feature_norm.data(), shape_.hidden_size, shape_.rms_norm_eps, both + row * size * 2 + size);
    }
    linear(*branch.mix, both, count, added);
    for (size_t i = 0; i < n * size; ++i) out[i] = features[i] + added[i];
}

void Model::draft(const Branch& branch, const int32_t* ids, RowsView rows, const DraftInputs& inputs, int k, const int32_t* limits,
                  float min_confidence, const CacheView& cache, const DraftOutputs& outputs) {
    const auto guard = lock();
    const auto size = static_cast<size_t>(shape_.hidden_size);
    const auto vocabulary = static_cast<size_t>(branch.head ? branch.head->rows : shape_.vocab_size);
    std::vector<int32_t> own_layers(static_cast<size_t>(branch.num_layers));
    std::iota(own_layers.begin(), own_layers.end(), branch.first_layer);
    std::vector<int> last_rows;  // of each sequence
    for (int row = 0; row < rows.count; ++row) {
        const bool goes_on = row && rows.slots[row] == rows.slots[row - 1];
        if (!goes_on) last_rows.push_back(row);
        last_rows.back() = row;
    }
    const size_t sequences = last_rows.size();

    std::vector<size_t> open;  // sequences that go on
    std::vector<int32_t> last_ids, slots, positions;
    const auto begin_step = [&](int step) {
        last_ids.clear(), slots.clear(), positions.clear();
        for (size_t i : open) {
            const int row = last_rows[i];
            last_ids.push_back(step ? outputs.tokens[i * static_cast<size_t>(k) + static_cast<size_t>(step) - 1] : ids[row]);
            slots.push_back(rows.slots[row]);
            positions.push_back(rows.positions[row] + step);
        }
    };
    // The states of the open sequences' latest tokens where the branch begins.
    const auto enter = [&](float* out) {
        const int count = static_cast<int>(open.size());
        embed(last_ids.data(), count, out);
        if (!branch.entry.empty()) run_layers(out, out, branch.entry, {count, slots.data(), positions.data()}, cache);
    };

    for (size_t i = 0; i < sequences; ++i) open.push_back(i);
    begin_step(0);
    std::vector<float> token_states(static_cast<size_t>(rows.count) * size), hidden(sequences * size), logits;
    if (branch.num_layers == 0) {
        enter(hidden.data());
    } else {
        if (!branch.entry.empty()) {
            std::copy_n(inputs.token_states, token_states.size(), token_states.data());
            enter(hidden.data());
            for (size_t i = 0; i < sequences; ++i) std::copy_n(hidden.data() + i * size, size, token_states.data() + static_cast<size_t>(last_rows[i]) * size);
        } else {
            embed(ids, rows.count, token_states.data());
        }
        if (branch.fuse) {
            const size_t width = static_cast<size_t>(branch.num_features) * size;
            std::vector<float> normed(static_cast<size_t>(rows.count) * width), fused(token_states.size());
            for (size_t i = 0; i < normed.size(); i += size) unit_rms(inputs.features + i, nullptr, shape_.hidden_size, shape_.rms_norm_eps, normed.data() + i);
            linear(*branch.fuse, normed.data(), rows.count, fused.data());
            mix(branch, token_states.data(), fused.data(), rows.count, token_states.data());
        }
        run_layers(token_states.data(), token_states.data(), own_layers, rows, cache);
        for (size_t i = 0; i < sequences; ++i) std::copy_n(token_states.data() + static_cast<size_t>(last_rows[i]) * size, size, hidden.data() + i * size);
    }

    std::vector<int32_t> best(sequences);
    std::fill(outputs.counts, outputs.counts + sequences, 0);
    const bool wants_logits = min_confidence > 0 || outputs.probabilities || inputs.temperatures;
    const auto width = static_cast<size_t>(outputs.num_runner_ups) + 1;
    const auto token_of = [&](int32_t row) { return branch.vocabulary ? branch.vocabulary[row] : row; };
    for (int step = 0;; ++step) {
        const int count = static_cast<int>(open.size());
        if (wants_logits) {
            logits.resize(vocabulary * open.size());
            this->logits(hidden.data(), count, branch.head, logits.data());
            for (size_t i = 0; i < open.size(); ++i) {
                const float* row = logits.data() + vocabulary * i;
                best[i] = static_cast<int32_t>(std::max_element(row, row + vocabulary) - row);
            }
        } else {
            greedy(hidden.data(), count, branch.head, best.data());
        }
        std::vector<size_t> still_open;
        for (size_t i = 0; i < open.size(); ++i) {
            const size_t sequence = open[i], place = sequence * static_cast<size_t>(k) + static_cast<size_t>(step);
            float* row = logits.data() + vocabulary * i;
            const float temperature = inputs.temperatures ? inputs.temperatures[sequence] : 0;
            const float total = wants_logits ? kernels_.exponentiate(row, vocabulary, row[best[i]], temperature > 0 ? 1 / temperature : 1) : 1;
            if (temperature > 0) {
                best[i] = drawn(row, vocabulary, inputs.uniforms[place] * total);
                float* distribution = outputs.distributions + vocabulary * place;
                for (size_t token = 0; token < vocabulary; ++token) distribution[token] = row[token] / total;
            }
            const float probability = wants_logits ? row[best[i]] / total : 1;
            outputs.tokens[place] = token_of(best[i]);
            outputs.counts[sequence] = step + 1;
            std::copy_n(hidden.data() + size * i, size, outputs.states + size * place);
            const bool is_sure = probability >= min_confidence;
            for (size_t next = 0; outputs.probabilities && next < width; ++next) {
                const auto other = next ? std::max_element(row, row + vocabulary) - row : best[i];
                outputs.probabilities[width * place + next] = row[other] / total;
                if (next) outputs.runner_ups[(width - 1) * place + next - 1] = token_of(static_cast<int32_t>(other));
                row[other] = -1;  // below all others
            }
            if (is_sure && step + 1 < std::min(k, limits[sequence])) {
                // moves to the front, where the next step looks for it
                std::copy_n(hidden.data() + size * i, size, hidden.data() + size * still_open.size());
                still_open.push_back(sequence);
            }
        }
        open = std::move(still_open);
        if (open.empty()) return;
        begin_step(step + 1);
        const RowsView next{static_cast<int>(open.size()), slots.data(), positions.data()};
        if (branch.num_layers == 0) {
            enter(hidden.data());
            continue;
        }
        enter(token_states.data());
        if (branch.mix)
            mix(branch, token_states.data(), hidden.data(), next.count, hidden.data());
        else
            std::copy_n(token_states.data(), open.size() * size, hidden.data());
        run_layers(hidden.data(), hidden.data(), own_layers, next, cache);
    }
}

}  // namespace hopskip
