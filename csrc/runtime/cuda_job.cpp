#include "runtime/cuda_job.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <sstream>
#include <utility>

#include "base/check.h"

namespace kt {
namespace {

using std::chrono::milliseconds;

// As CpuStream's: what is about to happen anyway is caught without a sleep.
constexpr int kSpinUs = 4;
constexpr int64_t kMaxSleepUs = 1'000'000;
// How long retire() waits for eager jobs whose result is on its way: a broken context never rings.
constexpr milliseconds kRetirePatience{10'000};
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr uint64_t kMeasuredOneIn = 8;

}  // namespace

DeviceJobs::DeviceJobs(CpuStream& stream, SignalWay way, int64_t timeout_ms)
    : stream_(stream), way_(way), timeout_ms_(timeout_ms), thread_([this] { monitor(); }) {}

DeviceJobs::~DeviceJobs() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  monitor_wake_.notify_all();
  thread_.join();
}

// --- the table ---

DeviceJob& DeviceJobs::add(Slot& slot, DeviceWork work, bool captured) {
  recycle();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_ids_.empty()) {
    jobs_.push_back(std::make_unique<DeviceJob>());
    jobs_.back()->jobs = this;
    jobs_.back()->id = static_cast<uint32_t>(jobs_.size());
    free_ids_.reserve(jobs_.size());
    free_ids_.push_back(jobs_.back()->id);
  }
  DeviceJob& job = *jobs_[free_ids_.back() - 1];
  free_ids_.pop_back();
  std::unique_ptr<DeviceTimes>& times = times_[work.owner];
  if (times == nullptr) times = std::make_unique<DeviceTimes>();
  job.serial = next_serial_++;
  job.slot = &slot;
  job.buffers = slot.buffers;
  job.work = std::move(work);
  job.captured = captured;
  job.times = times.get();
  job.used = true;
  job.signalled = job.executed = job.synced = job.wait_returned = false;
  job.abandoned = job.retired = false;
  job.finished.store(0, std::memory_order_relaxed);
  return job;
}

DeviceJob& DeviceJobs::find(uint32_t id, uint64_t serial) {
  const std::lock_guard<std::mutex> lock(mutex_);
  DeviceJob* const job = id >= 1 && id <= jobs_.size() ? jobs_[id - 1].get() : nullptr;
  KT_CHECK(job != nullptr && job->used && job->serial == serial && !job->synced && !job->abandoned,
           "device job " << serial
                         << " is not outstanding: it was synced already, or its layer was closed.");
  return *job;
}

void DeviceJobs::set_synced(DeviceJob& job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  job.synced = true;
  release_if_over(job);
}

void DeviceJobs::abandon(DeviceJob& job, bool rung) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    job.abandoned = true;
    if (job.signalled) {
      // nobody on the device looks at the word any more, and the next job must not find it set
      job.slot->done.store(0, std::memory_order_relaxed);
      job.finished.store(0, std::memory_order_relaxed);
    }
    job.executed = job.executed || !rung;
    job.captured = job.captured && rung;
    release_if_over(job);
  }
  recycle();
}

std::vector<Slot*> DeviceJobs::retire(const void* owner) {
  std::vector<Slot*> slots;
  std::vector<DeviceWork> closures;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait_for(lock, kRetirePatience, [&] {
      return poisoned_.load() ||
             std::none_of(jobs_.begin(), jobs_.end(), [&](const std::unique_ptr<DeviceJob>& job) {
               return job->used && job->work.owner == owner && job->synced && !job->captured &&
                      !job->executed;
             });
    });
    for (const std::unique_ptr<DeviceJob>& job : jobs_) {
      if (job->used && job->work.owner == owner) job->retired = true;
    }
    idle_.wait(lock, [&] { return running_ == nullptr || running_->work.owner != owner; });
    for (const std::unique_ptr<DeviceJob>& job : jobs_) {
      if (!job->used || job->work.owner != owner) continue;
      closures.push_back(std::move(job->work));
      job->work.owner = nullptr;
      if (job->synced) continue;
      slots.push_back(job->slot);
      job->abandoned = true;
      if (job->signalled) job->slot->done.store(0, std::memory_order_relaxed);
      release_if_over(*job);
    }
    if (const auto found = times_.find(owner); found != times_.end()) {
      retired_times_.push_back(std::move(found->second));
      times_.erase(found);
    }
  }
  recycle();
  return slots;
}

bool DeviceJobs::refers_to(const Slot& slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::any_of(jobs_.begin(), jobs_.end(), [&](const std::unique_ptr<DeviceJob>& job) {
    return job->used && job->slot == &slot;
  });
}

int DeviceJobs::num_outstanding() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int>(std::count_if(
      jobs_.begin(), jobs_.end(),
      [](const std::unique_ptr<DeviceJob>& job) { return job->used && !job->captured; }));
}

