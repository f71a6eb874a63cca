// Entry points other than those that capture knows: start-up, contexts, memory, streams, events.
#include <algorithm>
#include <cstring>
#include <utility>

#include "fake_cuda/state.h"

namespace fake_cuda {

namespace {

thread_local std::vector<CUcontext> contexts;
char context_object;

// CU_STREAM_LEGACY and CU_STREAM_PER_THREAD; handle 0 means the legacy stream, too.
constexpr uintptr_t kLegacyHandle = 1;
constexpr uintptr_t kPerThreadHandle = 2;

std::unique_ptr<CUstream_st> make_stream() {
  auto made = std::make_unique<CUstream_st>();
  made->id = state().next_stream++;
  made->lane = Device::get().acquire_lane();
  return made;
}

}  // namespace

State& state() {
  static State* const made = new State;
  return *made;
}

CUcontext primary_context() { return reinterpret_cast<CUcontext>(&context_object); }

CUcontext current_context() { return contexts.empty() ? nullptr : contexts.back(); }

CUstream State::find_stream(CUstream handle) {
  const auto number = reinterpret_cast<uintptr_t>(handle);
  if (number > kPerThreadHandle) {
    const auto found = streams.find(handle);
    return found == streams.end() ? nullptr : found->second.get();
  }
  std::unique_ptr<CUstream_st>& stream =
      number <= kLegacyHandle ? legacy_stream : thread_streams[std::this_thread::get_id()];
  if (!stream) stream = make_stream();
  return stream.get();
}

CUresult use_stream(CUstream handle, CUstream* stream, bool only_looks) {
  *stream = state().find_stream(handle);
  if (!*stream) return CUDA_ERROR_INVALID_HANDLE;
  if (*stream != state().legacy_stream.get()) return CUDA_SUCCESS;
  CUresult result = CUDA_SUCCESS;
  for (const CapturePtr& capture : state().captures) {
    if (!capture->blocking) continue;
    result = CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    if (!only_looks) capture->invalid = true;
  }
  return result;
}

CUresult enter(const char* function, Need need) {
  if (inside_host_function()) {
    Device::get().violate(std::string(function) + " called inside a host function");
    return CUDA_ERROR_NOT_PERMITTED;
  }
  std::lock_guard lock(state().mutex);
  const uint64_t number = ++state().calls[function];
  if (const auto planned = state().planned.find(function); planned != state().planned.end()) {
    const auto now = planned->second.find(number);
    if (now != planned->second.end()) {
      const CUresult error = now->second;
      planned->second.erase(now);
      return error;
    }
  }
  if (need == kNothing) return CUDA_SUCCESS;
  if (!state().initialized) return CUDA_ERROR_NOT_INITIALIZED;
  if (need == kInitialized) return CUDA_SUCCESS;
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  return Device::get().failure();
}

}  // namespace fake_cuda

using fake_cuda::Device;
using fake_cuda::enter;
using fake_cuda::Kind;
using fake_cuda::kInitialized;
using fake_cuda::kNothing;
using fake_cuda::Operation;
using fake_cuda::state;

const int kt_fake_cuda = 1;

