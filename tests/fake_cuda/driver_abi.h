// The part of the CUDA driver's ABI that the test double has: names, signatures and numbers of
// cuda.h 12, declared here because no CUDA header is needed to build or test this project.
#pragma once

#include <cstddef>
#include <cstdint>

#define FAKE_CUDA_EXPORT __attribute__((visibility("default")))

extern "C" {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphNode = struct CUgraphNode_st*;
using CUgraphExec = struct CUgraphExec_st*;
using CUhostFn = void (*)(void*);

enum : CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_INVALID_HANDLE = 400,
  CUDA_ERROR_NOT_FOUND = 500,
  CUDA_ERROR_NOT_READY = 600,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_LAUNCH_TIMEOUT = 702,
  CUDA_ERROR_LAUNCH_FAILED = 719,
  CUDA_ERROR_NOT_PERMITTED = 800,
  CUDA_ERROR_NOT_SUPPORTED = 801,
  CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
  CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
  CUDA_ERROR_STREAM_CAPTURE_MERGE = 902,
  CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
  CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
  CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
  CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
  CUDA_ERROR_CAPTURED_EVENT = 907,
  CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
  CUDA_ERROR_UNKNOWN = 999,
};

enum : int {
  CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY = 19,
  CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES = 98,
  CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS = 122,
  CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR = 123,
};

enum : unsigned {
  CU_MEMHOSTALLOC_PORTABLE = 1,
  CU_MEMHOSTALLOC_DEVICEMAP = 2,
  CU_MEMHOSTALLOC_WRITECOMBINED = 4,
  CU_STREAM_NON_BLOCKING = 1,
  CU_EVENT_DISABLE_TIMING = 2,
  CU_STREAM_WAIT_VALUE_GEQ = 0,
  CU_STREAM_WAIT_VALUE_EQ = 1,
  CU_STREAM_WAIT_VALUE_AND = 2,
  CU_STREAM_WAIT_VALUE_NOR = 3,
  CU_STREAM_WAIT_VALUE_FLUSH = 1u << 30,
  CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER = 1,
};

enum CUstreamCaptureMode { CU_CAPTURE_GLOBAL = 0, CU_CAPTURE_THREAD_LOCAL = 1, CU_CAPTURE_RELAXED };
enum CUstreamCaptureStatus { CU_CAPTURE_NONE = 0, CU_CAPTURE_ACTIVE = 1, CU_CAPTURE_INVALIDATED };
enum : int { CU_GET_PROC_ADDRESS_SUCCESS = 0, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND = 1 };

FAKE_CUDA_EXPORT CUresult cuInit(unsigned flags);
FAKE_CUDA_EXPORT CUresult cuDriverGetVersion(int* version);
FAKE_CUDA_EXPORT CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                              uint64_t flags, int* status);
FAKE_CUDA_EXPORT CUresult cuGetProcAddress(const char* symbol, void** function, int version,
                                           uint64_t flags);
FAKE_CUDA_EXPORT CUresult cuGetErrorName(CUresult error, const char** text);
FAKE_CUDA_EXPORT CUresult cuGetErrorString(CUresult error, const char** text);

FAKE_CUDA_EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal);
FAKE_CUDA_EXPORT CUresult cuDeviceGetCount(int* count);
FAKE_CUDA_EXPORT CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device);
FAKE_CUDA_EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice device);
FAKE_CUDA_EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device);
FAKE_CUDA_EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device);
FAKE_CUDA_EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context);
FAKE_CUDA_EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context);
FAKE_CUDA_EXPORT CUresult cuCtxGetCurrent(CUcontext* context);
FAKE_CUDA_EXPORT CUresult cuCtxSetCurrent(CUcontext context);
FAKE_CUDA_EXPORT CUresult cuCtxGetDevice(CUdevice* device);
FAKE_CUDA_EXPORT CUresult cuCtxSynchronize();

FAKE_CUDA_EXPORT CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned flags);
FAKE_CUDA_EXPORT CUresult cuMemFreeHost(void* memory);
FAKE_CUDA_EXPORT CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* memory,
                                                       unsigned flags);
FAKE_CUDA_EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes);
FAKE_CUDA_EXPORT CUresult cuMemFree_v2(CUdeviceptr address);
FAKE_CUDA_EXPORT CUresult cuMemcpyDtoHAsync_v2(void* destination, CUdeviceptr source, size_t bytes,
                                               CUstream stream);
FAKE_CUDA_EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr destination, const void* source,
                                               size_t bytes, CUstream stream);
FAKE_CUDA_EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr destination, CUdeviceptr source,
                                               size_t bytes, CUstream stream);
FAKE_CUDA_EXPORT CUresult cuMemcpyAsync(CUdeviceptr destination, CUdeviceptr source, size_t bytes,
                                        CUstream stream);

FAKE_CUDA_EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned flags);
FAKE_CUDA_EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags,
                                                     int priority);
FAKE_CUDA_EXPORT CUresult cuStreamDestroy_v2(CUstream stream);
FAKE_CUDA_EXPORT CUresult cuStreamSynchronize(CUstream stream);
FAKE_CUDA_EXPORT CUresult cuStreamQuery(CUstream stream);
FAKE_CUDA_EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags);
FAKE_CUDA_EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode);
FAKE_CUDA_EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph);
FAKE_CUDA_EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status);
FAKE_CUDA_EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream stream, CUstreamCaptureStatus* status,
                                                    uint64_t* id, CUgraph* graph,
                                                    const CUgraphNode** nodes, size_t* num_nodes);
FAKE_CUDA_EXPORT CUresult cuStreamGetCaptureInfo_v3(CUstream stream, CUstreamCaptureStatus* status,
                                                    uint64_t* id, CUgraph* graph,
                                                    const CUgraphNode** nodes, const void** edges,
                                                    size_t* num_nodes);
FAKE_CUDA_EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode);
FAKE_CUDA_EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data);
FAKE_CUDA_EXPORT CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address,
                                                  uint32_t value, unsigned flags);
FAKE_CUDA_EXPORT CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address,
                                                 uint32_t value, unsigned flags);
// The first version of both: what a bare dlsym finds. Refused and reported, as it is no use today.
FAKE_CUDA_EXPORT CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr address, uint32_t value,
                                               unsigned flags);
FAKE_CUDA_EXPORT CUresult cuStreamWaitValue32(CUstream stream, CUdeviceptr address, uint32_t value,
                                              unsigned flags);

FAKE_CUDA_EXPORT CUresult cuEventCreate(CUevent* event, unsigned flags);
FAKE_CUDA_EXPORT CUresult cuEventRecord(CUevent event, CUstream stream);
FAKE_CUDA_EXPORT CUresult cuEventQuery(CUevent event);
FAKE_CUDA_EXPORT CUresult cuEventSynchronize(CUevent event);
FAKE_CUDA_EXPORT CUresult cuEventDestroy_v2(CUevent event);

FAKE_CUDA_EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph,
                                                      unsigned long long flags);
FAKE_CUDA_EXPORT CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream);
FAKE_CUDA_EXPORT CUresult cuGraphExecDestroy(CUgraphExec executable);
FAKE_CUDA_EXPORT CUresult cuGraphDestroy(CUgraph graph);

// Marks the library as the double.
FAKE_CUDA_EXPORT extern const int kt_fake_cuda;
}
