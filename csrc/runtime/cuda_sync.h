// A device's stream asks the CPU for experts and waits for them, in the order of the stream: copies
// out, a signal, a wait, a copy back. All of it can be captured into graphs. Knows no MoE, no
// Torch.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/fork_guard.h"
#include "runtime/cuda_arena.h"
#include "runtime/cuda_driver.h"
#include "runtime/cuda_job.h"

namespace kt {

// Memory map. A slot is one piece of pinned host memory (cuMemHostAlloc, PORTABLE | DEVICEMAP),
// made once for the largest batch; it serves one outstanding job.
//
//   line  word     written by                      read, waited for by
//   0     req      device: job id; CPU: 0          CPU stream's thread, polling
//   1     arrived  device: job id, then 0          monitor: time of a wait, overlap
//   2     done     CPU: job id; device: 0          device: waits until it equals the job id
//   4..   hidden_states, topk_ids, topk_weights    device copies in, CPU reads
//         output                                   CPU writes, device copies out
//
// What is in the stream (doorbells):
//
//   submit   copy hidden_states, ids, weights -> slot
//            write req = id
//   sync     write arrived = id
//            wait done == id
//            write done = 0, arrived = 0
//            copy output -> result
//
// With host functions the write of req is a function that queues the job, and the four words of
// sync are a function that blocks until the job is done. The device rings at most once for a job
// before it waits for it, so a job runs once for each pass of the stream over its submit.
//
// Constants only. A graph replays the same values for ever: an id names a job for its life, and
// both words are back at 0 when a pass is through. Nothing of a pass (slot, number of rows, layer)
// is read from a variable that a launch would have to set.
//
// Why it is ordered
//   payload before req    a write of a word fences all earlier writes of its stream (no
//                         NO_MEMORY_BARRIER flag); the CPU reads req with acquire, then the payload
//   req = 0 before done   the CPU takes req back before it runs the job, the device rings for the
//                         slot again only behind a wait that has seen this job's done
//   output before done    done is stored with release; the device copies behind the wait. Nothing
//                         is flushed to the device's own memory, hence no FLUSH flag
//   done = 0 before reuse the write is in the stream before any later use of the slot
//   job before job        the CPU takes of several rung jobs the one submitted first
//   deferred part         reads its slot after done: the next layer has another slot, the one after
//                         that is submitted behind the next layer's wait, thus its run
//   no deadlock           all that a job needs is in the stream before its wait, so also where all
//                         streams share one hardware channel; a job never waits for the device
//
// The CPU side answers every ring, also with an error, when closing and when poisoned; the monitor
// lets a wait go that lasts longer than KT_SYNC_TIMEOUT. Nothing waits for a host function: a
// broken context does not call them.
struct DeviceSyncOptions {
  SignalWay way = SignalWay::kHostFunction;
  int64_t spin_us = 20'000;            // how long the CPU stream's thread polls after the last job
  int64_t timeout_ms = 300'000;        // how long the device may wait for one job; 0: for ever
  const CudaDriver* driver = nullptr;  // null: cuda_driver()

