// The few entry points of the CUDA driver that the library uses, found at run time: one build
// serves hosts with and without CUDA, and no CUDA header is needed. Knows no protocol (cuda_sync.h
// does).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace kt {

// Our own declarations of cuda.h's types and numbers (CUDA 12).
using CuResult = int;
using CuDevice = int;
using CuAddress = unsigned long long;
using CuContext = struct CuContextTag*;
using CuStream = struct CuStreamTag*;
using CuEvent = struct CuEventTag*;
using CuGraph = struct CuGraphTag*;
using CuGraphExec = struct CuGraphExecTag*;

constexpr CuResult kCuSuccess = 0;
constexpr CuResult kCuNotReady = 600;
constexpr CuResult kCuCaptureImplicit = 906;
constexpr unsigned kCuHostPortable = 1;   // pinned for every context
constexpr unsigned kCuHostDeviceMap = 2;  // has an address on the device
constexpr unsigned kCuEventDisableTiming = 2;
constexpr unsigned kCuWaitEqual = 1;     // no FLUSH flag: see cuda_sync.h
constexpr unsigned kCuWriteDefault = 0;  // fences earlier writes of its stream
constexpr int kCuCaptureGlobal = 0;
constexpr int kCuCaptureRelaxed = 2;
constexpr int kCuCaptureNone = 0;

// The table. Names, signatures and meaning are the driver's; see its manual for errors.
//
// Threads   every entry from any thread, none inside a host function.
// Lifetime  the library is never unloaded.
struct CudaDriver {
  CuResult (*init)(unsigned flags) = nullptr;
  CuResult (*get_error_name)(CuResult error, const char** name) = nullptr;
  CuResult (*get_error_string)(CuResult error, const char** text) = nullptr;
  CuResult (*device_get)(CuDevice* device, int ordinal) = nullptr;
  CuResult (*device_primary_ctx_retain)(CuContext* context, CuDevice device) = nullptr;
  CuResult (*device_primary_ctx_release)(CuDevice device) = nullptr;
  CuResult (*ctx_push_current)(CuContext context) = nullptr;
  CuResult (*ctx_pop_current)(CuContext* context) = nullptr;
  CuResult (*mem_host_alloc)(void** memory, size_t bytes, unsigned flags) = nullptr;
  CuResult (*mem_free_host)(void* memory) = nullptr;
  CuResult (*mem_host_get_device_pointer)(CuAddress* address, void* memory,
                                          unsigned flags) = nullptr;
  CuResult (*memcpy_dtoh_async)(void* destination, CuAddress source, size_t bytes,
                                CuStream stream) = nullptr;
  CuResult (*memcpy_htod_async)(CuAddress destination, const void* source, size_t bytes,
                                CuStream stream) = nullptr;
  CuResult (*stream_create)(CuStream* stream, unsigned flags) = nullptr;
  CuResult (*stream_query)(CuStream stream) = nullptr;
  CuResult (*stream_wait_event)(CuStream stream, CuEvent event, unsigned flags) = nullptr;
  CuResult (*stream_begin_capture)(CuStream stream, int mode) = nullptr;
  CuResult (*stream_end_capture)(CuStream stream, CuGraph* graph) = nullptr;
  CuResult (*stream_is_capturing)(CuStream stream, int* status) = nullptr;
  CuResult (*thread_exchange_stream_capture_mode)(int* mode) = nullptr;
  CuResult (*stream_write_value32)(CuStream stream, CuAddress address, uint32_t value,
                                   unsigned flags) = nullptr;
  CuResult (*stream_wait_value32)(CuStream stream, CuAddress address, uint32_t value,
                                  unsigned flags) = nullptr;
  CuResult (*launch_host_func)(CuStream stream, void (*function)(void*), void* data) = nullptr;
  CuResult (*event_create)(CuEvent* event, unsigned flags) = nullptr;
  CuResult (*event_record)(CuEvent event, CuStream stream) = nullptr;
  CuResult (*event_query)(CuEvent event) = nullptr;
  CuResult (*event_destroy)(CuEvent event) = nullptr;
  CuResult (*graph_instantiate_with_flags)(CuGraphExec* executable, CuGraph graph,
                                           unsigned long long flags) = nullptr;
  CuResult (*graph_launch)(CuGraphExec executable, CuStream stream) = nullptr;
  CuResult (*graph_destroy)(CuGraph graph) = nullptr;

  bool is_double = false;              // the library is the tests' stand-in (exports kt_fake_cuda)
  bool has_memory_operations = false;  // both stream_*_value32; without them host functions signal
  std::string reason;                  // one sentence why there is no driver; empty: there is one

  bool available() const { return reason.empty(); }
};

// Loads a driver library by name or path and finds its entry points. Never throws: what is missing
// is in `reason`.
CudaDriver load_cuda_driver(const std::string& library);

// The process's driver: `libcuda.so.1`, or what KT_CUDA_DRIVER names. Loaded and initialized at the
// first call. Thread-safe.
const CudaDriver& cuda_driver();

// "cuMemHostAlloc failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory)".
std::string cuda_failure(const CudaDriver& driver, const char* function, CuResult error);

// Throws kt::Error with cuda_failure(), and what to do, unless `result` is success.
void check_cuda(const CudaDriver& driver, CuResult result, const char* function);

// Retains a device's primary context, the one that torch uses.
//
// Lifetime  the destructor gives it back.
class PrimaryContext {
 public:
  // Errors  kt::Error: no such device, or no context can be had.
  PrimaryContext(const CudaDriver& driver, int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;
  CuContext get() const { return context_; }

 private:
  const CudaDriver& driver_;
  CuDevice device_ = 0;
  CuContext context_ = nullptr;
};

// Makes a context the calling thread's while it lives.
class CurrentContext {
 public:
  // Errors  kt::Error: the context is broken.
  CurrentContext(const CudaDriver& driver, CuContext context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const CudaDriver& driver_;
};

// Lets the calling thread allocate, free and query while it lives, although a stream of any thread
// is being captured: those calls would break a capture of global mode.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const CudaDriver& driver);
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const CudaDriver& driver_;
  int mode_ = kCuCaptureRelaxed;
};

}  // namespace kt
