// Capture, graphs, and the operations that are either enqueued or captured.
#include <algorithm>

#include "fake_cuda/fake_cuda.h"
#include "fake_cuda/state.h"

namespace fake_cuda {

namespace {

thread_local CUstreamCaptureMode thread_mode = CU_CAPTURE_GLOBAL;

// Appends a node behind the stream's tails.
CUresult add_node(CUstream stream, Operation operation) {
  Capture& capture = *stream->capture;
  if (capture.invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  capture.nodes.push_back({std::move(operation), {stream->tails.begin(), stream->tails.end()}});
  stream->tails = {static_cast<int>(capture.nodes.size()) - 1};
  return CUDA_SUCCESS;
}

// Nodes that are `tails` or before them.
std::vector<bool> ancestors(const std::vector<Node>& nodes, const std::set<int>& tails) {
  std::vector<bool> found(nodes.size());
  for (int tail : tails) found[tail] = true;
  for (int i = static_cast<int>(nodes.size()) - 1; i >= 0; --i) {
    if (!found[i]) continue;
    for (int before : nodes[i].dependencies) found[before] = true;
  }
  return found;
}

// Ends a capture for all its streams. Whether each of them had joined its origin.
bool leave(const CapturePtr& capture) {
  const std::vector<bool> joined = ancestors(capture->nodes, capture->origin->tails);
  bool all_joined = true;
  auto release = [&](CUstream stream) {
    if (!stream || stream->capture != capture) return;
    for (int tail : stream->tails) all_joined &= joined[tail];
    stream->capture = nullptr;
    stream->tails.clear();
  };
  for (auto& [handle, stream] : state().streams) release(stream.get());
  for (auto& [thread, stream] : state().thread_streams) release(stream.get());
  state().captures.erase(capture);
  return all_joined;
}

// Chains of the graph: a node continues the chain of a dependency that is its chain's last node.
int assign_chains(std::vector<Node>& nodes) {
  std::vector<int> last;
  for (int i = 0; i < static_cast<int>(nodes.size()); ++i) {
    int chain = -1;
    for (int before : nodes[i].dependencies) {
      if (last[nodes[before].chain] == before) chain = nodes[before].chain;
    }
    if (chain < 0) {
      chain = static_cast<int>(last.size());
      last.push_back(i);
    }
    nodes[i].chain = chain;
    last[chain] = i;
  }
  return static_cast<int>(last.size());
}

Operation marker(const char* name, CUstream stream) {
  Operation operation;
  operation.name = name;
  operation.stream = stream->id;
  return operation;
}

}  // namespace

TaskPtr post_task(Lane* lane, Operation operation, std::vector<TaskPtr> dependencies) {
  auto task = std::make_shared<Task>();
  task->operation = std::move(operation);
  std::erase(dependencies, nullptr);
  task->dependencies = std::move(dependencies);
  Device::get().post(lane, task);
  return task;
}

CUresult enqueue(CUstream stream, Operation operation) {
  operation.stream = stream->id;
  if (stream->capture) return add_node(stream, std::move(operation));
  stream->last = post_task(stream->lane, std::move(operation), {stream->last});
  return CUDA_SUCCESS;
}

CUresult refuse_during_capture(const char* function) {
  bool refused = false;
  for (const CapturePtr& capture : state().captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool forbidden = thread_mode == CU_CAPTURE_RELAXED  ? false
                           : own                              ? capture->mode != CU_CAPTURE_RELAXED
                           : thread_mode == CU_CAPTURE_GLOBAL ? capture->mode == CU_CAPTURE_GLOBAL
                                                              : false;
    if (forbidden) capture->invalid = refused = true;
  }
  if (!refused) return CUDA_SUCCESS;
  Device::get().violate(std::string(function) + " during a capture");
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

}  // namespace fake_cuda

using fake_cuda::CapturePtr;
using fake_cuda::Device;
using fake_cuda::enter;
using fake_cuda::Kind;
using fake_cuda::Operation;
using fake_cuda::state;

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  if (CUresult error = enter("cuThreadExchangeStreamCaptureMode", fake_cuda::kInitialized)) {
    return error;
  }
  if (!mode || *mode < CU_CAPTURE_GLOBAL || *mode > CU_CAPTURE_RELAXED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::swap(*mode, fake_cuda::thread_mode);
  return CUDA_SUCCESS;
}

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
  if (CUresult error = enter("cuStreamBeginCapture_v2")) return error;
  std::lock_guard lock(state().mutex);
  CUstream stream = state().find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream == state().legacy_stream.get()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (stream->capture) return CUDA_ERROR_INVALID_VALUE;
  auto capture = std::make_shared<fake_cuda::Capture>();
  capture->id = state().next_capture++;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->origin = stream;
  capture->blocking = stream->blocking;
  stream->capture = capture;
  stream->tails.clear();
  state().captures.insert(capture);
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
  if (CUresult error = enter("cuStreamEndCapture")) return error;
  std::lock_guard lock(state().mutex);
  CUstream stream = state().find_stream(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!graph) return CUDA_ERROR_INVALID_VALUE;
  *graph = nullptr;
  const CapturePtr capture = stream->capture;
  if (!capture) return CUDA_ERROR_INVALID_VALUE;
  if (capture->origin != stream) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  if (capture->mode != CU_CAPTURE_RELAXED && capture->thread != std::this_thread::get_id()) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  const bool joined = fake_cuda::leave(capture);
  if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!joined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  auto made = std::make_unique<CUgraph_st>();
  made->nodes = capture->nodes;
  *graph = made.get();
  state().graphs[*graph] = std::move(made);
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  if (CUresult error = enter("cuStreamIsCapturing")) return error;
  std::lock_guard lock(state().mutex);
  CUstream stream = nullptr;
  if (CUresult error = fake_cuda::use_stream(handle, &stream, /*only_looks=*/true)) return error;
  *status = !stream->capture           ? CU_CAPTURE_NONE
            : stream->capture->invalid ? CU_CAPTURE_INVALIDATED
                                       : CU_CAPTURE_ACTIVE;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus* status, uint64_t* id,
                                   CUgraph* graph, const CUgraphNode** nodes, size_t* num_nodes) {
  if (CUresult error = cuStreamIsCapturing(handle, status)) return error;
  std::lock_guard lock(state().mutex);
  CUstream stream = state().find_stream(handle);
  if (id) *id = stream->capture ? stream->capture->id : 0;
  // nodes have no handles here; who asks for them gets none
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (num_nodes) *num_nodes = 0;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo_v3(CUstream handle, CUstreamCaptureStatus* status, uint64_t* id,
                                   CUgraph* graph, const CUgraphNode** nodes, const void** edges,
                                   size_t* num_nodes) {
  if (edges) *edges = nullptr;
  return cuStreamGetCaptureInfo_v2(handle, status, id, graph, nodes, num_nodes);
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
  if (CUresult error = enter("cuStreamWaitEvent")) return error;
  std::lock_guard lock(state().mutex);
  CUstream stream = nullptr;
  if (CUresult error = fake_cuda::use_stream(handle, &stream)) return error;
  const auto found = state().events.find(event_handle);
  if (found == state().events.end()) return CUDA_ERROR_INVALID_HANDLE;
  const CUevent_st& event = *found->second;
  if (event.capture) {
    // an event of a capture that has ended orders nothing
    if (!state().captures.count(event.capture)) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture && stream->capture != event.capture) {
      stream->capture->invalid = event.capture->invalid = true;
      return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (event.capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (!stream->capture) stream->tails.clear();
    stream->capture = event.capture;
    stream->capture->blocking |= stream->blocking;
    stream->tails.insert(event.tails.begin(), event.tails.end());
    return CUDA_SUCCESS;
  }
  if (stream->capture) {
    if (!event.recorded) return CUDA_SUCCESS;
    stream->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  if (!event.recorded) return CUDA_SUCCESS;
  stream->last = post_task(stream->lane, fake_cuda::marker("cuStreamWaitEvent", stream),
                           {stream->last, event.recorded});
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event_handle, CUstream handle) {
  if (CUresult error = enter("cuEventRecord")) return error;
  std::lock_guard lock(state().mutex);
  CUstream stream = nullptr;
  if (CUresult error = fake_cuda::use_stream(handle, &stream)) return error;
  const auto found = state().events.find(event_handle);
  if (found == state().events.end()) return CUDA_ERROR_INVALID_HANDLE;
  CUevent_st& event = *found->second;
  if (stream->capture) {
    if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    event = {nullptr, stream->capture, stream->tails};
    return CUDA_SUCCESS;
  }
  stream->last =
      post_task(stream->lane, fake_cuda::marker("cuEventRecord", stream), {stream->last});
  event = {stream->last, nullptr, {}};
  return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
  if (CUresult error = enter("cuLaunchHostFunc")) return error;
  if (!function) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard lock(state().mutex);
  CUstream stream = nullptr;
  if (CUresult error = fake_cuda::use_stream(handle, &stream)) return error;
  Operation operation;
  operation.kind = Kind::kHostFunction;
  operation.name = "cuLaunchHostFunc";
  operation.function = function;
  operation.argument = data;
  return fake_cuda::enqueue(stream, operation);
}

namespace {

CUresult stream_memory_operation(CUstream handle, const char* name, Kind kind, CUdeviceptr address,
                                 uint32_t value, unsigned flags, unsigned allowed_flags) {
  if (CUresult error = enter(name)) return error;
  Device& device = Device::get();
  if (device.stream_memory_operations == 0 || (flags & ~allowed_flags)) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  Operation operation;
  operation.kind = kind;
  operation.name = name;
  operation.word = reinterpret_cast<uint32_t*>(address);
  operation.value = value;
  operation.flags = flags;
  unsigned memory = 0;
  const bool mapped =
      device.find_region(operation.word, 4, true, &memory) && (memory & CU_MEMHOSTALLOC_DEVICEMAP);
  if (address % 4 || !(mapped || device.find_region(operation.word, 4, false))) {
    device.violate(std::string(name) + ": the word is no mapped, aligned memory");
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::lock_guard lock(state().mutex);
  CUstream stream = nullptr;
  if (CUresult error = fake_cuda::use_stream(handle, &stream)) return error;
  return fake_cuda::enqueue(stream, operation);
}

CUresult first_version(const char* name) {
  if (CUresult error = enter(name)) return error;
  Device::get().violate(std::string(name) +
                        ": the first version, which a bare dlsym finds; ask cuGetProcAddress");
  return CUDA_ERROR_NOT_SUPPORTED;
}

}  // namespace

CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                 unsigned flags) {
  return stream_memory_operation(stream, "cuStreamWriteValue32_v2", Kind::kWriteValue, address,
                                 value, flags, 0);
}

CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value,
                                unsigned flags) {
  return stream_memory_operation(stream, "cuStreamWaitValue32_v2", Kind::kWaitValue, address, value,
                                 flags, 3);
}

CUresult cuStreamWriteValue32(CUstream, CUdeviceptr, uint32_t, unsigned) {
  return first_version("cuStreamWriteValue32");
}

CUresult cuStreamWaitValue32(CUstream, CUdeviceptr, uint32_t, unsigned) {
  return first_version("cuStreamWaitValue32");
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  if (CUresult error = enter("cuGraphInstantiateWithFlags")) return error;
  std::lock_guard lock(state().mutex);
  if (!executable || !state().graphs.count(graph)) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult error = fake_cuda::refuse_during_capture("cuGraphInstantiateWithFlags"))
    return error;
  auto made = std::make_unique<CUgraphExec_st>();
  made->nodes = graph->nodes;
  const int num_chains = fake_cuda::assign_chains(made->nodes);
  for (int i = 1; i < num_chains; ++i) made->lanes.push_back(Device::get().acquire_lane());
  *executable = made.get();
  state().executables[*executable] = std::move(made);
  return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
  if (CUresult error = enter("cuGraphLaunch")) return error;
  std::lock_guard lock(state().mutex);
  CUstream stream = nullptr;
  if (CUresult error = fake_cuda::use_stream(handle, &stream)) return error;
  if (!state().executables.count(executable)) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture) return CUDA_ERROR_NOT_SUPPORTED;
  const std::vector<fake_cuda::Node>& nodes = executable->nodes;
  std::vector<fake_cuda::TaskPtr> tasks;
  std::vector<fake_cuda::TaskPtr> ends{stream->last, executable->last};
  std::vector<bool> continued(nodes.size());
  for (const fake_cuda::Node& node : nodes) {
    std::vector<fake_cuda::TaskPtr> dependencies;
    for (int before : node.dependencies) {
      dependencies.push_back(tasks[before]);
      continued[before] = true;
    }
    if (dependencies.empty()) dependencies = {stream->last, executable->last};
    fake_cuda::Lane* lane = node.chain == 0 ? stream->lane : executable->lanes[node.chain - 1];
    tasks.push_back(fake_cuda::post_task(lane, node.operation, std::move(dependencies)));
  }
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (!continued[i]) ends.push_back(tasks[i]);
  }
  stream->last = executable->last =
      fake_cuda::post_task(stream->lane, fake_cuda::marker("cuGraphLaunch", stream), ends);
  return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
  if (CUresult error = enter("cuGraphExecDestroy")) return error;
  std::lock_guard lock(state().mutex);
  if (!state().executables.count(executable)) return CUDA_ERROR_INVALID_HANDLE;
  for (fake_cuda::Lane* lane : executable->lanes) Device::get().release_lane(lane);
  state().executables.erase(executable);
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
  if (CUresult error = enter("cuGraphDestroy")) return error;
  std::lock_guard lock(state().mutex);
  return state().graphs.erase(graph) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
