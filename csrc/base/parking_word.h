// A 32-bit word that threads wait on: they spin for a set time, then sleep in the kernel (futex).
// Not for ISA objects: it has inline functions.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

namespace kt {

// State     | who writes               | who waits
// value     | advance(), any thread    | wait_while(), any thread
// parked    | wait_while()             | - (advance() reads it)
//
// Ordering  What happened before an advance() is visible to a thread that saw its value, or a later
//           one, in load() or wait_while().
//           No wake-up is lost: a waiter announces itself in `parked`, then looks at the value
//           again; advance() writes the value, then looks at `parked`. The four accesses are
//           seq_cst, so in their one order either advance() sees the waiter and wakes it, or the
//           waiter sees the new value. Between that look and the sleep the kernel compares again.
//           The value only counts up: it comes back to `seen` after 2^32 steps, not by a race.
// Cost      advance() without a sleeper: one locked addition and a load of the same line.
// Lifetime  nobody may wait when it is destroyed, and no advance() may still be running: one that
//           has released a waiter still reads the word.
class alignas(64) ParkingWord {
 public:
  uint32_t load() const { return value_.load(std::memory_order_acquire); }

  void advance() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (num_parked_.load(std::memory_order_seq_cst) == 0) return;
    futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  // Returns the value as soon as it differs from `seen`. Spins for about `spin_us`, then sleeps.
  uint32_t wait_while(uint32_t seen, int spin_us) { return wait(seen, spin_us, nullptr); }

  // As wait_while(), but returns `seen` after sleeping for `sleep_us` (at most some hours).
  uint32_t wait_while_for(uint32_t seen, int spin_us, int64_t sleep_us) {
    const timespec timeout{static_cast<time_t>(sleep_us / 1'000'000),
                           static_cast<long>(sleep_us % 1'000'000) * 1000};
    return wait(seen, spin_us, &timeout);
  }

  // Threads asleep or about to be.
  int num_parked() const { return num_parked_.load(std::memory_order_relaxed); }

 private:
  // One pause takes 40 (Zen 4) to 140 (Skylake and later) cycles, reading the clock about 25 ns:
  // at 64 pauses the clock costs under 3 % of the time and the limit is kept to 3 us.
  static constexpr int kPausesPerClockRead = 64;

  uint32_t wait(uint32_t seen, int spin_us, const timespec* timeout) {
    uint32_t value = load();
    if (value != seen) return value;
    if (spin_us > 0) {
      value = spin_while(seen, spin_us);
      if (value != seen) return value;
    }
    num_parked_.fetch_add(1, std::memory_order_seq_cst);
    // woken for nothing, by a signal or by an earlier advance(): look again
    while ((value = value_.load(std::memory_order_seq_cst)) == seen) {
      if (futex(FUTEX_WAIT_PRIVATE, seen, timeout) == -1 && errno == ETIMEDOUT) break;
    }
    num_parked_.fetch_sub(1, std::memory_order_relaxed);
    return value;
  }

  uint32_t spin_while(uint32_t seen, int spin_us) const {
    using Clock = std::chrono::steady_clock;
    Clock::time_point deadline{};
    while (true) {
      for (int i = 0; i < kPausesPerClockRead; ++i) {
        __builtin_ia32_pause();
        const uint32_t value = load();
        if (value != seen) return value;
      }
      const Clock::time_point now = Clock::now();
      if (deadline == Clock::time_point{}) {
        deadline = now + std::chrono::microseconds(spin_us);
      } else if (now >= deadline) {
        return seen;
      }
    }
  }

  long futex(int operation, uint32_t argument, const timespec* timeout = nullptr) {
    static_assert(sizeof(value_) == sizeof(uint32_t) && decltype(value_)::is_always_lock_free);
    return syscall(SYS_futex, &value_, operation, argument, timeout, nullptr, 0);
  }

  std::atomic<uint32_t> value_{0};
  std::atomic<int> num_parked_{0};
};

}  // namespace kt
