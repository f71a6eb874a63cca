#include "amx/sigill_chain.h"

#include <pthread.h>

#include <atomic>

#include "amx/interpreter.h"

// glibc's sigaction() under the name that nobody takes the place of.
extern "C" int __sigaction(int signal, const struct sigaction* action,
                           struct sigaction* old) noexcept;

namespace kt_amx {
namespace {

std::atomic<bool> taken{false};
// The program's disposition; a spin lock, because a handler may read and change it.
struct sigaction wished = {};
std::atomic_flag lock = ATOMIC_FLAG_INIT;

struct sigaction exchange_wish(const struct sigaction* action) {
  while (lock.test_and_set(std::memory_order_acquire)) {
  }
  const struct sigaction old = wished;
  if (action != nullptr) wished = *action;
  lock.clear(std::memory_order_release);
  return old;
}

bool is_function(const struct sigaction& action) {
  return action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN;
}

void call(const struct sigaction& action, int signal, siginfo_t* info, void* context) {
  if (action.sa_flags & SA_RESETHAND) {
    const struct sigaction none = {};
    exchange_wish(&none);
  }
  if (action.sa_flags & SA_SIGINFO) {
    action.sa_sigaction(signal, info, context);
  } else {
    action.sa_handler(signal);
  }
}

}  // namespace

void take_sigill(SignalHandler handler) {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO;
  sigfillset(&action.sa_mask);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGTRAP}) sigdelset(&action.sa_mask, fault);
  __sigaction(SIGILL, &action, &wished);
  taken = true;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  const bool is_fault = info->si_code > 0;  // else kill() or raise()
  const struct sigaction action = exchange_wish(nullptr);
  if (is_function(action)) {
    call(action, signal, info, context);
    return;
  }
  // as the kernel: a fault cannot be ignored
  if (!is_fault && action.sa_handler == SIG_IGN) return;
  const struct sigaction none = {};
  __sigaction(SIGILL, &none, nullptr);
  // a fault comes again when the handler returns, a signal that was sent has to be sent again
  if (!is_fault) pthread_kill(pthread_self(), signal);
}

}  // namespace kt_amx

extern "C" KT_AMX_EXPORT int sigaction(int signal, const struct sigaction* action,
                                       struct sigaction* old) noexcept {
  if (signal != SIGILL || !kt_amx::taken) return __sigaction(signal, action, old);
  const struct sigaction before = kt_amx::exchange_wish(action);
  if (old != nullptr) *old = before;
  return 0;
}

extern "C" KT_AMX_EXPORT __sighandler_t signal(int signal, __sighandler_t handler) noexcept {
  struct sigaction action = {};
  struct sigaction old = {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  if (sigaddset(&action.sa_mask, signal) != 0) return SIG_ERR;
  return sigaction(signal, &action, &old) == 0 ? old.sa_handler : SIG_ERR;
}
