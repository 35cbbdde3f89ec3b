// The pool: every item of every phase is done once, whatever the number of threads; and waiting ends.
#include "threads.h"

#include <chrono>
#include <thread>

#include "check.h"

namespace hopskip::checks {

namespace {

void check_pool(Failures& failures) {
    constexpr int PHASES = 5, ITEMS = 23;
    for (int threads : {1, 2, 3, 7}) {
        Pool pool(threads);
        for (int run = 0; run < 20; ++run) {
            std::vector<std::atomic<int>> done(PHASES * ITEMS);
            std::atomic<bool> is_early{false};
            pool.run(PHASES, [&](Team& team) {
                for (int phase = 0; phase < PHASES; ++phase)
                    team.share(ITEMS, [&](int item) {
                        if (phase > 0)
                            for (int i = 0; i < ITEMS; ++i)
                                if (done[(phase - 1) * ITEMS + i] != 1) is_early = true;
                        ++done[phase * ITEMS + item];
                    });
            });
            for (const auto& count : done) failures.expect(count == 1, "an item was done %d times", count.load());
            failures.expect(!is_early, "a phase began before the one in front of it was done");
        }
    }
}

// A change while a thread still spins, and one after it has gone to sleep.
void check_waiting(Failures& failures) {
    for (int microseconds : {0, 5, 20'000}) {
        std::atomic<int> value{1}, seen{0};
        std::thread waiter([&] {
            while (value == 1) wait_while_equal(value, 1);
            seen = value.load();
        });
        std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
        value = 2;
        value.notify_all();
        waiter.join();
        failures.expect(seen == 2, "a waiter saw %d", seen.load());
        wait_while_equal(value, 1);  // returns at once
    }
}

}  // namespace

void check_threads(Failures& failures) {
    check_pool(failures);
    check_waiting(failures);
}

}  // namespace hopskip::checks
