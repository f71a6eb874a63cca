#include "runtime/cuda_driver.h"

#include <dlfcn.h>

#include <cstdlib>

#include "base/check.h"

namespace kt {
namespace {

constexpr char kDriverVariable[] = "KT_CUDA_DRIVER";
constexpr char kDriverLibrary[] = "libcuda.so.1";

// The newest interface that is asked for: 11.7 made the stream memory operations what they are
// (v2).
constexpr int kInterface = 11070;

using GetProcV2 = CuResult (*)(const char*, void**, int, uint64_t, int*);
using GetProcV1 = CuResult (*)(const char*, void**, int, uint64_t);

class Resolver {
 public:
  explicit Resolver(void* library)
      : v2_(reinterpret_cast<GetProcV2>(dlsym(library, "cuGetProcAddress_v2"))),
        v1_(reinterpret_cast<GetProcV1>(dlsym(library, "cuGetProcAddress"))) {}

  bool usable() const { return v2_ != nullptr || v1_ != nullptr; }

  // Finds the version of an entry point that interface 11.7 has; dlsym would give the oldest one.
  template <typename Function>
  bool find(const char* name, Function& function) {
    void* address = nullptr;
    int status = 0;
    const CuResult result = v2_ != nullptr ? v2_(name, &address, kInterface, 0, &status)
                                           : v1_(name, &address, kInterface, 0);
    if (result != kCuSuccess || address == nullptr) return false;
    function = reinterpret_cast<Function>(address);
    return true;
  }

 private:
  GetProcV2 v2_;
  GetProcV1 v1_;
};

// The name of the first entry point that is missing, or null.
const char* find_entries(Resolver& resolver, CudaDriver& driver) {
  const char* missing = nullptr;
  const auto need = [&](const char* name, auto& function) {
    if (!resolver.find(name, function) && missing == nullptr) missing = name;
  };
  need("cuInit", driver.init);
  need("cuGetErrorName", driver.get_error_name);
  need("cuGetErrorString", driver.get_error_string);
  need("cuDeviceGet", driver.device_get);
  need("cuDevicePrimaryCtxRetain", driver.device_primary_ctx_retain);
  need("cuDevicePrimaryCtxRelease", driver.device_primary_ctx_release);
  need("cuCtxPushCurrent", driver.ctx_push_current);
  need("cuCtxPopCurrent", driver.ctx_pop_current);
  need("cuMemHostAlloc", driver.mem_host_alloc);
  need("cuMemFreeHost", driver.mem_free_host);
  need("cuMemHostGetDevicePointer", driver.mem_host_get_device_pointer);
  need("cuMemcpyDtoHAsync", driver.memcpy_dtoh_async);
  need("cuMemcpyHtoDAsync", driver.memcpy_htod_async);
  need("cuStreamCreate", driver.stream_create);
  need("cuStreamQuery", driver.stream_query);
  need("cuStreamWaitEvent", driver.stream_wait_event);
  need("cuStreamBeginCapture", driver.stream_begin_capture);
  need("cuStreamEndCapture", driver.stream_end_capture);
  need("cuStreamIsCapturing", driver.stream_is_capturing);
  need("cuThreadExchangeStreamCaptureMode", driver.thread_exchange_stream_capture_mode);
  need("cuLaunchHostFunc", driver.launch_host_func);
  need("cuEventCreate", driver.event_create);
  need("cuEventRecord", driver.event_record);
  need("cuEventQuery", driver.event_query);
  need("cuEventDestroy", driver.event_destroy);
  need("cuGraphInstantiateWithFlags", driver.graph_instantiate_with_flags);
  need("cuGraphLaunch", driver.graph_launch);
  need("cuGraphDestroy", driver.graph_destroy);
  driver.has_memory_operations =
      resolver.find("cuStreamWriteValue32", driver.stream_write_value32) &&
      resolver.find("cuStreamWaitValue32", driver.stream_wait_value32);
  return missing;
}

}  // namespace

CudaDriver load_cuda_driver(const std::string& library) {
  CudaDriver driver;
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* const error = dlerror();
    driver.reason = "the CUDA driver cannot be loaded (" +
                    std::string(error == nullptr ? library : error) +
                    "); install NVIDIA's driver, or pass CPU tensors.";
    return driver;
  }
  Resolver resolver(handle);
  driver.is_double = dlsym(handle, "kt_fake_cuda") != nullptr;
  if (!resolver.usable()) {
    driver.reason = library +
                    " has no cuGetProcAddress; a CUDA driver of version 11.7 or later "
                    "is needed.";
    return driver;
  }
  if (const char* const missing = find_entries(resolver, driver)) {
    driver.reason = library + " has no " + std::string(missing) +
                    "; a CUDA driver of version 11.7 or later is needed.";
    return driver;
  }
  if (const CuResult result = driver.init(0); result != kCuSuccess) {
    driver.reason = cuda_failure(driver, "cuInit", result) + "; no CUDA device can be used.";
  }
  return driver;
}

const CudaDriver& cuda_driver() {
  static const CudaDriver* driver = [] {
    const char* const library = std::getenv(kDriverVariable);
    return new CudaDriver(
        load_cuda_driver(library != nullptr && *library != '\0' ? library : kDriverLibrary));
  }();
  return *driver;
}

std::string cuda_failure(const CudaDriver& driver, const char* function, CuResult error) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (driver.get_error_name(error, &name) != kCuSuccess) name = nullptr;
  if (driver.get_error_string(error, &text) != kCuSuccess) text = nullptr;
  std::string sentence = std::string(function) + " failed: ";
  sentence += name != nullptr ? name : "error " + std::to_string(error);
  if (text != nullptr) sentence += " (" + std::string(text) + ")";
  return sentence;
}

void check_cuda(const CudaDriver& driver, CuResult result, const char* function) {
  KT_CHECK(result != kCuCaptureImplicit,
           cuda_failure(driver, function, result)
               << "; the default stream cannot be used while a stream that blocks it is captured: "
                  "use torch.cuda.Stream() for one of them, or wait for the end of the capture.");
  KT_CHECK(result == kCuSuccess, cuda_failure(driver, function, result)
                                     << "; the error may come from an earlier call.");
}

PrimaryContext::PrimaryContext(const CudaDriver& driver, int ordinal) : driver_(driver) {
  KT_CHECK(driver.available(), driver.reason);
  check_cuda(driver, driver.device_get(&device_, ordinal), "cuDeviceGet");
  check_cuda(driver, driver.device_primary_ctx_retain(&context_, device_),
             "cuDevicePrimaryCtxRetain");
}

PrimaryContext::~PrimaryContext() { driver_.device_primary_ctx_release(device_); }

CurrentContext::CurrentContext(const CudaDriver& driver, CuContext context) : driver_(driver) {
  check_cuda(driver, driver.ctx_push_current(context), "cuCtxPushCurrent");
}

CurrentContext::~CurrentContext() {
  CuContext context = nullptr;
  driver_.ctx_pop_current(&context);
}

RelaxedCapture::RelaxedCapture(const CudaDriver& driver) : driver_(driver) {
  driver.thread_exchange_stream_capture_mode(&mode_);
}

RelaxedCapture::~RelaxedCapture() { driver_.thread_exchange_stream_capture_mode(&mode_); }

}  // namespace kt