  // For one device: KT_CUDA_SIGNAL, else what KT_CUDA_SIGNAL_FOUND says of it ("0=doorbell" or
  // several with commas), else host functions; KT_CUDA_SPIN_MS; KT_SYNC_TIMEOUT in seconds.
  // Errors  kt::Error for a value that is none.
  static DeviceSyncOptions from_environment(int device);
};

// What a job reads, in the device's memory, contiguous.
struct DeviceInput {
  const void* hidden_states = nullptr;  // [num_tokens, hidden_size]
  DType dtype = DType::kBFloat16;
  const void* topk_ids = nullptr;  // [num_tokens, top_k]
  DType id_dtype = DType::kInt64;
  const float* topk_weights = nullptr;  // [num_tokens, top_k]
  int num_tokens = 0;                   // at least 1
  int top_k = 0;
  int hidden_size = 0;
};

// An outstanding job.
struct DeviceTicket {
  uint32_t id = 0;
  uint64_t serial = 0;
};

// Jobs of one CPU stream for one device.
//
// Streams   `stream` carries copies, signal and wait; `current` is the one that made the inputs and
//           uses the result. Where they differ, events order them: current before stream before
//           current, so that inputs may change and the result may be used as soon as a call is
//           back. sync()'s stream is submit()'s or one ordered behind it.
// Requires  passes of a slot do not overlap: graphs and eager forwards that share layers or sizes
//           are ordered among one another by the caller, as SGLang does. Eager forwards on several
//           streams are ordered here.
// Capture   every call may be captured. Memory is pinned for the largest batch seen or hinted;
//           growth makes a new arena, in relaxed capture mode, and keeps one that a graph or a
//           job refers to.
// Errors    kt::Error. An error of a job is thrown by the next submit(), sync() or check(), once;
//           after a stuck wait or a broken word every call throws.
// Threads   any, one at a time inside; no lock that the CPU side takes is held while CUDA is
//           called.
// Lifetime  the destructor answers everything and waits up to 2 s for streams to drain; what a
//           graph or a stream may still refer to is left alone for ever, with a thread that
//           answers. `stream` outlives it. In a fork() every call but way(), times() and
//           num_arenas() throws and the destructor does nothing (base/fork_guard.h): CUDA cannot be
//           used there either.
class DeviceSync {
 public:
  DeviceSync(CpuStream& stream, int device, const DeviceSyncOptions& options);
  ~DeviceSync();
  DeviceSync(const DeviceSync&) = delete;
  DeviceSync& operator=(const DeviceSync&) = delete;

  // Enqueues the snapshot of the inputs and the signal.
  DeviceTicket submit(const DeviceInput& input, DeviceWork work, CuStream stream, CuStream current);
  // Enqueues the wait, and the copy of the result to device memory of the size of hidden_states.
  void sync(const DeviceTicket& ticket, void* result, CuStream stream, CuStream current);
  // Gives up a job that will not be synced: its result is not wanted, its slot is free when it is
  // over. Errors  as sync() for a ticket that is not outstanding.
  void abandon(const DeviceTicket& ticket);
  // Throws what went wrong in jobs since the last call that did.
  void check();
  // The layer is going away: see DeviceJobs::retire().
  void retire(const void* owner);
  // Frees arenas that neither a graph nor a job refers to. Waits for the CPU stream.
  void clear();

  SignalWay way() const { return jobs_->way(); }
  const DeviceTimes& times(const void* owner) { return jobs_->times(owner); }
  size_t num_arenas() const;

 private:
  // How much of a submit is in the stream. kPart: something that refers to the slot or to the
  // jobs, but not the signal.
  enum class Submitted { kNothing, kPart, kRung };

  Arena& arena_for(const ArenaShape& shape, int num_tokens, bool captured);
  void free_unused(const ArenaShape* shape);
  void give_up(DeviceJob& job);
  void order(CuStream before, CuStream after);
  void enqueue_submit(const DeviceInput& input, DeviceJob& job, CuStream stream, CuStream current,
                      Submitted& reached);
  void enqueue_sync(DeviceJob& job, void* result, CuStream stream, CuStream current);
  bool is_capturing(CuStream stream, CuStream current);
  bool drained();
  void leave_cpu_stream();

  CpuStream& stream_;
  const CudaDriver& driver_;
  std::unique_ptr<PrimaryContext> context_;
  DeviceSyncOptions options_;
  std::unique_ptr<DeviceJobs> jobs_;

  mutable std::mutex mutex_;                    // of those who enqueue; the CPU side never takes it
  std::vector<std::unique_ptr<Arena>> arenas_;  // the last one of a shape is in use
  std::vector<Slot*> abandoned_;                // held until their job is over
  CuEvent order_event_ = nullptr;
  int last_layer_ = 0;
  ForkGuard home_;
};

// The largest batch to expect, in tokens: arenas are made for at least that many. A hint.
void expect_batch(int num_tokens);

// Why there is no device to be used; empty: there is one.
const std::string& device_driver_reason();
// Whether the driver is the tests' double, whose device memory is host memory.
bool device_driver_is_double();

// Tries wait and write value: eager, then captured and launched twice. Empty: they work; otherwise
// what went wrong. Where they hang, so does this: call it in a process of its own, with a limit.
std::string probe_doorbells(int device);

}  // namespace kt
