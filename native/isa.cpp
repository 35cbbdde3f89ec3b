#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace hopskip {

// Each at the end of its isa_*.cpp.
const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx512_vnni_kernels();
const Kernels& avx512_kernels();
#elif defined(__aarch64__)
const Kernels& neon_kernels();
const Kernels& neon_dotprod_kernels();
const Kernels& neon_i8mm_kernels();
#endif

namespace {

bool always() { return true; }

#if defined(HOPSKIP_EMULATES)

constexpr auto has_avx2 = always, has_avx_vnni = always, has_avx512_vnni = always, has_avx512 = always;

#elif defined(__x86_64__)

// What __builtin_cpu_supports knows, the system saves on a switch of threads too. Some compilers have no name for what
// is asked for by its bit.
bool has_avx2() {
    unsigned eax, ebx, ecx, edx;
    __builtin_cpu_init();
    const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
    return has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx_vnni() {
    unsigned eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & 1u << 4;
}

bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

bool has_avx512() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

#elif defined(__aarch64__) && defined(__linux__)

// The bits of the kernel's interface; headers may be older than they are.
bool has_dotprod() { return getauxval(AT_HWCAP) & 1ul << 20; }
bool has_i8mm() { return has_dotprod() && getauxval(AT_HWCAP2) & 1ul << 13; }

#elif defined(__aarch64__) && defined(__APPLE__)

bool has_dotprod() { return true; }  // every Mac with ARM, but macOS 11 has no name for it
bool has_i8mm() {
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
}

#elif defined(__aarch64__)

bool has_dotprod() { return false; }  // unknown how to ask
bool has_i8mm() { return false; }

#endif

constexpr InstructionSet ALL[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, avx512_kernels},       {"avx512_vnni", has_avx512_vnni, avx512_vnni_kernels},
    {"avx_vnni", has_avx_vnni, avx_vnni_kernels}, {"avx2", has_avx2, avx2_kernels},
#elif defined(__aarch64__)
    {"neon_i8mm", has_i8mm, neon_i8mm_kernels},
    {"neon_dotprod", has_dotprod, neon_dotprod_kernels},
    {"neon", always, neon_kernels},
#endif
    {"portable", always, portable_kernels},
};

}  // namespace

std::span<const InstructionSet> instruction_sets() { return ALL; }

const InstructionSet* find_isa(std::string_view name) {
    for (const InstructionSet& isa : ALL)
        if (isa.name == name) return &isa;
    return nullptr;
}

}  // namespace hopskip
