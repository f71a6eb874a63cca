// What probe_doorbells() does: the signals of cuda_sync.h in the small.
#include <chrono>
#include <thread>

#include "runtime/cuda_sync.h"

namespace kt {
namespace {

constexpr uint32_t kRing = 7;
constexpr uint32_t kAnswer = 9;
constexpr std::chrono::seconds kPatience{5};

bool becomes(const std::atomic<uint32_t>& word, uint32_t value) {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (word.load(std::memory_order_acquire) != value) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

void enqueue(const CudaDriver& driver, const Slot& slot, CuStream stream) {
  check_cuda(driver, driver.stream_write_value32(stream, slot.req_address, kRing, kCuWriteDefault),
             "cuStreamWriteValue32");
  check_cuda(driver, driver.stream_wait_value32(stream, slot.done_address, kAnswer, kCuWaitEqual),
             "cuStreamWaitValue32");
  check_cuda(driver, driver.stream_write_value32(stream, slot.done_address, 0, kCuWriteDefault),
             "cuStreamWriteValue32");
}

// The CPU's part; false: the device's did not come.
bool answer(Slot& slot) {
  if (!becomes(slot.req, kRing)) return false;
  slot.req.store(0, std::memory_order_relaxed);
  slot.done.store(kAnswer, std::memory_order_release);
  return becomes(slot.done, 0);
}

}  // namespace

std::string probe_doorbells(int device) {
  const CudaDriver& driver = cuda_driver();
  if (!driver.available()) return driver.reason;
  if (!driver.has_memory_operations) return "the driver has no cuStreamWaitValue32.";
  try {
    // all of it is left alone: the process ends, and what hangs could not be freed
    static const PrimaryContext* const context = new PrimaryContext(driver, device);
    const CurrentContext current(driver, context->get());
    Slot& slot = *new Slot(driver, ArenaShape{64, 1, DType::kBFloat16}, 1);
    CuStream stream = nullptr;
    check_cuda(driver, driver.stream_create(&stream, 1), "cuStreamCreate");
    enqueue(driver, slot, stream);
    if (!answer(slot)) return "a wait for a word did not end.";
    check_cuda(driver, driver.stream_begin_capture(stream, kCuCaptureGlobal),
               "cuStreamBeginCapture");
    enqueue(driver, slot, stream);
    CuGraph graph = nullptr;
    check_cuda(driver, driver.stream_end_capture(stream, &graph), "cuStreamEndCapture");
    CuGraphExec executable = nullptr;
    check_cuda(driver, driver.graph_instantiate_with_flags(&executable, graph, 0),
               "cuGraphInstantiateWithFlags");
    for (int launch = 0; launch < 2; ++launch) {
      check_cuda(driver, driver.graph_launch(executable, stream), "cuGraphLaunch");
      if (!answer(slot)) return "a wait for a word did not end in a graph.";
    }
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace kt
