// The instruction sets that there are kernels for, and which of them this processor has.
#pragma once

#include <span>
#include <string_view>

#include "kernels.h"

namespace hopskip {

struct InstructionSet {
    const char* name;
    bool (*runs_here)();
    const Kernels& (*kernels)();
};

std::span<const InstructionSet> instruction_sets();     // of this kind of processor, best first
const InstructionSet* find_isa(std::string_view name);  // null if it is none of them

}  // namespace hopskip
