#include "fake_cuda/device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <utility>

namespace fake_cuda {

namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

thread_local bool in_host_function = false;

int environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

}  // namespace

bool inside_host_function() { return in_host_function; }

// The callback thread. Shared with itself: one that hangs in a host function is left behind.
struct HostThread : std::enable_shared_from_this<HostThread> {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Task*> queue;
  Task* current = nullptr;
  std::string current_text;
  bool stopping = false;

  void run() {
    const auto self = shared_from_this();
    in_host_function = true;
    for (;;) {
      Task* task;
      Operation operation;
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return stopping || !queue.empty(); });
        if (stopping) return;
        task = current = queue.front();
        queue.pop_front();
        operation = task->operation;
        current_text = operation.describe();
      }
      if (!Device::get().failure()) operation.function(operation.argument);
      std::lock_guard lock(mutex);
      // after a context error the lane has gone on and the task may be gone
      if (current) current->called.store(true, std::memory_order_release);
      current = nullptr;
      current_text.clear();
    }
  }

  // The lane no longer waits for the task.
  void forget(Task* task) {
    std::lock_guard lock(mutex);
    std::erase(queue, task);
    if (current == task) current = nullptr;
  }
};

// The one queue of all streams in shared-channel mode: hands each task to its lane when it can
// start; a wait holds up what is behind it.
struct Channel {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::pair<Lane*, TaskPtr>> queue;
  std::string head;
  bool stopping = false;
  std::thread thread{[this] { run(); }};

  ~Channel() {
    {
      std::lock_guard lock(mutex);
      stopping = true;
    }
    changed.notify_all();
    thread.join();
  }

  void run() {
    Device& device = Device::get();
    for (;;) {
      std::pair<Lane*, TaskPtr> entry;
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return stopping || !queue.empty(); });
        if (queue.empty()) return;
        entry = std::move(queue.front());
        queue.pop_front();
        head = entry.second->operation.describe();
      }
      // the lane has not seen the task, so its dependencies stand still
      const Task& task = *entry.second;
      poll([&] {
        return device.failure() ||
               std::all_of(task.dependencies.begin(), task.dependencies.end(),
                           [](const TaskPtr& before) {
                             return before->done.load(std::memory_order_acquire);
                           });
      });
      const TaskPtr kept = entry.second;
      entry.first->post(std::move(entry.second));
      if (kept->operation.kind == Kind::kWaitValue) {
        poll([&] { return kept->done.load(std::memory_order_acquire); });
      }
      std::lock_guard lock(mutex);
      head.clear();
    }
  }
};

Device& Device::get() {
  static Device* const device = new Device;
  return *device;
}

Device::Device() {
  restore_defaults();
  std::thread([this] { monitor(); }).detach();
}

void Device::restore_defaults() {
  max_delay_us = environment("FAKE_CUDA_MAX_DELAY_US", 0);
  delay_seed = environment("FAKE_CUDA_SEED", 0);
  ++delay_generation;
  host_functions = true;
  stream_memory_operations = environment("FAKE_CUDA_STREAM_MEMORY_OPERATIONS", 1);
  shared_channel = environment("CUDA_DEVICE_MAX_CONNECTIONS", 8) == 1;
  store_buffer = environment("FAKE_CUDA_STORE_BUFFER", 0) != 0;
  deadlock_timeout_ms = environment("FAKE_CUDA_DEADLOCK_TIMEOUT_MS", 30000);
  deadlocked = false;
  num_violations = 0;
  std::lock_guard lock(mutex_);
  report_.clear();
}

void Device::post(Lane* lane, TaskPtr task) {
  pending.fetch_add(1, std::memory_order_relaxed);
  if (!shared_channel) {
    lane->post(std::move(task));
    return;
  }
  {
    std::lock_guard lock(mutex_);
    if (!channel_) channel_ = std::make_unique<Channel>();
  }
  {
    std::lock_guard lock(channel_->mutex);
    channel_->queue.emplace_back(lane, std::move(task));
  }
  channel_->changed.notify_all();
}

CUresult Device::wait(const TaskPtr& task) {
  if (task) {
    poll([&] { return failure() || task->done.load(std::memory_order_acquire); });
    if (task->done.load(std::memory_order_acquire)) {
      for (const std::shared_ptr<Store>& store : task->stores) store->land();
    }
  }
  return failure();
}

void Device::fail(CUresult error) {
  int none = CUDA_SUCCESS;
  failure_.compare_exchange_strong(none, error);
}

void Device::violate(const std::string& text) {
  ++num_violations;
  std::lock_guard lock(mutex_);
  report_ += "violation: " + text + "\n";
}

std::string Device::report() {
  std::lock_guard lock(mutex_);
  return report_;
}

Lane* Device::acquire_lane() {
  std::lock_guard lock(mutex_);
  const auto idle = std::find_if(free_lanes_.begin(), free_lanes_.end(),
                                 [](const Lane* lane) { return lane->idle(); });
  if (idle != free_lanes_.end()) {
    Lane* const lane = *idle;
    free_lanes_.erase(idle);
    return lane;
  }
  lanes_.push_back(std::make_unique<Lane>(next_lane_++));
  return lanes_.back().get();
}

void Device::release_lane(Lane* lane) {
  lane->set_paused(false);
  std::lock_guard lock(mutex_);
  free_lanes_.push_back(lane);
}

void* Device::allocate(size_t bytes, unsigned flags, bool host) {
  const size_t rounded = (std::max<size_t>(bytes, 1) + 4095) / 4096 * 4096;
  void* const memory = std::aligned_alloc(4096, rounded);
  if (!memory) return nullptr;
  std::memset(memory, 0xCD, rounded);  // nobody may count on zeros
  std::unique_lock lock(regions_mutex_);
  regions_[reinterpret_cast<uintptr_t>(memory)] = {bytes, flags, host, true};
  return memory;
}

