// Checks the kernels of every instruction set that this processor has, in C++ alone: so they can be run on an emulated
// processor.
//
// kernels [ISA ...]                   checks these, or all; the exit status is 1 if one fails
// kernels best                        prints the instruction set that is chosen here
// kernels count ISA FORMAT ROWS TIMES multiplies a strip of 1024 columns that often; prints the bytes of weights it
// reads
#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "check.h"

namespace hopskip::checks {

namespace {

const InstructionSet& best_isa() {
    for (const InstructionSet& isa : instruction_sets())
        if (isa.runs_here()) return isa;
    std::abort();  // portable always does
}

template <class Check>
bool passes(const char* isa, const char* name, const Check& check) {
    random_bits.seed(1);
    Failures failures;
    const auto start = std::chrono::steady_clock::now();
    check(failures);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s %s: %s (%.1f s)\n", isa, name, failures.count() ? "FAILED" : "passed", seconds.count());
    std::fflush(stdout);
    return !failures.count();
}

bool check_all(std::span<char* const> names) {
    constexpr struct {
        const char* name;
        void (*check)(const Kernels&, Failures&);
    } CHECKS[] = {{"products", check_products},
                  {"rows", check_rows},
                  {"attention", check_attention},
                  {"choosing", check_choosing}};
    bool is_right = passes("all", "threads", check_threads);
    for (const InstructionSet& isa : instruction_sets()) {
        const auto is_it = [&](std::string_view name) { return name == isa.name; };
        if (!isa.runs_here() || (!names.empty() && std::none_of(names.begin(), names.end(), is_it))) continue;
        for (const auto& each : CHECKS)
            is_right &= passes(isa.name, each.name, [&](Failures& failures) { each.check(isa.kernels(), failures); });
    }
    return is_right;
}

}  // namespace

}  // namespace hopskip::checks

int main(int argc, char** argv) {
    using namespace hopskip;
    using namespace hopskip::checks;
    const std::span<char* const> arguments(argv + 1, argc - 1);
    const std::string_view command = argc > 1 ? argv[1] : "";
    if (command == "best") return std::puts(best_isa().name), 0;
    const bool is_count = command == "count" && argc == 6;
    for (const char* name : is_count ? arguments.subspan(1, 1) : arguments) {
        const InstructionSet* isa = find_isa(name);
        if (!isa || !isa->runs_here()) return std::fprintf(stderr, "%s does not run here\n", name), 2;
    }
    if (!is_count) return check_all(arguments) ? 0 : 1;
    const Kernels& kernels = find_isa(argv[2])->kernels();
    const ptrdiff_t bytes = multiply_repeatedly(kernels, argv[3], std::atoi(argv[4]), std::atoi(argv[5]));
    return std::printf("%td\n", bytes), bytes ? 0 : 2;
}
