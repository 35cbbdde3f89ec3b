#include "threads.h"

#include <csignal>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hopskip {

namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins for about 50 microseconds, then sleeps in the kernel: the phases of a pass are far shorter than waking up takes,
// while a model that nobody uses must not cost a core.
void wait_while_equal(const std::atomic<int>& value, int old) {
    for (int spin = 0; spin < 2000; ++spin) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(int threads) : threads_(threads) { start(); }

void Pool::start() {
    process_ = static_cast<long>(getpid());
    state_ = new State;
    if (threads_ == 1) return;
    sigset_t all, before;  // signals go to the program's own threads, where Python handles them
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int thread = 1; thread < threads_; ++thread) state_->workers.emplace_back(work, this, state_, thread);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Pool::~Pool() {
    if (process_ != static_cast<long>(getpid())) return;  // the threads stayed in the parent, and so does their state
    state_->stop = true;
    state_->job.fetch_add(1, std::memory_order_release);
    state_->job.notify_all();
    for (auto& worker : state_->workers) worker.join();
    delete state_;
}

void Pool::run_erased(Erased body, const void* argument) {
    // A fork copies the caller's thread only: leave the old state to the parent's threads and start afresh.
    if (process_ != static_cast<long>(getpid())) start();
    state_->body = body;
    state_->argument = argument;
    state_->next.store(threads_, std::memory_order_relaxed);
    if (threads_ > 1) {
        state_->job.fetch_add(1, std::memory_order_release);
        state_->job.notify_all();
    }
    body(argument, 0);
    barrier();
}

void Pool::work(Pool* pool, State* state, int thread) {
    for (int seen = 0;; ++seen) {
        wait_while_equal(state->job, seen);
        if (state->stop) return;
        state->body(state->argument, thread);
        pool->barrier();
    }
}

void Pool::barrier() {
    if (threads_ == 1) {
        state_->next.store(1, std::memory_order_relaxed);
        return;
    }
    const int generation = state_->generation.load(std::memory_order_relaxed);
    if (state_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        state_->arrived.store(0, std::memory_order_relaxed);
        state_->next.store(threads_, std::memory_order_relaxed);
        state_->generation.store(generation + 1, std::memory_order_release);
        state_->generation.notify_all();
    } else {
        wait_while_equal(state_->generation, generation);
    }
}

}  // namespace hopskip
