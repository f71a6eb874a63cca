#include "runtime/cuda_sync.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <string>
#include <thread>
#include <utility>

#include "base/check.h"

namespace kt {
namespace {

using std::chrono::milliseconds;

constexpr char kSignalVariable[] = "KT_CUDA_SIGNAL";
constexpr char kFoundVariable[] = "KT_CUDA_SIGNAL_FOUND";
constexpr char kSpinVariable[] = "KT_CUDA_SPIN_MS";
constexpr char kTimeoutVariable[] = "KT_SYNC_TIMEOUT";

// Arenas hold whole multiples: a batch a little larger than the last does not pin memory anew.
constexpr int kCapacityStep = 64;
constexpr milliseconds kDrainPatience{2'000};

std::atomic<int> expected_batch{0};

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Seconds or milliseconds of at most a year, in thousandths.
int64_t thousandths(const char* name, int64_t unset) {
  const std::string text = variable(name);
  if (text.empty()) return unset;
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  KT_CHECK(end != nullptr && *end == '\0' && value >= 0 && value <= 31'536'000.0,
           name << "='" << text << "' is no duration; give a number of at least 0.");
  return static_cast<int64_t>(value * 1000);
}

// Whether KT_CUDA_SIGNAL_FOUND says "doorbell" of a device.
bool found_to_ring(int device) {
  const std::string wanted = std::to_string(device) + "=doorbell";
  std::istringstream entries(variable(kFoundVariable));
  for (std::string entry; std::getline(entries, entry, ',');) {
    if (entry == wanted) return true;
  }
  return false;
}

CuAddress address(const void* device_pointer) {
  return static_cast<CuAddress>(reinterpret_cast<uintptr_t>(device_pointer));
}

// What outlives its DeviceSync because a device may refer to it. Never destroyed.
struct Leftovers {
  std::mutex mutex;
  std::vector<std::unique_ptr<DeviceJobs>> jobs;
  std::vector<std::unique_ptr<Arena>> arenas;
  std::vector<std::unique_ptr<PrimaryContext>> contexts;
};

Leftovers& leftovers() {
  static Leftovers* const kept = new Leftovers;
  return *kept;
}

size_t hidden_bytes(const DeviceInput& input) {
  return static_cast<size_t>(input.num_tokens) * input.hidden_size * dtype_bits(input.dtype) / 8;
}

}  // namespace

DeviceSyncOptions DeviceSyncOptions::from_environment(int device) {
  DeviceSyncOptions options;
  const std::string way = variable(kSignalVariable);
  KT_CHECK(way.empty() || way == "doorbell" || way == "hostfunc",
           kSignalVariable << "='" << way << "' is no way to signal; use doorbell or hostfunc.");
  if (way == "doorbell" || (way.empty() && found_to_ring(device))) {
    options.way = SignalWay::kDoorbell;
  }
  options.spin_us = thousandths(kSpinVariable, options.spin_us);
  options.timeout_ms = thousandths(kTimeoutVariable, options.timeout_ms);
  return options;
}

DeviceSync::DeviceSync(CpuStream& stream, int device, const DeviceSyncOptions& options)
    : stream_(stream),
      driver_(options.driver != nullptr ? *options.driver : cuda_driver()),
      context_(std::make_unique<PrimaryContext>(driver_, device)),
      options_(options),
      last_layer_(std::numeric_limits<int>::max()) {
  KT_CHECK(options.way == SignalWay::kHostFunction || driver_.has_memory_operations,
           kSignalVariable << "=doorbell needs cuStreamWaitValue32, which this driver does not "
                              "have; use hostfunc.");
  const CurrentContext current(driver_, context_->get());
  const RelaxedCapture relaxed(driver_);
  check_cuda(driver_, driver_.event_create(&order_event_, kCuEventDisableTiming), "cuEventCreate");
  jobs_ = std::make_unique<DeviceJobs>(stream, options.way, options.timeout_ms);
  if (options.way == SignalWay::kDoorbell) stream_.attach(*jobs_, options_.spin_us);
}

DeviceSync::~DeviceSync() {
  if (home_.inherited()) {
    jobs_.release();
    context_.release();
    for (std::unique_ptr<Arena>& arena : arenas_) arena.release();
    return;
  }
  jobs_->close();
  const auto deadline = std::chrono::steady_clock::now() + kDrainPatience;
  bool free = false;
  try {
    const CurrentContext current(driver_, context_->get());
    const bool kept = std::any_of(arenas_.begin(), arenas_.end(), [](const auto& arena) {
      return arena->num_captured != 0 || arena->has_stranded();
    });
    while (!kept && !(free = drained()) && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    leave_cpu_stream();
    if (free) {
      jobs_.reset();  // its monitor reads the slots
      arenas_.clear();
      driver_.event_destroy(order_event_);
      return;
    }
  } catch (const Error&) {
    // the context is broken: nothing in it can be freed, and no stream of it comes on
    leave_cpu_stream();
  }
  // A graph or a stream may still write these words and call these functions.
  jobs_->take_over();
  const std::lock_guard<std::mutex> lock(leftovers().mutex);
  leftovers().jobs.push_back(std::move(jobs_));
  leftovers().contexts.push_back(std::move(context_));
  for (std::unique_ptr<Arena>& arena : arenas_) leftovers().arenas.push_back(std::move(arena));
}

// After close(): behind the last job that touches what goes now.
void DeviceSync::leave_cpu_stream() {
  if (way() == SignalWay::kDoorbell) {
    stream_.detach(*jobs_);
  } else {
    stream_.wait(stream_.submit([] {}));
  }
}

// With the context current. Whether no stream refers to anything here; throws if the context is
// broken.
bool DeviceSync::drained() {
  const RelaxedCapture relaxed(driver_);
  if (jobs_->num_outstanding() != 0) return false;
  for (const std::unique_ptr<Arena>& arena : arenas_) {
    for (const std::unique_ptr<Slot>& slot : arena->slots()) {
      if (slot == nullptr || !slot->has_last_use) continue;
      const CuResult result = driver_.event_query(slot->last_use);
      if (result == kCuNotReady) return false;
      check_cuda(driver_, result, "cuEventQuery");
    }
  }
  return true;
}

// The one that is behind the other joins the capture only with the event that orders it.
bool DeviceSync::is_capturing(CuStream stream, CuStream current) {
  int status = kCuCaptureNone;
  check_cuda(driver_, driver_.stream_is_capturing(current, &status), "cuStreamIsCapturing");
  if (status == kCuCaptureNone && stream != current) {
    check_cuda(driver_, driver_.stream_is_capturing(stream, &status), "cuStreamIsCapturing");
  }
  return status != kCuCaptureNone;
}

// Both are of one call: equal handles mean one stream.
void DeviceSync::order(CuStream before, CuStream after) {
  if (before == after) return;
  check_cuda(driver_, driver_.event_record(order_event_, before), "cuEventRecord");
  check_cuda(driver_, driver_.stream_wait_event(after, order_event_, 0), "cuStreamWaitEvent");
}

Arena& DeviceSync::arena_for(const ArenaShape& shape, int num_tokens, bool captured) {
  const auto found = std::find_if(arenas_.rbegin(), arenas_.rend(),
                                  [&](const auto& arena) { return arena->shape() == shape; });
  if (found != arenas_.rend() && (*found)->capacity() >= num_tokens) return **found;
  const int wanted = std::max(num_tokens, expected_batch.load());
  const int capacity = (wanted + kCapacityStep - 1) / kCapacityStep * kCapacityStep;
  if (!captured) free_unused(&shape);
  arenas_.push_back(std::make_unique<Arena>(driver_, shape, capacity));
  return *arenas_.back();
}

DeviceTicket DeviceSync::submit(const DeviceInput& input, DeviceWork work, CuStream stream,
                                CuStream current) {
  check();
  const std::lock_guard<std::mutex> lock(mutex_);
  const CurrentContext context(driver_, context_->get());
  const bool captured = is_capturing(stream, current);
  std::erase_if(abandoned_, [&](Slot* slot) {
    slot->held = jobs_->refers_to(*slot);
    return !slot->held;
  });
  const ArenaShape shape{input.hidden_size, input.top_k, input.dtype};
  Arena& arena = arena_for(shape, input.num_tokens, captured);
  Slot* const slot = arena.acquire(work.chain_position);
  if (!slot->polled) jobs_->add_slot(*slot);
  slot->polled = true;
  DeviceJob& job = jobs_->add(*slot, std::move(work), captured);
  job.output_bytes = hidden_bytes(input);
  slot->held = true;
  Submitted reached = Submitted::kNothing;
  try {
    enqueue_submit(input, job, stream, current, reached);
    order(stream, current);
  } catch (const Error&) {
    const bool rung = reached == Submitted::kRung;
    // copies, or a call of wake(), that no job of this table tells the end of: the slot is nobody's
    // from now on, and what has a stranded slot is never freed
    slot->stranded = reached == Submitted::kPart || (rung && captured);
    if (captured && reached != Submitted::kNothing) ++arena.num_captured;
    if (rung) {
      abandoned_.push_back(slot);
    } else {
      slot->held = false;
    }
    jobs_->abandon(job, rung);
    throw;
  }
  if (captured) ++arena.num_captured;
  last_layer_ = job.work.layer_idx;
  return {job.id, job.serial};
}

// `reached` is told also where it throws.
void DeviceSync::enqueue_submit(const DeviceInput& input, DeviceJob& job, CuStream stream,
                                CuStream current, Submitted& reached) {
  Slot& slot = *job.slot;
  order(current, stream);
  if (way() == SignalWay::kDoorbell && job.work.layer_idx <= last_layer_) {
    // the first layer of a pass: the CPU stream's thread may be asleep
    check_cuda(driver_, driver_.launch_host_func(stream, &DeviceJobs::wake, jobs_.get()),
               "cuLaunchHostFunc");
    reached = Submitted::kPart;
  }
  // also where the stream seems to be the same: one handle may mean several streams, in turn (it
  // was destroyed) or at once (the per-thread default stream)
  if (!job.captured && slot.has_last_use) {
    check_cuda(driver_, driver_.stream_wait_event(stream, slot.last_use, 0), "cuStreamWaitEvent");
  }
  const size_t routes = static_cast<size_t>(input.num_tokens) * input.top_k;
  const auto copy = [&](void* to, const void* from, size_t bytes) {
    check_cuda(driver_, driver_.memcpy_dtoh_async(to, address(from), bytes, stream),
               "cuMemcpyDtoHAsync");
    reached = Submitted::kPart;
  };
  copy(slot.buffers.hidden_states, input.hidden_states, hidden_bytes(input));
  copy(slot.buffers.topk_ids, input.topk_ids, routes * dtype_bits(input.id_dtype) / 8);
  copy(slot.buffers.topk_weights, input.topk_weights, routes * sizeof(float));
  if (way() == SignalWay::kDoorbell) {
    check_cuda(driver_,
               driver_.stream_write_value32(stream, slot.req_address, job.id, kCuWriteDefault),
               "cuStreamWriteValue32");
  } else {
    check_cuda(driver_, driver_.launch_host_func(stream, &DeviceJobs::push, &job),
               "cuLaunchHostFunc");
  }
  reached = Submitted::kRung;
}

void DeviceSync::sync(const DeviceTicket& ticket, void* result, CuStream stream, CuStream current) {
  home_.check();
  const std::lock_guard<std::mutex> lock(mutex_);
  const CurrentContext context(driver_, context_->get());
  DeviceJob& job = jobs_->find(ticket.id, ticket.serial);
  Slot& slot = *job.slot;
  bool begun = false;
  try {
    jobs_->check();
    const bool captured = is_capturing(stream, current);
    KT_CHECK(captured == job.captured,
             "the forward of layer "
                 << job.work.layer_idx << " was submitted "
                 << (job.captured ? "during" : "outside of") << " a graph capture and synced "
                 << (captured ? "in one" : "without one") << "; capture both, or neither.");
    begun = true;
    enqueue_sync(job, result, stream, current);
  } catch (const Error&) {
    if (begun) {
      // the device may wait already: the job answers it, and nobody gets the slot
      slot.stranded = true;
      jobs_->set_synced(job);
    } else {
      give_up(job);
    }
    throw;
  }
  slot.held = false;
  slot.has_last_use |= !job.captured;
  jobs_->set_synced(job);
}

void DeviceSync::enqueue_sync(DeviceJob& job, void* result, CuStream stream, CuStream current) {
  Slot& slot = *job.slot;
  const auto write = [&](CuAddress word, uint32_t value) {
    check_cuda(driver_, driver_.stream_write_value32(stream, word, value, kCuWriteDefault),
               "cuStreamWriteValue32");
  };
  order(current, stream);
  if (way() == SignalWay::kDoorbell) {
    write(slot.arrived_address, job.id);
    check_cuda(driver_,
               driver_.stream_wait_value32(stream, slot.done_address, job.id, kCuWaitEqual),
               "cuStreamWaitValue32");
    write(slot.done_address, 0);
    write(slot.arrived_address, 0);
  } else {
    check_cuda(driver_, driver_.launch_host_func(stream, &DeviceJobs::wait, &job),
               "cuLaunchHostFunc");
  }
  check_cuda(
      driver_,
      driver_.memcpy_htod_async(address(result), slot.buffers.output, job.output_bytes, stream),
      "cuMemcpyHtoDAsync");
  if (!job.captured) {
    check_cuda(driver_, driver_.event_record(slot.last_use, stream), "cuEventRecord");
  }
  order(stream, current);
}

void DeviceSync::check() {
  home_.check();
  jobs_->check();
}

void DeviceSync::abandon(const DeviceTicket& ticket) {
  home_.check();
  const std::lock_guard<std::mutex> lock(mutex_);
  give_up(jobs_->find(ticket.id, ticket.serial));
}

// Under the mutex. Of a job that is rung for.
void DeviceSync::give_up(DeviceJob& job) {
  job.slot->stranded = job.captured;
  abandoned_.push_back(job.slot);
  jobs_->abandon(job, true);
}

void DeviceSync::retire(const void* owner) {
  home_.check();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Slot* const slot : jobs_->retire(owner)) abandoned_.push_back(slot);
}

void DeviceSync::clear() {
  home_.check();
  const std::lock_guard<std::mutex> lock(mutex_);
  const CurrentContext context(driver_, context_->get());
  free_unused(nullptr);
}

// Under the mutex, with the context current. `shape`: of this one only.
void DeviceSync::free_unused(const ArenaShape* shape) {
  const RelaxedCapture relaxed(driver_);
  const auto unused = [&](const Slot& slot) {
    if (slot.held || slot.stranded || jobs_->refers_to(slot)) return false;
    return !slot.has_last_use || driver_.event_query(slot.last_use) == kCuSuccess;
  };
  std::vector<std::unique_ptr<Arena>> gone;
  for (std::unique_ptr<Arena>& arena : arenas_) {
    const bool asked = shape == nullptr || arena->shape() == *shape;
    const bool keep = !asked || arena->num_captured != 0 ||
                      std::any_of(arena->slots().begin(), arena->slots().end(),
                                  [&](const std::unique_ptr<Slot>& slot) {
                                    return slot != nullptr && !unused(*slot);
                                  });
    if (!keep) gone.push_back(std::move(arena));
  }
  std::erase(arenas_, nullptr);
  if (gone.empty()) return;
  // the CPU stream looks at slots until it is told, in its own order
  stream_.wait(stream_.submit([&] {
    for (const std::unique_ptr<Arena>& arena : gone) {
      for (const std::unique_ptr<Slot>& slot : arena->slots()) {
        if (slot != nullptr) jobs_->remove_slot(*slot);
      }
    }
  }));
}

size_t DeviceSync::num_arenas() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return arenas_.size();
}

void expect_batch(int num_tokens) {
  int known = expected_batch.load();
  while (num_tokens > known && !expected_batch.compare_exchange_weak(known, num_tokens)) {
  }
}

const std::string& device_driver_reason() { return cuda_driver().reason; }

bool device_driver_is_double() { return cuda_driver().is_double; }

}  // namespace kt
