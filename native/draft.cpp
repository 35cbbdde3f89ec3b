// Drafts: a loop of steps in one call. The draft of one sequence is a chain, so its steps cannot share a pass; those of
// several sequences do.
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
int32_t drawn(const float* weights, ptrdiff_t count, double point) {
    double sum = 0;
    int32_t last = 0;
    for (ptrdiff_t token = 0; token < count && sum <= point; ++token) {
        sum += weights[token];
        if (weights[token] > 0) last = static_cast<int32_t>(token);
    }
    return last;
}

}  // namespace

// What enters a branch's layers: features + mix . [norm(token state), norm(features)]. `out` may be `features`.
void Model::mix(const Branch& branch, const float* token_states, const float* features, int count, float* out) {
    const ptrdiff_t size = shape_.hidden_size;
    float* both = mixed_.reserve(count * size * 3);
    float* added = both + count * size * 2;
    for (int row = 0; row < count; ++row) {
        float* to = both + row * size * 2;
        unit_rms(token_states + row * size, branch.token_norm.data(), shape_.hidden_size, shape_.rms_norm_eps, to);
        unit_rms(features + row * size, branch.feature_norm.data(), shape_.hidden_size, shape_.rms_norm_eps, to + size);
    }
    linear(*branch.mix, nullptr, both, count, added);
    for (ptrdiff_t i = 0; i < count * size; ++i) out[i] = features[i] + added[i];
}

void Model::draft(const Branch& branch, const CacheView& cache, const DraftTask& task) {
    const auto turn = pool_.take_turn();
    const ptrdiff_t size = shape_.hidden_size, k = task.k;
    const RowsView& rows = task.rows;
    const Matrix& head = branch.head ? *branch.head : head_;
    const ptrdiff_t vocabulary = head.rows;
    std::vector<int32_t> own_layers(branch.num_layers);
    std::iota(own_layers.begin(), own_layers.end(), branch.first_layer);
    std::vector<int> last_rows;  // of each sequence
    for (int row = 0; row < rows.count; ++row) {
        if (!rows.goes_on(row)) last_rows.push_back(row);
        last_rows.back() = row;
    }
    const int sequences = static_cast<int>(last_rows.size());

    std::vector<int> open(sequences);  // sequences that go on
    std::iota(open.begin(), open.end(), 0);
    std::vector<int32_t> slots, positions;
    // The states of the open sequences' latest tokens where the branch begins.
    const auto enter = [&](int step, float* out) {
        std::vector<int32_t> last_ids;
        slots.clear();
        positions.clear();
        for (int sequence : open) {
            const int row = last_rows[sequence];
            last_ids.push_back(step ? task.tokens[sequence * k + step - 1] : task.ids[row]);
            slots.push_back(rows.slots[row]);
            positions.push_back(rows.positions[row] + step);
        }
        const int count = static_cast<int>(open.size());
        embed(last_ids.data(), count, out);
        if (!branch.entry.empty()) run_layers(out, out, branch.entry, {count, slots.data(), positions.data()}, cache);
    };

    std::vector<float> token_states(rows.count * size), hidden(sequences * size), logits;
    if (branch.num_layers == 0) {
        enter(0, hidden.data());
    } else {
        if (!branch.entry.empty()) {
            std::copy_n(task.token_states, token_states.size(), token_states.data());
            enter(0, hidden.data());
            for (int i = 0; i < sequences; ++i)
                std::copy_n(&hidden[i * size], size, &token_states[last_rows[i] * size]);
        } else {
            embed(task.ids, rows.count, token_states.data());
        }
        if (branch.fuse) {
            std::vector<float> normed(rows.count * branch.num_features * size), fused(token_states.size());
            for (ptrdiff_t i = 0; i < std::ssize(normed); i += size)
                unit_rms(task.features + i, nullptr, shape_.hidden_size, shape_.rms_norm_eps, &normed[i]);
            linear(*branch.fuse, nullptr, normed.data(), rows.count, fused.data());
            mix(branch, token_states.data(), fused.data(), rows.count, token_states.data());
        }
        run_layers(token_states.data(), token_states.data(), own_layers, rows, cache);
        for (int i = 0; i < sequences; ++i) std::copy_n(&token_states[last_rows[i] * size], size, &hidden[i * size]);
    }

    std::vector<int32_t> best(sequences);
    std::fill_n(task.counts, sequences, 0);
    const bool wants_logits = task.min_confidence > 0 || task.probabilities || task.temperatures;
    const int runner_ups = task.num_runner_ups;
    const auto best_of = [&](const float* row) {
        return static_cast<int32_t>(std::max_element(row, row + vocabulary) - row);
    };
    const auto token_of = [&](int32_t row) { return branch.vocabulary ? branch.vocabulary[row] : row; };
    for (int step = 0;; ++step) {
        const int count = static_cast<int>(open.size());
        if (wants_logits) {
            logits.resize(vocabulary * count);
            this->logits(hidden.data(), count, head, logits.data());
            for (int i = 0; i < count; ++i) best[i] = best_of(logits.data() + vocabulary * i);
        } else {
            greedy(hidden.data(), count, head, best.data());
        }
        std::vector<int> still_open;
        for (int i = 0; i < count; ++i) {
            const int sequence = open[i];
            const ptrdiff_t place = sequence * k + step;
            float probability = 1;
            if (wants_logits) {
                float* row = logits.data() + vocabulary * i;
                const float temperature = task.temperatures ? task.temperatures[sequence] : 0;
                const float total =
                    kernels_.exponentiate(row, vocabulary, row[best[i]], temperature > 0 ? 1 / temperature : 1);
                if (temperature > 0) {
                    best[i] = drawn(row, vocabulary, task.uniforms[place] * total);
                    float* distribution = task.distributions + vocabulary * place;
                    for (ptrdiff_t token = 0; token < vocabulary; ++token) distribution[token] = row[token] / total;
                }
                probability = row[best[i]] / total;
                for (int next = 0; task.probabilities && next <= runner_ups; ++next) {
                    const int32_t token = next ? best_of(row) : best[i];
                    task.probabilities[(runner_ups + 1) * place + next] = row[token] / total;
                    if (next) task.runner_ups[runner_ups * place + next - 1] = token_of(token);
                    row[token] = -1;  // below all others
                }
            }
            task.tokens[place] = token_of(best[i]);
            task.counts[sequence] = step + 1;
            std::copy_n(&hidden[i * size], size, task.states + size * place);
            if (probability >= task.min_confidence && step + 1 < std::min(task.k, task.limits[sequence])) {
                // moves to the front, where the next step looks for it
                std::copy_n(&hidden[i * size], size, hidden.data() + size * std::ssize(still_open));
                still_open.push_back(sequence);
            }
        }
        open = std::move(still_open);
        if (open.empty()) return;
        if (branch.num_layers == 0) {
            enter(step + 1, hidden.data());
            continue;
        }
        enter(step + 1, token_states.data());
        const RowsView next{static_cast<int>(open.size()), slots.data(), positions.data()};
        if (branch.mix)
            mix(branch, token_states.data(), hidden.data(), next.count, hidden.data());
        else
            std::copy_n(token_states.data(), next.count * size, hidden.data());
        run_layers(hidden.data(), hidden.data(), own_layers, next, cache);
    }
}

}  // namespace hopskip
