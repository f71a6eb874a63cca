// The CPU's side of device jobs: what was submitted, running what is rung for, errors, the monitor,
// counters. Calls no CUDA (its header only names slots); cuda_sync.h has the protocol.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/parking_word.h"
#include "runtime/cpu_stream.h"
#include "runtime/cuda_arena.h"

namespace kt {

enum class SignalWay { kDoorbell, kHostFunction };

// What a job does on the CPU. The closures are destroyed on the thread that submits, syncs or
// retires, never on the CPU stream's.
struct DeviceWork {
  std::function<void(const HostBuffers&)> run;           // writes output; an exception is kept
  std::function<void(const HostBuffers&)> run_deferred;  // after done; may be empty
  const void* owner = nullptr;                           // for retire() and times()
  int layer_idx = 0;       // for messages; not above the last one submitted: a pass begins
  int chain_position = 0;  // neighbours in a pass differ in parity
};

// Of one owner since its first job. Units: nanoseconds of wall time.
//
// cpu_ns       from the begin of a job to its done, deferred part not counted
// measured_ns  cpu_ns of the jobs whose overlap was measured: with host functions all of them, with
//              doorbells the first and every eighth after it
// hidden_ns    of measured_ns, the time before the device arrived at the wait: what the caller does
//              not see. Doorbells: the arrival is looked for every 50 us, so it is up to that late.
// overlap = hidden_ns / measured_ns
struct DeviceTimes {
  std::atomic<uint64_t> jobs{0};
  std::atomic<uint64_t> cpu_ns{0};
  std::atomic<uint64_t> measured_ns{0};
  std::atomic<uint64_t> hidden_ns{0};
};

class DeviceJobs;

struct DeviceJob {
  DeviceJobs* jobs = nullptr;
  uint32_t id = 0;      // index in the table, + 1; free for another job when this one is recycled
  uint64_t serial = 0;  // never used twice; ascending in the order of submission
  Slot* slot = nullptr;
  HostBuffers buffers;
  size_t output_bytes = 0;
  DeviceWork work;
  bool captured = false;  // a graph rings for it, again and again
  DeviceTimes* times = nullptr;

  // guarded by the table's mutex
  bool used = false;           // false: recycled
  bool signalled = false;      // the CPU has said that it is done (in its last run)
  bool executed = false;       // ran to its end, deferred part included (once, at least)
  bool synced = false;         // its sync is enqueued
  bool wait_returned = false;  // host functions: the one that waits has returned
  bool abandoned = false;      // nobody will sync it
  bool retired = false;        // its owner is gone
  uint64_t num_runs = 0;

  // host functions: set by the CPU, taken back by the waiting function
  std::atomic<uint32_t> finished{0};
  int64_t begin_ns = 0;  // of the last run; published by done or finished
  int64_t end_ns = 0;
};

// Threads   ready(), run(): the CPU stream's. push(), wait(), wake(): the driver's callback thread.
//           The rest: any thread.
// Locks     the mutex is held for a few instructions only, never while CUDA is called or work runs.
// Lifetime  a graph or stream that was not drained may still refer to it: then it is never
//           destroyed (see DeviceSync).
class DeviceJobs : public PolledWork {
 public:
  // timeout_ms: how long the device may wait for one job; 0: for ever.
  DeviceJobs(CpuStream& stream, SignalWay way, int64_t timeout_ms);
  ~DeviceJobs() override;

  // Enters a job; `serial`, `id`, `times` are filled in. The reference holds until it is recycled.
  DeviceJob& add(Slot& slot, DeviceWork work, bool captured);
  // The job of a ticket. Errors  kt::Error: it is not outstanding.
  DeviceJob& find(uint32_t id, uint64_t serial);
  void set_synced(DeviceJob& job);
  // Nobody will sync the job. `rung`: the device rings, or has rung, for it.
  void abandon(DeviceJob& job, bool rung);
  // Waits for eager jobs of an owner whose sync is enqueued, 10 s at most. From then on its jobs
  // fail without running, and none of them runs. Those without a sync are abandoned; their slots.
  std::vector<Slot*> retire(const void* owner);
  // Whether jobs refer to the slot.
  bool refers_to(const Slot& slot);
  // Eager jobs that are not over as far as the CPU knows.
  int num_outstanding();

  void add_slot(Slot& slot);
  // On the CPU stream's thread, or when that one does not poll.
  void remove_slot(Slot& slot);

  // Throws the first error since the last check(); a poisoned table throws for ever.
  void check();
  // Keeps an error. poison: the state of the device side is unknown, nothing runs any more.
  void fail(const std::string& sentence, bool poison);

  // No work runs any more: what is rung is answered at once.
  void close();
  // After close(), when the CPU stream no longer polls: the monitor's thread answers what is rung.
  void take_over();

  DeviceTimes& times(const void* owner);
  SignalWay way() const { return way_; }

  bool ready() override;
  void run() override;

  // Host functions, with a DeviceJob or the DeviceJobs as their argument.
  static void push(void* job);
  static void wait(void* job);
  static void wake(void* jobs);

 private:
  static constexpr int kMaxSlots = 256;

  void execute(DeviceJob& job);
  bool begin(DeviceJob& job);
  void end(DeviceJob& job);
  void await(DeviceJob& job);
  void measure(DeviceJob& job, int64_t arrival_ns);
  void release_if_over(DeviceJob& job);
  void recycle();
  void poison();
  std::string stuck_sentence(int layer_idx) const;
  static int64_t now_ns();

  // cuda_monitor.cpp
  void monitor();
  bool look_for_stuck_waits();
  void answer_all();

  CpuStream& stream_;
  const SignalWay way_;
  const int64_t timeout_ms_;

  std::mutex mutex_;
  std::condition_variable idle_;                  // running_ became null, or poisoned_ was set
  std::condition_variable monitor_wake_;          // stopping_, taken_over_ or watched_ was set
  std::vector<std::unique_ptr<DeviceJob>> jobs_;  // by id - 1
  std::vector<uint32_t> free_ids_;
  std::vector<DeviceWork> garbage_;  // closures to destroy on a thread of the caller's
  std::vector<DeviceWork> spare_;    // the memory that garbage_ gets next
  std::map<const void*, std::unique_ptr<DeviceTimes>> times_;
  std::vector<std::unique_ptr<DeviceTimes>> retired_times_;  // captured jobs still count in them
  uint64_t next_serial_ = 1;
  DeviceJob* running_ = nullptr;
  DeviceJob* watched_ = nullptr;    // running, and its arrival is looked for
  int64_t watched_arrival_ns_ = 0;  // 0: not seen
  std::string error_;
  bool stopping_ = false;
  bool taken_over_ = false;

  std::atomic<bool> poisoned_{false};
  std::atomic<bool> closing_{false};
  std::array<std::atomic<Slot*>, kMaxSlots> slots_{};  // written under mutex_
  std::atomic<int> num_slots_{0};
  ParkingWord finished_;  // host functions: some job finished, or closing, or poisoned

  struct Seen {
    uint32_t id = 0;
    uint64_t runs = 0;
    int64_t since_ns = 0;
  };
  std::array<Seen, kMaxSlots> seen_;  // the monitor's own: who waits since when
  std::thread thread_;
};

}  // namespace kt
