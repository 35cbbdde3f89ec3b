#include "turns.h"

#include <unistd.h>
#ifdef __APPLE__
#include <pthread.h>
#else
#include <sys/syscall.h>
#endif

namespace hopskip {

namespace {

bool is_main_thread() {
#ifdef __APPLE__
    return pthread_main_np() != 0;
#else
    return syscall(SYS_gettid) == getpid();
#endif
}

}  // namespace

std::exception_ptr raised_by_signal() {
    if (!is_main_thread()) return nullptr;
    nanobind::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() == 0) return nullptr;
    return std::make_exception_ptr(nanobind::python_error());
}

}  // namespace hopskip