bool Device::free(void* memory, bool host) {
  std::unique_lock lock(regions_mutex_);
  const auto found = regions_.find(reinterpret_cast<uintptr_t>(memory));
  if (found == regions_.end() || !found->second.live || found->second.host != host) return false;
  // kept until reset(), so that a graph which still names it is caught and reads what is wrong
  found->second.live = false;
  std::memset(memory, 0xDD, found->second.bytes);
  return true;
}

bool Device::find_region(const void* address, size_t bytes, bool host, unsigned* flags) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  std::shared_lock lock(regions_mutex_);
  auto after = regions_.upper_bound(start);
  if (after == regions_.begin()) return false;
  const auto& [base, region] = *--after;
  if (flags) *flags = region.flags;
  return region.live && region.host == host && start + bytes <= base + region.bytes;
}

uint64_t Device::host_bytes() {
  std::shared_lock lock(regions_mutex_);
  uint64_t total = 0;
  for (const auto& [base, region] : regions_)
    total += region.live && region.host ? region.bytes : 0;
  return total;
}

void Device::call_host_function(Task& task) {
  if (!host_functions) {
    poll([&] { return failure() || host_functions; });
    if (failure()) return;
  }
  std::shared_ptr<HostThread> thread;
  {
    std::lock_guard lock(mutex_);
    if (!host_thread_) {
      host_thread_ = std::make_shared<HostThread>();
      std::thread([created = host_thread_] { created->run(); }).detach();
    }
    thread = host_thread_;
  }
  {
    std::lock_guard lock(thread->mutex);
    thread->queue.push_back(&task);
  }
  thread->changed.notify_all();
  poll([&] { return failure() || task.called.load(std::memory_order_acquire); });
  if (!task.called.load(std::memory_order_acquire)) thread->forget(&task);
}

void Device::remember(const std::shared_ptr<Store>& store) {
  std::lock_guard lock(mutex_);
  recent_stores_.push_back(store);
}

std::string Device::deadlock_report(milliseconds idle) {
  std::ostringstream text;
  text << "deadlock: no operation has ended for " << idle.count() << " ms\n";
  std::lock_guard lock(mutex_);
  for (const std::unique_ptr<Lane>& lane : lanes_) {
    const std::string blocked = lane->blocked_on();
    if (!blocked.empty()) text << "  " << blocked << "\n";
  }
  if (host_thread_) {
    std::lock_guard host_lock(host_thread_->mutex);
    if (!host_thread_->current_text.empty()) {
      text << "  callback thread: inside " << host_thread_->current_text << "; "
           << host_thread_->queue.size() << " behind it\n";
    }
  }
  if (!host_functions) text << "  host functions are not called\n";
  if (channel_) {
    std::lock_guard channel_lock(channel_->mutex);
    if (!channel_->head.empty()) {
      text << "  shared channel: held up by " << channel_->head << "; " << channel_->queue.size()
           << " behind it\n";
    }
  }
  return text.str();
}

void Device::monitor() {
  uint64_t seen = 0;
  auto since = steady_clock::now();
  for (;;) {
    std::this_thread::sleep_for(milliseconds(5));
    const auto now = steady_clock::now();
    std::vector<std::shared_ptr<Store>> old;
    bool paused = false;
    {
      std::lock_guard lock(mutex_);
      while (!recent_stores_.empty()) {
        const std::shared_ptr<Store> store = recent_stores_.front().lock();
        if (store && now - store->made < milliseconds(1000)) break;
        if (store) old.push_back(store);
        recent_stores_.pop_front();
      }
      for (const std::unique_ptr<Lane>& lane : lanes_) paused |= lane->paused();
    }
    for (const std::shared_ptr<Store>& store : old) store->land();
    const uint64_t ended = progress.load(std::memory_order_relaxed);
    if (ended != seen || pending.load() == 0 || running_kernels.load() || paused || failure()) {
      seen = ended;
      since = now;
      continue;
    }
    const auto idle = std::chrono::duration_cast<milliseconds>(now - since);
    const int limit = deadlock_timeout_ms;
    if (limit == 0 || idle.count() < limit) continue;
    const std::string text = deadlock_report(idle);
    std::fputs(text.c_str(), stderr);
    {
      std::lock_guard lock(mutex_);
      report_ += text;
    }
    deadlocked = true;
    fail(CUDA_ERROR_LAUNCH_TIMEOUT);
  }
}

void Device::reset() {
  fail(CUDA_ERROR_UNKNOWN);
  poll([&] { return pending.load() == 0; });
  std::vector<std::unique_ptr<Lane>> lanes;
  std::unique_ptr<Channel> channel;
  {
    std::lock_guard lock(mutex_);
    channel = std::move(channel_);
    lanes.swap(lanes_);
    free_lanes_.clear();
    recent_stores_.clear();
    if (host_thread_) {
      std::lock_guard host_lock(host_thread_->mutex);
      host_thread_->stopping = true;
      host_thread_->changed.notify_all();
      host_thread_.reset();
    }
  }
  channel.reset();
  lanes.clear();
  {
    std::unique_lock lock(regions_mutex_);
    std::erase_if(regions_, [](const auto& entry) {
      if (!entry.second.live) std::free(reinterpret_cast<void*>(entry.first));
      return !entry.second.live;
    });
  }
  restore_defaults();
  failure_ = CUDA_SUCCESS;
}

}  // namespace fake_cuda