CUresult cuInit(unsigned) {
  if (CUresult error = enter("cuInit", kNothing)) return error;
  std::lock_guard lock(state().mutex);
  if (state().device_count == 0) return CUDA_ERROR_NO_DEVICE;
  state().initialized = true;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  if (CUresult error = enter("cuDriverGetVersion", kNothing)) return error;
  *version = state().driver_version;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
  static const std::pair<CUresult, const char*> kNames[] = {
      {CUDA_SUCCESS, "CUDA_SUCCESS"},
      {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
      {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
      {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
      {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
      {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
      {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
      {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
      {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
      {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY"},
      {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {CUDA_ERROR_LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT"},
      {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
      {CUDA_ERROR_NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED"},
      {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
      {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
      {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
      {CUDA_ERROR_STREAM_CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE"},
      {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"},
      {CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"},
      {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
      {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"},
      {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT"},
      {CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"},
      {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN"},
  };
  for (const auto& [number, name] : kNames) {
    if (number == error) {
      *text = name;
      return CUDA_SUCCESS;
    }
  }
  *text = nullptr;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) { return cuGetErrorName(error, text); }

CUresult cuDeviceGetCount(int* count) {
  if (CUresult error = enter("cuDeviceGetCount", kInitialized)) return error;
  *count = state().device_count;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (CUresult error = enter("cuDeviceGet", kInitialized)) return error;
  if (ordinal < 0 || ordinal >= state().device_count) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  if (CUresult error = enter("cuDeviceGetName", kInitialized)) return error;
  std::strncpy(name, "fake_cuda test double", length);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  if (CUresult error = enter("cuDeviceGetAttribute", kInitialized)) return error;
  if (device < 0 || device >= state().device_count) return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: *value = 1; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR:
      *value = Device::get().stream_memory_operations != 0;
      return CUDA_SUCCESS;
    default: *value = 0; return CUDA_SUCCESS;
  }
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (CUresult error = enter("cuDevicePrimaryCtxRetain", kInitialized)) return error;
  if (device < 0 || device >= state().device_count) return CUDA_ERROR_INVALID_DEVICE;
  *context = fake_cuda::primary_context();
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
  return enter("cuDevicePrimaryCtxRelease_v2", kInitialized);
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
  if (CUresult error = enter("cuCtxPushCurrent_v2", kInitialized)) return error;
  if (context != fake_cuda::primary_context()) return CUDA_ERROR_INVALID_CONTEXT;
  fake_cuda::contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (CUresult error = enter("cuCtxPopCurrent_v2", kInitialized)) return error;
  if (fake_cuda::contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = fake_cuda::contexts.back();
  fake_cuda::contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  if (CUresult error = enter("cuCtxGetCurrent", kInitialized)) return error;
  *context = fake_cuda::current_context();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  if (CUresult error = enter("cuCtxSetCurrent", kInitialized)) return error;
  if (context && context != fake_cuda::primary_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (!fake_cuda::contexts.empty()) fake_cuda::contexts.pop_back();
  if (context) fake_cuda::contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  if (CUresult error = enter("cuCtxGetDevice")) return error;
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
  if (CUresult error = enter("cuMemHostAlloc")) return error;
  std::lock_guard lock(state().mutex);
  if (CUresult error = fake_cuda::refuse_during_capture("cuMemHostAlloc")) return error;
  if (!memory || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  *memory = Device::get().allocate(bytes, flags, true);
  return *memory ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFreeHost(void* memory) {
  if (CUresult error = enter("cuMemFreeHost")) return error;
  std::lock_guard lock(state().mutex);
  if (CUresult error = fake_cuda::refuse_during_capture("cuMemFreeHost")) return error;
  return Device::get().free(memory, true) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* memory, unsigned flags) {
  if (CUresult error = enter("cuMemHostGetDevicePointer_v2")) return error;
  unsigned made_with = 0;
  if (flags || !Device::get().find_region(memory, 1, true, &made_with) ||
      !(made_with & CU_MEMHOSTALLOC_DEVICEMAP)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *address = reinterpret_cast<CUdeviceptr>(memory);
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  if (CUresult error = enter("cuMemAlloc_v2")) return error;
  std::lock_guard lock(state().mutex);
  if (CUresult error = fake_cuda::refuse_during_capture("cuMemAlloc_v2")) return error;
  if (!address || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  *address = reinterpret_cast<CUdeviceptr>(Device::get().allocate(bytes, 0, false));
  return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  if (CUresult error = enter("cuMemFree_v2")) return error;
  std::lock_guard lock(state().mutex);
  if (CUresult error = fake_cuda::refuse_during_capture("cuMemFree_v2")) return error;
  const bool freed = Device::get().free(reinterpret_cast<void*>(address), false);
  return freed ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

namespace {

CUresult copy(const char* name, CUstream handle, void* destination, const void* source,
              size_t bytes, bool to_host, bool from_host) {
  if (CUresult error = enter(name)) return error;
  if (bytes == 0) return CUDA_SUCCESS;
  if (!destination || !source) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(state().mutex);
  CUstream stream = nullptr;
  if (CUresult error = fake_cuda::use_stream(handle, &stream)) return error;
  Operation operation;
  operation.kind = Kind::kCopy;
  operation.name = name;
  operation.destination = destination;
  operation.source = source;
  operation.bytes = bytes;
  operation.to_host = to_host;
  operation.from_host = from_host;
  return fake_cuda::enqueue(stream, operation);
}

}  // namespace

CUresult cuMemcpyDtoHAsync_v2(void* destination, CUdeviceptr source, size_t bytes,
                              CUstream stream) {
  return copy("cuMemcpyDtoHAsync_v2", stream, destination, reinterpret_cast<void*>(source), bytes,
              true, false);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr destination, const void* source, size_t bytes,
                              CUstream stream) {
  return copy("cuMemcpyHtoDAsync_v2", stream, reinterpret_cast<void*>(destination), source, bytes,
              false, true);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr destination, CUdeviceptr source, size_t bytes,
                              CUstream stream) {
  return copy("cuMemcpyDtoDAsync_v2", stream, reinterpret_cast<void*>(destination),
              reinterpret_cast<void*>(source), bytes, false, false);
}

CUresult cuMemcpyAsync(CUdeviceptr destination, CUdeviceptr source, size_t bytes, CUstream stream) {
  Device& device = Device::get();
  return copy("cuMemcpyAsync", stream, reinterpret_cast<void*>(destination),
              reinterpret_cast<void*>(source), bytes,
              device.find_region(reinterpret_cast<void*>(destination), bytes, true),
              device.find_region(reinterpret_cast<void*>(source), bytes, true));
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  if (CUresult error = enter("cuStreamCreate")) return error;
  std::lock_guard lock(state().mutex);
  auto made = fake_cuda::make_stream();
  made->blocking = (flags & CU_STREAM_NON_BLOCKING) == 0;
  *stream = made.get();
  state().streams[*stream] = std::move(made);
  return CUDA_SUCCESS;
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int) {
  return cuStreamCreate(stream, flags);
}

CUresult cuStreamDestroy_v2(CUstream stream) {
  if (CUresult error = enter("cuStreamDestroy_v2")) return error;
  std::lock_guard lock(state().mutex);
  const auto found = state().streams.find(stream);
  if (found == state().streams.end()) return CUDA_ERROR_INVALID_HANDLE;
  if (found->second->capture) {
    found->second->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  Device::get().release_lane(found->second->lane);
  state().streams.erase(found);
  return CUDA_SUCCESS;
}

namespace {

// The last task of a stream that is not capturing.
CUresult last_task(CUstream handle, fake_cuda::TaskPtr* last) {
  std::lock_guard lock(state().mutex);
  CUstream stream = nullptr;
  if (CUresult error = fake_cuda::use_stream(handle, &stream)) return error;
  if (stream->capture) {
    stream->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  *last = stream->last;
  return CUDA_SUCCESS;
}

CUresult recorded_task(CUevent handle, const char* name, fake_cuda::TaskPtr* recorded) {
  std::lock_guard lock(state().mutex);
  const auto found = state().events.find(handle);
  if (found == state().events.end()) return CUDA_ERROR_INVALID_HANDLE;
  if (found->second->capture) return CUDA_ERROR_CAPTURED_EVENT;
  if (CUresult error = fake_cuda::refuse_during_capture(name)) return error;
  *recorded = found->second->recorded;
  return CUDA_SUCCESS;
}

CUresult query(const fake_cuda::TaskPtr& task) {
  if (task && !task->done.load(std::memory_order_acquire)) return CUDA_ERROR_NOT_READY;
  return Device::get().wait(task);
}

}  // namespace

CUresult cuStreamSynchronize(CUstream stream) {
  if (CUresult error = enter("cuStreamSynchronize")) return error;
  fake_cuda::TaskPtr last;
  if (CUresult error = last_task(stream, &last)) return error;
  return Device::get().wait(last);
}

CUresult cuStreamQuery(CUstream stream) {
  if (CUresult error = enter("cuStreamQuery")) return error;
  fake_cuda::TaskPtr last;
  if (CUresult error = last_task(stream, &last)) return error;
  return query(last);
}

CUresult cuCtxSynchronize() {
  if (CUresult error = enter("cuCtxSynchronize")) return error;
  std::vector<fake_cuda::TaskPtr> tasks;
  {
    std::lock_guard lock(state().mutex);
    if (CUresult error = fake_cuda::refuse_during_capture("cuCtxSynchronize")) return error;
    for (const auto& [handle, stream] : state().streams) tasks.push_back(stream->last);
    for (const auto& [thread, stream] : state().thread_streams) tasks.push_back(stream->last);
    if (state().legacy_stream) tasks.push_back(state().legacy_stream->last);
  }
  CUresult result = CUDA_SUCCESS;
  for (const fake_cuda::TaskPtr& task : tasks) result = Device::get().wait(task);
  return result;
}

CUresult cuEventCreate(CUevent* event, unsigned) {
  if (CUresult error = enter("cuEventCreate")) return error;
  std::lock_guard lock(state().mutex);
  auto made = std::make_unique<CUevent_st>();
  *event = made.get();
  state().events[*event] = std::move(made);
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent event) {
  if (CUresult error = enter("cuEventDestroy_v2")) return error;
  std::lock_guard lock(state().mutex);
  return state().events.erase(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventQuery(CUevent event) {
  if (CUresult error = enter("cuEventQuery")) return error;
  fake_cuda::TaskPtr recorded;
  if (CUresult error = recorded_task(event, "cuEventQuery", &recorded)) return error;
  return query(recorded);
}

CUresult cuEventSynchronize(CUevent event) {
  if (CUresult error = enter("cuEventSynchronize")) return error;
  fake_cuda::TaskPtr recorded;
  if (CUresult error = recorded_task(event, "cuEventSynchronize", &recorded)) return error;
  return Device::get().wait(recorded);
}
