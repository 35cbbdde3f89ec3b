// How Python's threads come to a model: one after the other, and open to signals.
#pragma once

#include <nanobind/nanobind.h>

#include <exception>

#include "model.h"

namespace hopskip {

// Checks what a model holds, and uses it, while no other thread does. The GIL is let go first: who kept it while
// waiting for a turn would hold up every other thread of the program until then, and for good one that needs it to end
// its own.
template <class Use>
void in_turn(Model& model, const Use& use) {
    nanobind::gil_scoped_release release;
    const auto turn = model.take_turn();
    use();
}

// What a handler of a signal that has come has raised, such as KeyboardInterrupt; null: nothing. Python runs handlers
// on its main thread alone, so on others this asks nobody.
std::exception_ptr raised_by_signal();

}  // namespace hopskip
