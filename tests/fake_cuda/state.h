// Handles, capture and the guard that every driver entry point starts with.
//
// Threads  calls that touch a handle hold `state().mutex`, so the order of calls is one order for
//          all streams (what the shared channel needs); waiting is done without it.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "fake_cuda/device.h"

namespace fake_cuda {

struct Node {
  Operation operation;
  std::vector<int> dependencies;  // earlier nodes
  int chain = 0;                  // set when instantiated: the lane that runs it
};

// One capture, from begin to end, over all streams that joined it.
struct Capture {
  uint64_t id;
  CUstreamCaptureMode mode;
  std::thread::id thread;
  CUstream origin;
  bool invalid = false;
  bool blocking = false;  // a blocking stream is part of it
  std::vector<Node> nodes;
};
using CapturePtr = std::shared_ptr<Capture>;

}  // namespace fake_cuda

struct CUstream_st {
  int id;
  fake_cuda::Lane* lane;
  fake_cuda::TaskPtr last;
  fake_cuda::CapturePtr capture;
  std::set<int> tails;   // of the capture: what the next node depends on
  bool blocking = true;  // the legacy default stream waits for it, and it for that one
};

struct CUevent_st {
  fake_cuda::TaskPtr recorded;
  fake_cuda::CapturePtr capture;  // recorded last in this capture
  std::set<int> tails;
};

struct CUgraph_st {
  std::vector<fake_cuda::Node> nodes;
};

struct CUgraphExec_st {
  std::vector<fake_cuda::Node> nodes;
  std::vector<fake_cuda::Lane*> lanes;  // of chains 1, 2, ...; chain 0 is the launching stream's
  fake_cuda::TaskPtr last;
};

namespace fake_cuda {

struct State {
  std::mutex mutex;
  bool initialized = false;
  int driver_version = 12080;
  int device_count = 1;
  int next_stream = 0;
  uint64_t next_capture = 1;
  std::map<CUstream, std::unique_ptr<CUstream_st>> streams;
  std::map<CUevent, std::unique_ptr<CUevent_st>> events;
  std::map<CUgraph, std::unique_ptr<CUgraph_st>> graphs;
  std::map<CUgraphExec, std::unique_ptr<CUgraphExec_st>> executables;
  std::unique_ptr<CUstream_st> legacy_stream;                              // handles 0 and 1
  std::map<std::thread::id, std::unique_ptr<CUstream_st>> thread_streams;  // handle 2
  std::set<CapturePtr> captures;
  std::map<std::string, uint64_t> calls;
  std::map<std::string, std::map<uint64_t, CUresult>> planned;  // by the number of the call

  // What a handle means for the calling thread; nullptr if there is none. Under the mutex.
  CUstream find_stream(CUstream handle);
};
State& state();

enum Need { kNothing, kInitialized, kContext };

// Counts a call and finds what forbids it: a host function calls, a planned failure, no cuInit, no
// current context, a context error.
CUresult enter(const char* function, Need need = kContext);

// For calls that are unsafe during a capture. Under the mutex.
CUresult refuse_during_capture(const char* function);

// The stream of a handle, for a call that uses it. The legacy stream while a blocking stream is
// captured: an error, which spoils the captures unless the call only looks. Under the mutex.
CUresult use_stream(CUstream handle, CUstream* stream, bool only_looks = false);

// Appends to the stream, or to its capture as a node. Under the mutex.
CUresult enqueue(CUstream stream, Operation operation);

// A task behind `dependencies`, counted and posted to the lane.
TaskPtr post_task(Lane* lane, Operation operation, std::vector<TaskPtr> dependencies);

CUcontext primary_context();
CUcontext current_context();

}  // namespace fake_cuda
