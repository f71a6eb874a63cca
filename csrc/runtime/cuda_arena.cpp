#include "runtime/cuda_arena.h"

#include <algorithm>
#include <new>

#include "base/check.h"

namespace kt {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kWordBytes = 4 * kLine;  // three words, one line each, and a spare one
constexpr size_t kIdBytes = 8;            // int32 ids use half of it

size_t round_up_line(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

struct SlotLayout {
  SlotLayout(const ArenaShape& shape, int capacity) {
    const size_t tokens = static_cast<size_t>(capacity);
    const size_t hidden = round_up_line(tokens * shape.hidden_size * dtype_bits(shape.dtype) / 8);
    ids = kWordBytes + hidden;
    weights = ids + round_up_line(tokens * shape.top_k * kIdBytes);
    output = weights + round_up_line(tokens * shape.top_k * sizeof(float));
    bytes = output + hidden;
  }
  size_t ids;
  size_t weights;
  size_t output;
  size_t bytes;
};

std::atomic<uint32_t>& word(const PinnedMemory& memory, int line) {
  static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);
  return *new (memory.data() + line * kLine) std::atomic<uint32_t>(0);
}

}  // namespace

PinnedMemory::PinnedMemory(const CudaDriver& driver, size_t bytes) : driver_(driver) {
  const RelaxedCapture relaxed(driver);
  void* memory = nullptr;
  const CuResult result = driver.mem_host_alloc(&memory, bytes, kCuHostPortable | kCuHostDeviceMap);
  KT_CHECK(result == kCuSuccess, "cannot pin "
                                     << bytes << " bytes of host memory for the tokens of a batch: "
                                     << cuda_failure(driver, "cuMemHostAlloc", result)
                                     << "; lower --chunked-prefill-size, or free host memory.");
  data_ = static_cast<std::byte*>(memory);
  const CuResult mapped = driver.mem_host_get_device_pointer(&device_address_, memory, 0);
  if (mapped != kCuSuccess) driver.mem_free_host(memory);
  check_cuda(driver, mapped, "cuMemHostGetDevicePointer");
}

PinnedMemory::~PinnedMemory() {
  const RelaxedCapture relaxed(driver_);
  driver_.mem_free_host(data_);
}

Slot::Slot(const CudaDriver& cuda, const ArenaShape& shape, int capacity)
    : driver(cuda),
      memory(cuda, SlotLayout(shape, capacity).bytes),
      req(word(memory, 0)),
      arrived(word(memory, 1)),
      done(word(memory, 2)),
      req_address(memory.device_address()),
      arrived_address(memory.device_address() + kLine),
      done_address(memory.device_address() + 2 * kLine) {
  const SlotLayout layout(shape, capacity);
  buffers.hidden_states = memory.data() + kWordBytes;
  buffers.topk_ids = memory.data() + layout.ids;
  buffers.topk_weights = reinterpret_cast<float*>(memory.data() + layout.weights);
  buffers.output = memory.data() + layout.output;
  const RelaxedCapture relaxed(driver);
  check_cuda(driver, driver.event_create(&last_use, kCuEventDisableTiming), "cuEventCreate");
}

Slot::~Slot() { driver.event_destroy(last_use); }

Arena::Arena(const CudaDriver& driver, const ArenaShape& shape, int capacity)
    : driver_(driver), shape_(shape), capacity_(capacity) {}

Slot* Arena::acquire(int position) {
  const size_t preferred = static_cast<size_t>(position & 1);
  const auto usable = [&](const Slot& slot) {
    return !slot.held && !slot.stranded && !(&slot == last_ && position == last_position_);
  };
  Slot* slot = nullptr;
  // in order: the layer's own parity, the other one, slots of a time when more jobs were out
  for (size_t i = 0; slot == nullptr; ++i) {
    const size_t index = i < 2 ? i ^ preferred : i;
    if (index >= slots_.size()) slots_.resize(index + 1);
    if (slots_[index] == nullptr) {
      slots_[index] = std::make_unique<Slot>(driver_, shape_, capacity_);
    } else if (!usable(*slots_[index])) {
      continue;
    }
    slot = slots_[index].get();
  }
  last_ = slot;
  last_position_ = position;
  return slot;
}

bool Arena::has_stranded() const {
  return std::any_of(slots_.begin(), slots_.end(), [](const std::unique_ptr<Slot>& slot) {
    return slot != nullptr && slot->stranded;
  });
}

}  // namespace kt