void DeviceJobs::add_slot(Slot& slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int count = num_slots_.load(std::memory_order_relaxed);
  KT_CHECK(count < kMaxSlots, "more than "
                                  << kMaxSlots
                                  << " buffers for device batches are in use; sync what was "
                                     "submitted, or call clear_buffer_cache().");
  slots_[count].store(&slot, std::memory_order_relaxed);
  num_slots_.store(count + 1, std::memory_order_release);
}

void DeviceJobs::remove_slot(Slot& slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int count = num_slots_.load(std::memory_order_relaxed);
  for (int i = 0; i < count; ++i) {
    if (slots_[i].load(std::memory_order_relaxed) != &slot) continue;
    slots_[i].store(slots_[count - 1].load(std::memory_order_relaxed), std::memory_order_relaxed);
    num_slots_.store(count - 1, std::memory_order_release);
    return;
  }
}

DeviceTimes& DeviceJobs::times(const void* owner) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<DeviceTimes>& times = times_[owner];
  if (times == nullptr) times = std::make_unique<DeviceTimes>();
  return *times;
}

// Under the mutex. A job of a graph is never over: the graph may be launched again.
void DeviceJobs::release_if_over(DeviceJob& job) {
  const bool waited = job.synced && (way_ == SignalWay::kDoorbell || job.wait_returned);
  if (job.captured || !job.used || !job.executed || !(job.abandoned || waited)) return;
  job.used = false;
  garbage_.push_back(std::move(job.work));
  free_ids_.push_back(job.id);
}

// Tensors that closures hold may want the GIL when they go: not on the CPU stream's thread.
void DeviceJobs::recycle() {
  std::vector<DeviceWork> closures;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (garbage_.empty()) return;
    closures.swap(garbage_);
    garbage_.swap(spare_);
  }
  closures.clear();
  const std::lock_guard<std::mutex> lock(mutex_);
  spare_.swap(closures);
}

// --- errors ---

void DeviceJobs::fail(const std::string& sentence, bool poison) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error_.empty() || (poison && !poisoned_.load())) error_ = sentence;
    if (poison) poisoned_.store(true);
  }
  if (!poison) return;
  idle_.notify_all();
  finished_.advance();
}

// Where no sentence can be made.
void DeviceJobs::poison() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    poisoned_.store(true);
  }
  idle_.notify_all();
  finished_.advance();
}

int64_t DeviceJobs::now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::string DeviceJobs::stuck_sentence(int layer_idx) const {
  std::ostringstream sentence;
  sentence << "the device waited more than " << static_cast<double>(timeout_ms_) / 1000
           << " s (KT_SYNC_TIMEOUT) for the CPU experts of layer " << layer_idx
           << " and was let go without them; start the server again.";
  return sentence.str();
}

void DeviceJobs::check() {
  std::string sentence;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    sentence = error_;
    if (!poisoned_.load()) error_.clear();
  }
  KT_CHECK(sentence.empty(), sentence);
}

// --- running ---

bool DeviceJobs::ready() {
  const int count = num_slots_.load(std::memory_order_acquire);
  for (int i = 0; i < count; ++i) {
    const Slot* const slot = slots_[i].load(std::memory_order_relaxed);
    if (slot->req.load(std::memory_order_relaxed) != 0) return true;
  }
  return false;
}

// Of several jobs that are rung for, the one that was submitted first: the device rang for it
// first.
void DeviceJobs::run() {
  DeviceJob* job = nullptr;
  uint32_t unknown = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int count = num_slots_.load(std::memory_order_relaxed);
    for (int i = 0; i < count; ++i) {
      Slot& slot = *slots_[i].load(std::memory_order_relaxed);
      const uint32_t id = slot.req.load(std::memory_order_acquire);
      if (id == 0) continue;
      DeviceJob* const rung = id <= jobs_.size() ? jobs_[id - 1].get() : nullptr;
      if (rung == nullptr || !rung->used || rung->slot != &slot) {
        unknown = id;
        slot.req.store(0, std::memory_order_relaxed);
      } else if (job == nullptr || rung->serial < job->serial) {
        job = rung;
      }
    }
    // the device writes the word again only after it has seen this job's done
    if (job != nullptr) job->slot->req.store(0, std::memory_order_relaxed);
  }
  if (unknown != 0) {
    fail("the device rang for job " + std::to_string(unknown) +
             ", which does not exist: its memory is overwritten, or a graph is older than its "
             "buffers; start the server again.",
         true);
  }
  if (job != nullptr) execute(*job);
}

// Whether the work is to run.
bool DeviceJobs::begin(DeviceJob& job) {
  bool gone = false;
  bool watch = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_ = &job;
    job.signalled = false;
    job.begin_ns = now_ns();
    if (closing_.load() || poisoned_.load() || job.abandoned) return false;
    gone = job.retired;
    watch = !gone && way_ == SignalWay::kDoorbell && job.times->jobs.load() % kMeasuredOneIn == 0;
    if (watch) {
      const bool waits = job.slot->arrived.load(std::memory_order_relaxed) == job.id;
      watched_ = &job;
      watched_arrival_ns_ = waits ? job.begin_ns : 0;
    }
  }
  if (watch) monitor_wake_.notify_all();
  if (gone) {
    fail("a graph or a stream wanted the CPU experts of layer " +
             std::to_string(job.work.layer_idx) +
             ", which was closed meanwhile; capture the graphs again after loading weights.",
         false);
  }
  return !gone;
}

