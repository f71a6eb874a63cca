#include "base/fork_guard.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>

#include "base/check.h"

namespace kt {
namespace {

// Between the first process and this one. A process id would cost a system call a check, and ids
// come back.
std::atomic<int> num_forks{0};

[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

ForkGuard::ForkGuard() : num_forks_(num_forks.load(std::memory_order_relaxed)) {}

bool ForkGuard::inherited() const {
  return num_forks.load(std::memory_order_relaxed) != num_forks_;
}

void ForkGuard::check() const {
  KT_CHECK(!inherited(), "process "
                             << getpid()
                             << " is a fork() of the one that made this engine, and has none of "
                                "its threads; make an engine in it, or start it with spawn.");
}

}  // namespace kt
