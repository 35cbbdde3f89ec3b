// A pool of threads that share out work item by item, phase by phase: no queue, no allocation between calls.
//
// A phase ends when its items are done, not when its threads have met: one that the system has put to sleep between two
// items holds nobody up, and finds the phases behind it finished when it wakes. On a busy machine that is worth several
// times the speed of a barrier.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace hopskip {

// Sleeps while the value is `old`, after spinning for about 50 microseconds: waking up takes far longer than a phase.
void wait_while_equal(const std::atomic<int>& value, int old);

// What a thread sees of a run. All threads must ask for the same phases in the same order.
class Team {
public:
    // counters: for each phase the number of items done, then for each thread how many of its items are taken.
    Team(int thread, int threads, std::atomic<int>* counters)
        : thread_(thread), threads_(threads), counters_(counters) {}

    int thread() const { return thread_; }

    // Calls use(item) for every item from 0 to count-1, each on some thread; returns when all of them are done. A
    // thread begins with consecutive items of its own, so that it reads memory in one stream, and then helps the others
    // with theirs.
    template <class Use>
    void share(int count, const Use& use) {
        std::atomic<int>& done = counters_[0];
        int mine = 0;
        for (int i = 0; i < threads_; ++i) {
            const int owner = (thread_ + i) % threads_;
            const int first = first_of(owner, count), size = first_of(owner + 1, count) - first;
            std::atomic<int>& taken = counters_[1 + owner];
            while (taken.load(std::memory_order_relaxed) < size) {
                const int item = taken.fetch_add(1, std::memory_order_relaxed);
                if (item >= size) break;
                use(first + item);
                ++mine;
            }
        }
        counters_ += 1 + threads_;
        if (mine > 0 && done.fetch_add(mine, std::memory_order_acq_rel) + mine == count) done.notify_all();
        for (int now; (now = done.load(std::memory_order_acquire)) != count;) wait_while_equal(done, now);
    }

private:
    int first_of(int thread, int count) const {
        return static_cast<int>(static_cast<int64_t>(count) * thread / threads_);
    }

    int thread_, threads_;
    std::atomic<int>* counters_;
};

class Pool {
public:
    // Throws std::runtime_error, naming the number, where the system does not give so many threads.
    explicit Pool(int threads);
    Pool(const Pool&) = delete;
    ~Pool();

    int threads() const { return threads_; }

    // Callers of `run` take turns: each holds this lock. After a fork the child gets a lock and threads of its own, and
    // this throws where the system does not give them.
    std::unique_lock<std::mutex> take_turn();

    // Calls body(Team&), with at most `phases` phases, on the caller's thread (number 0) and whichever of the others
    // come in time; returns when all have left it. The body must not throw.
    template <class Body>
    void run(int phases, const Body& body) {
        run_erased(phases, std::cref(body));
    }

private:
    static constexpr int CLOSED = 1 << 30;
    struct State {
        std::mutex turn;
        std::atomic<int> job{0};                      // counts runs; a worker sleeps until it changes
        alignas(64) std::atomic<int> inside{CLOSED};  // workers in the body; CLOSED more when no more may enter
        std::function<void(Team&)> body;
        std::vector<std::atomic<int>> counters;
        std::atomic<bool> stop{false};
        std::vector<std::thread> workers;
    };

    std::unique_ptr<State> started() const;
    void stop(State& state) const;
    void run_erased(int phases, std::function<void(Team&)> body);
    void work(State& state, int thread) const;

    int threads_;
    std::atomic<long> process_;  // that the threads belong to; minus its number while it starts them
    State* state_;
};

}  // namespace hopskip
