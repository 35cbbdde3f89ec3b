// From logits to tokens: penalties, biases, masks, truncation, noise. src/hopskip/sampling.py has the same rules in
// their readable form.
//
// A token is the one of the largest sum of scaled logit and noise among those that truncation leaves. So the best sum
// of all tokens is looked for first, and only that token is held against top-p: what ranks before it must weigh less
// than top-p. If it does not stand, nothing that ranks after it does, and the next is looked for before it. Nothing is
// sorted.
#include "choose.h"

#include <cfloat>
#include <cmath>
#include <limits>

namespace hopskip {

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr float LARGEST_LOGIT = 1e30f;  // a bias of infinity must leave something to compare

using Ranked = std::pair<float, int>;  // a logit and its place

bool ranks_before(const Ranked& a, const Ranked& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
}

uint64_t mixed(uint64_t x) {  // the finalizer of SplitMix64
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

void penalise(const Rule& rule, int count, float& logit) {
    if (rule.repetition != 1) logit *= logit > 0 ? 1 / rule.repetition : rule.repetition;
    if (count > 0) logit -= rule.presence + rule.frequency * static_cast<float>(count);
}

// The k-th logit by rank, from 0. As every block has a largest one, the k-th of these is a bound for it, and nearly all
// blocks lie below that.
Ranked ranked_at(const float* x, const std::vector<float>& maxima, int k, std::vector<Ranked>& candidates) {
    float bound = NEVER;
    if (k < std::ssize(maxima)) {
        std::vector<float> largest = maxima;
        std::nth_element(largest.begin(), largest.begin() + k, largest.end(), std::greater<>());
        bound = largest[k];
    }
    candidates.clear();
    for (int block = 0; block < std::ssize(maxima); ++block) {
        if (maxima[block] < bound) continue;
        for (int i = block * CHOICE_BLOCK; i < (block + 1) * CHOICE_BLOCK; ++i)
            if (x[i] >= bound) candidates.emplace_back(x[i], i);
    }
    std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), ranks_before);
    return candidates[k];
}

void forbid(const uint32_t* allowed, int count, float* logits) {
    for (int first = 0; first < count; first += 32) {
        const uint32_t bits = allowed[first / 32];
        if (bits == UINT32_MAX) continue;
        for (int i = 0; i < 32 && first + i < count; ++i)
            if (!(bits >> i & 1)) logits[first + i] = NEVER;
    }
}

}  // namespace

NoiseKey noise_key(uint64_t seed, int32_t position) {
    const uint64_t key = mixed(mixed(seed) + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(position) + 1));
    return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

float scale_of(const Rule& rule) { return rule.temperature == 0 ? 1 : std::min(1 / rule.temperature, FLT_MAX); }

void adjust(const Rule& rule, std::span<const int32_t> path, const std::vector<int32_t>& row_of_token, float* logits) {
    const auto logit_of = [&](int32_t token) -> float* {
        if (row_of_token.empty()) return &logits[token];
        const int32_t row = token < std::ssize(row_of_token) ? row_of_token[token] : -1;
        return row < 0 ? nullptr : &logits[row];
    };
    if (rule.has_penalties()) {
        const auto in_path = [&](int32_t token) { return static_cast<int>(std::ranges::count(path, token)); };
        for (size_t i = 0; i < rule.seen.size(); ++i)
            if (float* logit = logit_of(rule.seen[i])) penalise(rule, rule.counts[i] + in_path(rule.seen[i]), *logit);
        for (size_t i = 0; i < path.size(); ++i) {
            const bool is_again = std::ranges::find(path.first(i), path[i]) != path.first(i).end();
            if (is_again || std::ranges::find(rule.seen, path[i]) != rule.seen.end()) continue;
            if (float* logit = logit_of(path[i])) penalise(rule, in_path(path[i]), *logit);
        }
    }
    for (size_t i = 0; i < rule.biased.size(); ++i)
        if (float* logit = logit_of(rule.biased[i])) *logit = std::min(*logit + rule.biases[i], LARGEST_LOGIT);
}

int32_t Model::choose_row(const Rule& rule, const Place& place, float* x, Worker& worker) const {
    adjust(rule, place.path, {}, x);
    if (place.allowed) forbid(place.allowed, head_.rows, x);
    const int blocks = choice_blocks_of(head_.rows);
    worker.maxima.resize(blocks);
    const float maximum = kernels_.block_maxima(x, blocks, worker.maxima.data()), scale = scale_of(rule);
    if (!is_number(maximum)) return -1;
    const bool is_drawn = rule.temperature > 0, has_nucleus = is_drawn && rule.top_p < 1;
    const NoiseKey key = noise_key(rule.seed, place.position);
    if (is_drawn && rule.top_k > 0 && rule.top_k < head_.rows) {
        const auto [value, index] = ranked_at(x, worker.maxima, rule.top_k - 1, worker.ranked);
        kernels_.keep_before(x, blocks, value, index + 1);
    }
    const LogitsView view{x, worker.maxima.data(), blocks, nullptr, is_drawn ? &key : nullptr, maximum, scale};
    float sum;
    int32_t index;
    double mass;  // of all that top-p is a share of
    if (is_drawn && rule.min_p > 0) {
        if (has_nucleus) kernels_.best_sums(view, 1, &sum, &index, &mass);  // of more than min-p leaves
        kernels_.keep_from(x, blocks, maximum, scale, std::log(rule.min_p));
        kernels_.best_sums(view, 1, &sum, &index, nullptr);
    } else {
        kernels_.best_sums(view, 1, &sum, &index, has_nucleus ? &mass : nullptr);
    }
    while (has_nucleus && index >= 0 && kernels_.mass_before(view, x[index], index) >= rule.top_p * mass) {
        kernels_.keep_before(x, blocks, x[index], index);
        kernels_.best_sums(view, 1, &sum, &index, nullptr);
    }
    return index;
}

void Model::choose(const float* in, int count, const ChoiceTask& task) {
    padded_logits(in, count, head_, [&](Team& team, int first, int rows, float* logits, ptrdiff_t stride) {
        team.share(rows, [&](int i) {
            const int row = first + i;
            float* x = logits + stride * i;
            const auto report = std::ranges::lower_bound(task.reported, row);
            if (report != task.reported.end() && *report == row)
                std::copy_n(x, head_.rows, task.logits + (report - task.reported.begin()) * ptrdiff_t{head_.rows});
            const Place& place = task.places[row];
            task.tokens[row] = choose_row(*place.rule, place, x, workers_[team.thread()]);
        });
    });
}

}  // namespace hopskip