void DeviceJobs::end(DeviceJob& job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  job.end_ns = now_ns();
  job.times->jobs.fetch_add(1, std::memory_order_relaxed);
  job.times->cpu_ns.fetch_add(job.end_ns - job.begin_ns, std::memory_order_relaxed);
  if (watched_ == &job) {
    int64_t arrival = watched_arrival_ns_;
    if (arrival == 0) {
      const bool waits = job.slot->arrived.load(std::memory_order_relaxed) == job.id;
      arrival = waits ? job.end_ns : kNever;
    }
    measure(job, arrival);
    watched_ = nullptr;
  }
  if (job.abandoned) return;
  job.signalled = true;
  if (way_ == SignalWay::kDoorbell) {
    job.slot->done.store(job.id, std::memory_order_release);
  } else {
    job.finished.store(1, std::memory_order_release);
    finished_.advance();
  }
}

void DeviceJobs::measure(DeviceJob& job, int64_t arrival_ns) {
  const int64_t hidden = std::clamp(arrival_ns, job.begin_ns, job.end_ns) - job.begin_ns;
  job.times->measured_ns.fetch_add(job.end_ns - job.begin_ns, std::memory_order_relaxed);
  job.times->hidden_ns.fetch_add(hidden, std::memory_order_relaxed);
}

void DeviceJobs::execute(DeviceJob& job) {
  const auto attempt = [&](const std::function<void(const HostBuffers&)>& part) {
    std::string reason;
    try {
      part(job.buffers);
      return true;
    } catch (const std::exception& error) {
      reason = error.what();
    } catch (...) {
      reason = "an exception of unknown type.";
    }
    fail("the CPU experts of layer " + std::to_string(job.work.layer_idx) +
             " failed in a forward that a stream or a graph asked for: " + reason,
         false);
    return false;
  };
  const bool ran = begin(job) && attempt(job.work.run);
  // the device adds this to its own share: zeros until Python learns of the error; after a stuck
  // wait it may be copying already
  if (!ran && !poisoned_.load()) std::memset(job.buffers.output, 0, job.output_bytes);
  end(job);
  if (ran && job.work.run_deferred) attempt(job.work.run_deferred);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    running_ = nullptr;
    job.executed = true;
    ++job.num_runs;
    release_if_over(job);
  }
  idle_.notify_all();
}

// --- host functions: the driver's thread, and no exception may reach it ---

void DeviceJobs::push(void* argument) {
  DeviceJob& job = *static_cast<DeviceJob*>(argument);
  DeviceJobs& jobs = *job.jobs;
  try {
    const std::lock_guard<std::mutex> lock(jobs.mutex_);
    if (!jobs.closing_.load()) {
      jobs.stream_.submit([&jobs, &job] { jobs.execute(job); });
      return;
    }
    job.executed = true;
  } catch (...) {
    // no memory for the closure: what waits is let go
    jobs.poison();
  }
  job.finished.store(1, std::memory_order_release);
  jobs.finished_.advance();
}

void DeviceJobs::wait(void* argument) {
  DeviceJob& job = *static_cast<DeviceJob*>(argument);
  try {
    job.jobs->await(job);
  } catch (...) {
    job.jobs->poison();
  }
}

void DeviceJobs::await(DeviceJob& job) {
  const int64_t arrival = now_ns();
  while (true) {
    const uint32_t seen = finished_.load();
    if (job.finished.exchange(0, std::memory_order_acq_rel) != 0) {
      if (!closing_.load() && !poisoned_.load()) measure(job, arrival);
      break;
    }
    if (closing_.load() || poisoned_.load()) break;
    int64_t sleep_us = kMaxSleepUs;
    if (timeout_ms_ > 0) {
      const int64_t left_us = timeout_ms_ * 1000 - (now_ns() - arrival) / 1000;
      if (left_us <= 0) {
        fail(stuck_sentence(job.work.layer_idx), true);
        break;
      }
      sleep_us = std::min(sleep_us, left_us);
    }
    finished_.wait_while_for(seen, kSpinUs, sleep_us);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  job.wait_returned = true;
  release_if_over(job);
}

void DeviceJobs::wake(void* argument) {
  DeviceJobs& jobs = *static_cast<DeviceJobs*>(argument);
  const std::lock_guard<std::mutex> lock(jobs.mutex_);
  if (!jobs.closing_.load()) jobs.stream_.wake();
}

// --- the end ---

void DeviceJobs::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_.store(true);
  }
  finished_.advance();
}

void DeviceJobs::take_over() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    taken_over_ = true;
  }
  monitor_wake_.notify_all();
}

}  // namespace kt
