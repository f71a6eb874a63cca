// What executes on the double's device: tasks on lanes (threads), host functions on one thread, the
// monitor. Knows no handles and no capture; driver.cpp and graphs.cpp turn calls into tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda/driver_abi.h"

namespace fake_cuda {

enum class Kind { kMarker, kKernel, kFault, kCopy, kWriteValue, kWaitValue, kHostFunction };

// What to do; the constants of a captured node.
struct Operation {
  Kind kind = Kind::kMarker;
  const char* name = "";
  int stream = 0;
  void (*function)(void*) = nullptr;
  void* argument = nullptr;
  void* destination = nullptr;
  const void* source = nullptr;
  size_t bytes = 0;
  bool to_host = false;
  bool from_host = false;
  uint32_t* word = nullptr;
  uint32_t value = 0;
  unsigned flags = 0;
  int error = CUDA_SUCCESS;

  std::string describe() const;
  // Whether a wait for the word is over.
  bool satisfied() const;
};

// Bytes that a copy has written and that memory does not show yet.
class Store {
 public:
  Store(void* destination, const void* source, size_t bytes);
  // Writes them, once.
  void land();
  const std::chrono::steady_clock::time_point made = std::chrono::steady_clock::now();

 private:
  std::once_flag once_;
  void* const destination_;
  std::vector<std::byte> bytes_;
};

struct Task {
  Operation operation;
  std::vector<std::shared_ptr<Task>> dependencies;  // cleared by the lane that ran the task
  std::vector<std::shared_ptr<Store>> stores;       // complete when done is set
  std::atomic<bool> called{false};                  // a host function has returned
  std::atomic<bool> done{false};
};
using TaskPtr = std::shared_ptr<Task>;

// A thread that runs tasks in order, each when its dependencies are done. Dependencies are posted
// (to any lane) before the tasks that have them.
//
// Ordering  done is stored with release and read with acquire by dependents only, so a race
//           detector sees no order between streams that the program did not ask for.
class Lane {
 public:
  explicit Lane(int id);
  ~Lane();  // ends after what is posted
  void post(TaskPtr task);
  void set_paused(bool paused);
  bool paused() const { return paused_.load(); }
  bool idle() const;
  std::string blocked_on() const;  // empty when idle

 private:
  void run();
  void delay();
  void execute(Task& task);

  const int id_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<TaskPtr> queue_;
  TaskPtr current_;
  bool stopping_ = false;
  std::atomic<bool> paused_{false};
  uint64_t generation_ = 0;
  std::mt19937_64 random_;
  std::thread thread_;
};

struct Region {
  size_t bytes;
  unsigned flags;
  bool host;
  bool live;
};

struct HostThread;
struct Channel;

// The one device. Leaked on purpose: its threads may outlive main().
class Device {
 public:
  static Device& get();

  void post(Lane* lane, TaskPtr task);
  // Waits for a task and lands what it stored. The context's error, if there is one.
  CUresult wait(const TaskPtr& task);
  CUresult failure() const { return failure_.load(); }
  void fail(CUresult error);
  void violate(const std::string& text);
  std::string report();

  // A lane that nobody uses, or a new one; give it back with release_lane().
  Lane* acquire_lane();
  void release_lane(Lane* lane);

  void* allocate(size_t bytes, unsigned flags, bool host);
  bool free(void* memory, bool host);
  // Whether [address, address + bytes) lies in a live region; its flags.
  bool find_region(const void* address, size_t bytes, bool host, unsigned* flags = nullptr);
  uint64_t host_bytes();

  // Ends everything and starts anew; live memory stays, its owner may still look at it.
  void reset();
  void restore_defaults();

  std::atomic<uint64_t> pending{0};
  std::atomic<uint64_t> progress{0};
  std::atomic<int> running_kernels{0};
  std::atomic<uint64_t> delay_seed{0};
  std::atomic<uint64_t> delay_generation{0};
  std::atomic<int> max_delay_us{0};
  std::atomic<bool> host_functions{true};
  std::atomic<int> stream_memory_operations{1};
  std::atomic<bool> shared_channel{false};
  std::atomic<bool> store_buffer{false};
  std::atomic<int> deadlock_timeout_ms{30000};
  std::atomic<bool> deadlocked{false};
  std::atomic<int> num_violations{0};

  void call_host_function(Task& task);
  void remember(const std::shared_ptr<Store>& store);

 private:
  Device();
  void monitor();
  std::string deadlock_report(std::chrono::milliseconds idle);

  std::atomic<int> failure_{CUDA_SUCCESS};
  std::mutex mutex_;  // lanes, report, stores
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<Lane*> free_lanes_;
  int next_lane_ = 0;
  std::string report_;
  std::deque<std::weak_ptr<Store>> recent_stores_;
  std::shared_ptr<HostThread> host_thread_;
  std::unique_ptr<Channel> channel_;
  std::shared_mutex regions_mutex_;
  std::map<uintptr_t, Region> regions_;
};

// Polls with growing sleeps; a condition variable would order threads that the program leaves
// unordered, and a race detector would then see nothing.
template <typename Ready>
void poll(Ready ready) {
  for (int round = 0; !ready(); ++round) {
    if (round < 32) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(20 << std::min((round - 32) / 16, 4)));
    }
  }
}

// Whether the calling thread is inside a host function.
bool inside_host_function();

}  // namespace fake_cuda
