// The monitor's thread of DeviceJobs: arrivals that are measured, waits that last too long, and
// answers where the CPU stream gives none.
#include <algorithm>
#include <chrono>

#include "runtime/cuda_job.h"

namespace kt {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// How often the monitor looks for an arrival that is measured; the kernel's timer slack is as long.
constexpr microseconds kArrivalPeriod{50};
// How often a poisoned table, or one without its CPU stream, lets waits go.
constexpr milliseconds kAnswerPeriod{1};

}  // namespace

void DeviceJobs::monitor() {
  const bool limited = timeout_ms_ > 0 && way_ == SignalWay::kDoorbell;
  const milliseconds period{limited ? std::clamp<int64_t>(timeout_ms_ / 4, 5, 1000) : 1000};
  std::chrono::steady_clock::time_point next_look;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (taken_over_ || (poisoned_.load() && way_ == SignalWay::kDoorbell)) {
      answer_all();
      monitor_wake_.wait_for(lock, kAnswerPeriod);
      continue;
    }
    // also while an arrival is looked for: the wait that is stuck may be that of another job
    if (const auto now = std::chrono::steady_clock::now(); now >= next_look) {
      if (limited && look_for_stuck_waits()) continue;
      next_look = now + period;
    }
    if (watched_ == nullptr || watched_arrival_ns_ != 0) {
      monitor_wake_.wait_until(lock, next_look);
    } else if (watched_->slot->arrived.load(std::memory_order_relaxed) == watched_->id) {
      watched_arrival_ns_ = now_ns();
    } else {
      monitor_wake_.wait_for(lock, kArrivalPeriod);
    }
  }
}

// Under the mutex. Whether one was found.
bool DeviceJobs::look_for_stuck_waits() {
  const int64_t now = now_ns();
  const int count = num_slots_.load(std::memory_order_relaxed);
  const DeviceJob* stuck = nullptr;
  for (int i = 0; i < count; ++i) {
    const uint32_t id = slots_[i].load(std::memory_order_relaxed)->arrived.load();
    // a graph that is launched again and again waits for the same job each time
    const uint64_t runs = id >= 1 && id <= jobs_.size() ? jobs_[id - 1]->num_runs : 0;
    if (seen_[i].id != id || seen_[i].runs != runs) seen_[i] = {id, runs, now};
    const bool late = id != 0 && now - seen_[i].since_ns > timeout_ms_ * 1'000'000;
    if (late && id <= jobs_.size()) stuck = jobs_[id - 1].get();
  }
  if (stuck == nullptr) return false;
  error_ = stuck_sentence(stuck->work.layer_idx);
  poisoned_.store(true);
  idle_.notify_all();
  return true;
}

// Under the mutex. Lets every wait go, whatever it waits for.
void DeviceJobs::answer_all() {
  const int count = num_slots_.load(std::memory_order_relaxed);
  for (int i = 0; i < count; ++i) {
    Slot& slot = *slots_[i].load(std::memory_order_relaxed);
    const uint32_t rung = taken_over_ ? slot.req.exchange(0) : 0;
    const uint32_t waiting = slot.arrived.load();
    if (waiting != 0) {
      slot.done.store(waiting, std::memory_order_release);
    } else if (rung != 0) {
      slot.done.store(rung, std::memory_order_release);
    }
  }
}

}  // namespace kt
