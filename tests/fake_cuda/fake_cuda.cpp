// The control functions, and the table of cuGetProcAddress.
#include "fake_cuda/fake_cuda.h"

#include <algorithm>
#include <cstring>

#include "fake_cuda/state.h"

using fake_cuda::Device;
using fake_cuda::Kind;
using fake_cuda::Operation;
using fake_cuda::state;

namespace {

struct Symbol {
  const char* name;  // without a version
  int since;         // the CUDA version whose callers get this one
  void* address;
};

#define FAKE_CUDA_SYMBOL(name) {#name, 2000, reinterpret_cast<void*>(&name)}
#define FAKE_CUDA_VERSION(name, since, function) {#name, since, reinterpret_cast<void*>(&function)}

const Symbol kSymbols[] = {
    FAKE_CUDA_SYMBOL(cuInit),
    FAKE_CUDA_SYMBOL(cuDriverGetVersion),
    FAKE_CUDA_VERSION(cuGetProcAddress, 11030, cuGetProcAddress),
    FAKE_CUDA_VERSION(cuGetProcAddress, 12000, cuGetProcAddress_v2),
    FAKE_CUDA_SYMBOL(cuGetErrorName),
    FAKE_CUDA_SYMBOL(cuGetErrorString),
    FAKE_CUDA_SYMBOL(cuDeviceGet),
    FAKE_CUDA_SYMBOL(cuDeviceGetCount),
    FAKE_CUDA_SYMBOL(cuDeviceGetName),
    FAKE_CUDA_SYMBOL(cuDeviceGetAttribute),
    FAKE_CUDA_SYMBOL(cuDevicePrimaryCtxRetain),
    FAKE_CUDA_VERSION(cuDevicePrimaryCtxRelease, 11000, cuDevicePrimaryCtxRelease_v2),
    FAKE_CUDA_VERSION(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2),
    FAKE_CUDA_VERSION(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2),
    FAKE_CUDA_SYMBOL(cuCtxGetCurrent),
    FAKE_CUDA_SYMBOL(cuCtxSetCurrent),
    FAKE_CUDA_SYMBOL(cuCtxGetDevice),
    FAKE_CUDA_SYMBOL(cuCtxSynchronize),
    FAKE_CUDA_SYMBOL(cuMemHostAlloc),
    FAKE_CUDA_SYMBOL(cuMemFreeHost),
    FAKE_CUDA_VERSION(cuMemHostGetDevicePointer, 3020, cuMemHostGetDevicePointer_v2),
    FAKE_CUDA_VERSION(cuMemAlloc, 3020, cuMemAlloc_v2),
    FAKE_CUDA_VERSION(cuMemFree, 3020, cuMemFree_v2),
    FAKE_CUDA_VERSION(cuMemcpyDtoHAsync, 3020, cuMemcpyDtoHAsync_v2),
    FAKE_CUDA_VERSION(cuMemcpyHtoDAsync, 3020, cuMemcpyHtoDAsync_v2),
    FAKE_CUDA_VERSION(cuMemcpyDtoDAsync, 3020, cuMemcpyDtoDAsync_v2),
    FAKE_CUDA_VERSION(cuMemcpyAsync, 4000, cuMemcpyAsync),
    FAKE_CUDA_SYMBOL(cuStreamCreate),
    FAKE_CUDA_SYMBOL(cuStreamCreateWithPriority),
    FAKE_CUDA_VERSION(cuStreamDestroy, 4000, cuStreamDestroy_v2),
    FAKE_CUDA_SYMBOL(cuStreamSynchronize),
    FAKE_CUDA_SYMBOL(cuStreamQuery),
    FAKE_CUDA_SYMBOL(cuStreamWaitEvent),
    FAKE_CUDA_VERSION(cuStreamBeginCapture, 10010, cuStreamBeginCapture_v2),
    FAKE_CUDA_SYMBOL(cuStreamEndCapture),
    FAKE_CUDA_SYMBOL(cuStreamIsCapturing),
    FAKE_CUDA_VERSION(cuStreamGetCaptureInfo, 11030, cuStreamGetCaptureInfo_v2),
    FAKE_CUDA_VERSION(cuStreamGetCaptureInfo, 12030, cuStreamGetCaptureInfo_v3),
    FAKE_CUDA_SYMBOL(cuThreadExchangeStreamCaptureMode),
    FAKE_CUDA_SYMBOL(cuLaunchHostFunc),
    FAKE_CUDA_VERSION(cuStreamWriteValue32, 8000, cuStreamWriteValue32),
    FAKE_CUDA_VERSION(cuStreamWriteValue32, 11070, cuStreamWriteValue32_v2),
    FAKE_CUDA_VERSION(cuStreamWaitValue32, 8000, cuStreamWaitValue32),
    FAKE_CUDA_VERSION(cuStreamWaitValue32, 11070, cuStreamWaitValue32_v2),
    FAKE_CUDA_SYMBOL(cuEventCreate),
    FAKE_CUDA_SYMBOL(cuEventRecord),
    FAKE_CUDA_SYMBOL(cuEventQuery),
    FAKE_CUDA_SYMBOL(cuEventSynchronize),
    FAKE_CUDA_VERSION(cuEventDestroy, 4000, cuEventDestroy_v2),
    FAKE_CUDA_VERSION(cuGraphInstantiateWithFlags, 11040, cuGraphInstantiateWithFlags),
    FAKE_CUDA_VERSION(cuGraphInstantiate, 12000, cuGraphInstantiateWithFlags),
    FAKE_CUDA_SYMBOL(cuGraphLaunch),
    FAKE_CUDA_SYMBOL(cuGraphExecDestroy),
    FAKE_CUDA_SYMBOL(cuGraphDestroy),
};

CUresult launch(void* stream, Operation operation) {
  if (CUresult error = fake_cuda::enter(operation.name)) return error;
  std::lock_guard lock(state().mutex);
  CUstream found = nullptr;
  if (CUresult error = fake_cuda::use_stream(static_cast<CUstream>(stream), &found)) return error;
  return fake_cuda::enqueue(found, std::move(operation));
}

void set_paused(void* stream, bool paused) {
  std::lock_guard lock(state().mutex);
  if (CUstream found = state().find_stream(static_cast<CUstream>(stream))) {
    found->lane->set_paused(paused);
  }
}

}  // namespace

CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t,
                             int* status) {
  const Symbol* best = nullptr;
  for (const Symbol& candidate : kSymbols) {
    if (std::strcmp(candidate.name, symbol) == 0 && candidate.since <= version &&
        candidate.since <= state().driver_version) {
      best = &candidate;
    }
  }
  *function = best ? best->address : nullptr;
  if (status) *status = best ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return best ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}

void fake_cuda_restore_defaults() {
  Device::get().restore_defaults();
  std::lock_guard lock(state().mutex);
  state().calls.clear();
  state().planned.clear();
  state().driver_version = 12080;
  state().device_count = 1;
}

void fake_cuda_reset() {
  {
    std::lock_guard lock(state().mutex);
    state().captures.clear();
    state().executables.clear();
    state().graphs.clear();
    state().events.clear();
    state().streams.clear();
    state().thread_streams.clear();
    state().legacy_stream.reset();
  }
  Device::get().reset();
  fake_cuda_restore_defaults();
}

void fake_cuda_set_delays(uint64_t seed, int max_us) {
  Device::get().delay_seed = seed;
  ++Device::get().delay_generation;
  Device::get().max_delay_us = max_us;
}

void fake_cuda_pause(void* stream) { set_paused(stream, true); }
void fake_cuda_resume(void* stream) { set_paused(stream, false); }

int fake_cuda_launch(void* stream, void (*fn)(void*), void* arg) {
  Operation operation;
  operation.kind = Kind::kKernel;
  operation.name = "fake_cuda_launch";
  operation.function = fn;
  operation.argument = arg;
  return launch(stream, operation);
}

int fake_cuda_launch_fault(void* stream, int error) {
  Operation operation;
  operation.kind = Kind::kFault;
  operation.name = "fake_cuda_launch_fault";
  operation.error = error;
  return launch(stream, operation);
}

uint64_t fake_cuda_calls(const char* function) {
  std::lock_guard lock(state().mutex);
  const auto found = state().calls.find(function);
  return found == state().calls.end() ? 0 : found->second;
}

uint64_t fake_cuda_pending() { return Device::get().pending.load(); }
uint64_t fake_cuda_host_bytes() { return Device::get().host_bytes(); }

void fake_cuda_fail_call(const char* function, int nth, int error) {
  std::lock_guard lock(state().mutex);
  state().planned[function][state().calls[function] + nth] = error;
}

void fake_cuda_fail_context(int error) { Device::get().fail(error); }
void fake_cuda_set_host_functions(int enabled) { Device::get().host_functions = enabled != 0; }
void fake_cuda_set_stream_memory_operations(int mode) {
  Device::get().stream_memory_operations = mode;
}

void fake_cuda_set_driver_version(int version) {
  std::lock_guard lock(state().mutex);
  state().driver_version = version;
}

void fake_cuda_set_device_count(int count) {
  std::lock_guard lock(state().mutex);
  state().device_count = count;
}

void fake_cuda_set_shared_channel(int enabled) { Device::get().shared_channel = enabled != 0; }
void fake_cuda_set_store_buffer(int enabled) { Device::get().store_buffer = enabled != 0; }
void fake_cuda_set_deadlock_timeout(int milliseconds) {
  Device::get().deadlock_timeout_ms = milliseconds;
}

int fake_cuda_deadlocked() { return Device::get().deadlocked; }
int fake_cuda_violations() { return Device::get().num_violations; }

size_t fake_cuda_report(char* text, size_t size) {
  const std::string report = Device::get().report();
  if (text && size) {
    const size_t length = std::min(size - 1, report.size());
    std::memcpy(text, report.data(), length);
    text[length] = 0;
  }
  return report.size();
}
