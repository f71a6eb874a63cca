// Operations, and the threads that run them.
#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

#include "fake_cuda/device.h"

namespace fake_cuda {

using std::chrono::milliseconds;

std::string Operation::describe() const {
  std::ostringstream text;
  text << name << " on stream " << stream;
  if (kind == Kind::kWaitValue || kind == Kind::kWriteValue) {
    text << ", word " << static_cast<void*>(word) << " value " << value;
  }
  if (kind == Kind::kWaitValue) {
    text << " (the word is " << __atomic_load_n(word, __ATOMIC_RELAXED) << ")";
  }
  if (kind == Kind::kHostFunction) text << ", data " << argument;
  return text.str();
}

bool Operation::satisfied() const {
  const uint32_t now = __atomic_load_n(word, __ATOMIC_ACQUIRE);
  switch (flags & 3) {
    case CU_STREAM_WAIT_VALUE_GEQ: return static_cast<int32_t>(now - value) >= 0;
    case CU_STREAM_WAIT_VALUE_EQ: return now == value;
    case CU_STREAM_WAIT_VALUE_AND: return (now & value) != 0;
    default: return ~(now | value) != 0;
  }
}

Store::Store(void* destination, const void* source, size_t bytes)
    : destination_(destination),
      bytes_(static_cast<const std::byte*>(source), static_cast<const std::byte*>(source) + bytes) {
}

void Store::land() {
  std::call_once(once_, [&] { std::memcpy(destination_, bytes_.data(), bytes_.size()); });
}

Lane::Lane(int id) : id_(id), random_(id), thread_([this] { run(); }) {}

Lane::~Lane() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Lane::post(TaskPtr task) {
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(task));
  }
  changed_.notify_all();
}

void Lane::set_paused(bool paused) {
  {
    std::lock_guard lock(mutex_);
    paused_ = paused;
  }
  changed_.notify_all();
}

bool Lane::idle() const {
  std::lock_guard lock(mutex_);
  return queue_.empty() && !current_;
}

std::string Lane::blocked_on() const {
  std::lock_guard lock(mutex_);
  if (!current_ && queue_.empty()) return {};
  std::ostringstream text;
  const TaskPtr& task = current_ ? current_ : queue_.front();
  text << "lane " << id_ << ": " << task->operation.describe();
  for (const TaskPtr& before : task->dependencies) {
    if (!before->done.load(std::memory_order_acquire)) {
      text << ", which waits for " << before->operation.describe();
    }
  }
  text << "; " << queue_.size() << " behind it";
  return text.str();
}

void Lane::run() {
  Device& device = Device::get();
  for (;;) {
    TaskPtr task;
    {
      std::unique_lock lock(mutex_);
      // a failure ends a pause; it has no signal of its own, hence the timeout
      while (!(stopping_ || (!queue_.empty() && (!paused_ || device.failure())))) {
        if (paused_) {
          changed_.wait_for(lock, milliseconds(5));
        } else {
          changed_.wait(lock);
        }
      }
      if (queue_.empty()) return;
      task = current_ = std::move(queue_.front());
      queue_.pop_front();
    }
    execute(*task);
    {
      std::lock_guard lock(mutex_);
      task->dependencies.clear();
      current_ = nullptr;
    }
    task->done.store(true, std::memory_order_release);
    device.progress.fetch_add(1, std::memory_order_relaxed);
    device.pending.fetch_sub(1, std::memory_order_relaxed);
  }
}

void Lane::delay() {
  Device& device = Device::get();
  const int max_us = device.max_delay_us.load(std::memory_order_relaxed);
  if (max_us == 0) return;
  const uint64_t generation = device.delay_generation.load(std::memory_order_relaxed);
  if (generation != generation_) {
    generation_ = generation;
    random_.seed(device.delay_seed.load(std::memory_order_relaxed) * 1000003 + id_);
  }
  if (random_() & 1) return;
  std::this_thread::sleep_for(std::chrono::microseconds(random_() % (max_us + 1)));
}

void Lane::execute(Task& task) {
  Device& device = Device::get();
  const Operation& operation = task.operation;
  // a wait is over when the word is seen; what follows it then runs at once as often as not
  if (operation.kind != Kind::kMarker) delay();
  poll([&] {
    return device.failure() || std::all_of(task.dependencies.begin(), task.dependencies.end(),
                                           [](const TaskPtr& before) {
                                             return before->done.load(std::memory_order_acquire);
                                           });
  });
  if (device.failure()) return;
  const bool buffered = operation.to_host && device.store_buffer;
  for (const TaskPtr& before : task.dependencies) {
    for (const std::shared_ptr<Store>& store : before->stores) {
      if (buffered) {
        task.stores.push_back(store);
      } else {
        store->land();
      }
    }
  }
  switch (operation.kind) {
    case Kind::kMarker: break;
    case Kind::kKernel:
      device.running_kernels.fetch_add(1, std::memory_order_relaxed);
      operation.function(operation.argument);
      device.running_kernels.fetch_sub(1, std::memory_order_relaxed);
      break;
    case Kind::kFault: device.fail(operation.error); break;
    case Kind::kCopy: {
      if (operation.to_host && !device.find_region(operation.destination, operation.bytes, true)) {
        device.violate(operation.describe() + ": the destination is no live pinned memory");
      }
      if (operation.from_host && !device.find_region(operation.source, operation.bytes, true)) {
        device.violate(operation.describe() + ": the source is no live pinned memory");
      }
      if (buffered) {
        task.stores.push_back(
            std::make_shared<Store>(operation.destination, operation.source, operation.bytes));
        device.remember(task.stores.back());
      } else {
        std::memcpy(operation.destination, operation.source, operation.bytes);
      }
      break;
    }
    case Kind::kWriteValue:
      __atomic_store_n(operation.word, operation.value, __ATOMIC_RELEASE);
      break;
    case Kind::kWaitValue:
      poll([&] {
        return device.failure() || (device.stream_memory_operations != 2 && operation.satisfied());
      });
      break;
    case Kind::kHostFunction: device.call_host_function(task); break;
  }
}

}  // namespace fake_cuda
