#include "threads.h"

#include <chrono>
#include <csignal>
#include <stdexcept>
#include <string>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hopskip {

namespace {

constexpr auto SPIN = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // a few dozen cycles, as on x86; `yield` is none on most
#endif
}

}  // namespace

void wait_while_equal(const std::atomic<int>& value, int old) {
    if (value.load(std::memory_order_acquire) != old) return;
    const auto end = std::chrono::steady_clock::now() + SPIN;  // a pause is 10 to 140 cycles, so they are not counted
    do {
        for (int i = 0; i < 16; ++i) {
            pause();
            if (value.load(std::memory_order_acquire) != old) return;
        }
    } while (std::chrono::steady_clock::now() < end);
    value.wait(old, std::memory_order_acquire);
}

namespace {

// Signals go to the program's own threads, where Python handles them: threads that start meanwhile block them all.
class SignalsBlocked {
public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    SignalsBlocked(const SignalsBlocked&) = delete;
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
};

}  // namespace

Pool::Pool(int threads) : threads_(threads), process_(getpid()), state_(started().release()) {}

// All of the threads, or none and an exception.
std::unique_ptr<Pool::State> Pool::started() const {
    auto state = std::make_unique<State>();
    const SignalsBlocked blocked;
    try {
        state->workers.reserve(threads_ - 1);
        for (int thread = 1; thread < threads_; ++thread)
            state->workers.emplace_back([this, &state = *state, thread] { work(state, thread); });
    } catch (const std::exception& error) {
        const size_t running = 1 + state->workers.size();
        stop(*state);
        throw std::runtime_error("cannot start " + std::to_string(threads_) + " threads: the system gave " +
                                 std::to_string(running) + " (" + error.what() + "); ask for fewer");
    }
    return state;
}

void Pool::stop(State& state) const {
    state.stop = true;
    state.job.fetch_add(1, std::memory_order_release);
    state.job.notify_all();
    for (auto& worker : state.workers) worker.join();
}

Pool::~Pool() {
    if (process_ != getpid()) return;  // the threads stayed in the parent, and so does their state
    stop(*state_);
    delete state_;
}

std::unique_lock<std::mutex> Pool::take_turn() {
    // A fork copies the caller's thread only: whoever held the lock no longer exists, and the old state belongs to the
    // parent's threads. Of several threads that find that out one starts new ones, and the others wait for them.
    const long own = getpid();
    for (long seen = process_; seen != own; seen = process_) {
        if (seen == -own) {
            process_.wait(seen);
        } else if (process_.compare_exchange_strong(seen, -own)) {
            try {
                state_ = started().release();
            } catch (...) {
                process_ = seen;
                process_.notify_all();
                throw;
            }
            process_ = own;
            process_.notify_all();
        }
    }
    return std::unique_lock(state_->turn);
}

void Pool::run_erased(int phases, std::function<void(Team&)> body) {
    State& state = *state_;
    state.body = std::move(body);
    const size_t counters = static_cast<size_t>(phases) * (1 + threads_);
    if (state.counters.size() < counters) state.counters = std::vector<std::atomic<int>>(counters);
    for (size_t i = 0; i < counters; ++i) state.counters[i].store(0, std::memory_order_relaxed);
    state.inside.store(0, std::memory_order_release);
    state.job.fetch_add(1, std::memory_order_release);
    state.job.notify_all();
    Team team(0, threads_, state.counters.data());
    state.body(team);
    state.inside.fetch_add(CLOSED, std::memory_order_acq_rel);
    for (int inside; (inside = state.inside.load(std::memory_order_acquire)) != CLOSED;)
        wait_while_equal(state.inside, inside);
}

void Pool::work(State& state, int thread) const {
    for (int seen = 0;;) {
        int job;
        while ((job = state.job.load(std::memory_order_acquire)) == seen) wait_while_equal(state.job, seen);
        seen = job;
        if (state.stop) return;
        int inside = state.inside.load(std::memory_order_relaxed);
        while (inside < CLOSED && !state.inside.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) {
        }
        if (inside >= CLOSED) continue;  // too late for this run
        Team team(thread, threads_, state.counters.data());
        state.body(team);
        state.inside.fetch_sub(1, std::memory_order_acq_rel);
        state.inside.notify_all();
    }
}

}  // namespace hopskip
