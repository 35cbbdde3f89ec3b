// A pool of threads that all run the same function, meeting at barriers: no queue, no allocation between calls.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

namespace hopskip {

class Pool {
public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Calls body(thread) on every thread, 0 being the caller's; returns when all are done. One call at a time; the body must
    // not throw. After a fork the child gets threads of its own.
    template <class Body>
    void run(const Body& body) {
        run_erased([](const void* b, int thread) { (*static_cast<const Body*>(b))(thread); }, &body);
    }

    // Inside run(): waits for all threads. The last to come sets the work counter back before anyone goes on.
    void barrier();

    // Inside run(): shares out the items 0..count-1 of the phase between two barriers. `item` is the first of a thread
    // (its own number), later ones are whatever is left, so that a thread that was held up gets less.
    int first_item(int thread) const { return thread; }
    int next_item() { return state_->next.fetch_add(1, std::memory_order_relaxed); }

private:
    using Erased = void (*)(const void*, int);
    struct alignas(64) State {
        std::atomic<int> job{0};  // counts jobs; a worker waits for it to change
        alignas(64) std::atomic<int> arrived{0};
        alignas(64) std::atomic<int> generation{0};  // of barriers
        alignas(64) std::atomic<int> next{0};
        Erased body = nullptr;
        const void* argument = nullptr;
        bool stop = false;
        std::vector<std::thread> workers;
    };

    void start();
    void run_erased(Erased body, const void* argument);
    static void work(Pool* pool, State* state, int thread);

    int threads_;
    long process_;
    State* state_;
};

}  // namespace hopskip
