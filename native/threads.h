// A pool of threads that share out work item by item, phase by phase: no queue, no allocation between calls.
//
// A phase ends when its items are done, not when its threads have met: one that the system has put to sleep between two items
// holds nobody up, and finds the phases behind it finished when it wakes. On a busy machine that is worth several times the
// speed of a barrier.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

namespace hopskip {

// Sleeps while the value is `old`, after spinning for about 50 microseconds: phases are far shorter than waking up takes.
void wait_while_equal(const std::atomic<int>& value, int old);

struct alignas(64) Phase {
    std::atomic<int> next{0};  // first item that nobody has taken
    std::atomic<int> done{0};
};

// What a thread sees of a run. All threads must ask for the same phases in the same order.
class Team {
public:
    Team(int thread, Phase* phases) : thread_(thread), phases_(phases) {}

    int thread() const { return thread_; }

    // Calls use(item) for every item from 0 to count-1, each on some thread; returns when all of them are done.
    template <class Use>
    void share(int count, const Use& use) {
        Phase& phase = *phases_++;
        int own = 0;
        for (int item = phase.next.fetch_add(1, std::memory_order_relaxed); item < count;
             item = phase.next.fetch_add(1, std::memory_order_relaxed)) {
            use(item);
            ++own;
        }
        if (own > 0 && phase.done.fetch_add(own, std::memory_order_acq_rel) + own == count) phase.done.notify_all();
        for (int done; (done = phase.done.load(std::memory_order_acquire)) != count;) wait_while_equal(phase.done, done);
    }

private:
    int thread_;
    Phase* phases_;
};

class Pool {
public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Calls body(Team&), with at most `phases` phases, on the caller's thread (number 0) and whichever of the others come in
    // time; returns when all have left it. One call at a time; the body must not throw. After a fork the child gets threads
    // of its own.
    template <class Body>
    void run(int phases, const Body& body) {
        run_erased(phases, [](const void* b, Team& team) { (*static_cast<const Body*>(b))(team); }, &body);
    }

private:
    using Erased = void (*)(const void*, Team&);
    static constexpr int CLOSED = 1 << 30;
    struct State {
        std::atomic<int> job{0};                       // counts runs; a worker sleeps until it changes
        alignas(64) std::atomic<int> inside{CLOSED};  // workers in the body; CLOSED more when no more may enter
        Erased body = nullptr;
        const void* argument = nullptr;
        std::vector<Phase> phases;
        std::atomic<bool> stop{false};
        std::vector<std::thread> workers;
    };

    void start();
    void run_erased(int phases, Erased body, const void* argument);
    static void work(State* state, int thread);

    int threads_;
    long process_;
    State* state_;
};

}  // namespace hopskip
