// What a host program holds: a pool with its stream, and layers by handle. No Torch here.
#pragma once

#include <any>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/fork_guard.h"
#include "base/span.h"
#include "engine/layer_chain.h"
#include "moe/deferral.h"
#include "moe/moe_layer.h"
#include "runtime/cpu_stream.h"
#include "runtime/cuda_sync.h"
#include "system/topology.h"
#include "system/worker_pool.h"

namespace kt {

// One worker pool, one in-order stream whose jobs are worker 0 (on its own thread or on a waiting
// caller's), and the scratch of all layers.
//
// Threads   stream().submit() from any thread; everything that runs on the pool goes through the
//           stream.
// Lifetime  layers hold their engine; the destructor waits for queued jobs. In a fork() every use
//           throws, and engines and layers go without waiting (base/fork_guard.h); a child may make
//           an engine of its own.
class Engine {
 public:
  // As plan_pool(): 0 means "all usable".
  Engine(int num_threads, int num_nodes, const std::vector<int>& node_ids);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  WorkerPool& pool() { return *pool_; }
  CpuStream& stream() { return *stream_; }
  const std::shared_ptr<MoeScratch>& scratch() const { return scratch_; }
  const Topology& topology() const { return topology_; }
  const std::vector<std::string>& warnings() const { return warnings_; }

  // Runs `job` in the order of the stream, on the calling thread (pinned meanwhile) where the
  // stream is idle, and returns when it is done; its error is thrown here.
  void run(std::function<void()> job);

  // The jobs of this stream for a device, made at the first use; `device` is its ordinal.
  // Errors  kt::Error: no driver, no such device.
  DeviceSync& device_sync(int device);
  // Calls `visit` for each that was made.
  void for_each_device(FunctionRef<void(DeviceSync&)> visit);
  // Whether this is a fork's copy.
  bool inherited() const { return home_.inherited(); }

 private:
  Topology topology_;
  std::vector<std::string> warnings_;
  std::shared_ptr<MoeScratch> scratch_;
  std::unique_ptr<WorkerPool> pool_;
  std::unique_ptr<CpuStream> stream_;
  std::mutex devices_mutex_;
  std::map<int, std::unique_ptr<DeviceSync>> devices_;
  ForkGuard home_;
};

struct PendingForward;

// A layer and the engine that runs it.
//
// Every forward is two jobs of the engine's stream, in this order and with nothing between them:
//   run(input)           writes input.output; from here on the caller may be told that it is done
//   run_deferred(input)  computes what run() left, into the share that the chain hands to the
//                        successor: the next layer of the model adds it to its own output
// Nothing is left by a layer that is not linked, has no successor or may defer nothing.
//
// Threads  run() and run_deferred() inside jobs of the engine's stream; the rest from any.
// Lifetime  input's arrays stay whole until run_deferred() has returned; output is final, and may
// change, from the return of run(). A device that overwrites the arrays for another pass, because
// this one was given up, spoils the share, which no pass takes then, and nothing else:
// run_deferred() reads of them the hidden states only, ids and weights were copied. The destructor
// waits for what submit() queued and for jobs of devices, so the last owner is never a job of the
// stream.
class EngineLayer {
 public:
  EngineLayer(std::shared_ptr<Engine> layer_engine, const MoeConfig& config);
  ~EngineLayer();
  EngineLayer(const EngineLayer&) = delete;
  EngineLayer& operator=(const EngineLayer&) = delete;

  // Adds the predecessor's share if it is of this pass, and leaves the experts that may wait.
  // Errors  as MoeLayer::forward(), for the experts it leaves too; what went wrong in computing the
  // predecessor's share.
  void run(const MoeInput& input);
  // Errors  none: they are kept for the successor's run(). False if nothing was left.
  bool run_deferred(const MoeInput& input);
  // Queues both and returns the ticket of run(). `alive` is kept until run_deferred() is done.
  uint64_t submit(const MoeInput& input, std::shared_ptr<const void> alive);

  // MoeLayer::check_tiles(), as a job; compiles what it chose on every thread that will run it.
  TileReport check_tiles();

  // Makes this the layer at `position` of a chain. A job of the engine's stream; see link_layers().
  void link(std::shared_ptr<LayerChain> chain, int position, int max_deferred);
  // 0 for the first layer of a chain, one more for each that follows: neighbours differ in parity.
  int chain_position() const { return chain_position_.load(std::memory_order_relaxed); }
  // Experts a token may leave for the successor; 0 without one.
  int max_deferred() const { return max_deferred_.load(std::memory_order_relaxed); }

  std::shared_ptr<Engine> engine;
  MoeLayer layer;

 private:
  void leave(const MoeInput& input);
  void prepare_kernels();

  std::shared_ptr<LayerChain> chain_;  // may be null
  std::atomic<int> chain_position_{0};
  std::atomic<int> max_deferred_{0};
  DeferralSplit split_;
  std::optional<MoeInput> left_;     // what run() left for run_deferred(), with copies of
  std::vector<uint8_t> left_ids_;    // ids and
  std::vector<float> left_weights_;  // weights
  std::atomic<uint64_t> last_deferred_ticket_{0};

  friend void close_layer(int64_t handle);
  friend int64_t add_pending(PendingForward pending);
  bool closed_ = false;  // under the lock of the table of layers
};

// Links the layers of one model in the order of a pass: each hands what it defers to the next.
// max_deferred[i] is the number of experts that a token may leave at layers[i]; that of the last
// layer is not used. Earlier links of these layers end. Waits for the stream.
// Errors  kt::Error for lists of different lengths, layers of several engines or widths.
void link_layers(const std::vector<std::shared_ptr<EngineLayer>>& layers,
                 const std::vector<int>& max_deferred);

// Handles let a tensor operator name a layer by an integer. Thread-safe. A handle is never reused.
int64_t register_layer(std::shared_ptr<EngineLayer> layer);
// Errors  kt::Error for a handle that was never given out or was closed.
std::shared_ptr<EngineLayer> find_layer(int64_t handle);
// Waits for the layer's queued forwards and drops what nobody fetched. A handle that is not open:
// nothing.
void close_layer(int64_t handle);

// A forward that was submitted to the stream and not yet fetched. `output` is the caller's, and
// `fetched_by` the operator that may take it.
struct PendingForward {
  std::shared_ptr<EngineLayer> layer;
  uint64_t stream_ticket = 0;  // 0: a device asks for the forward
  std::any output;
  std::string_view fetched_by = "sync";  // a literal
};

// Keeps a forward until it is taken, or its layer closed; the tickets of all layers are distinct.
// Thread-safe.
// Errors  kt::Error for a layer that was closed since the forward was submitted: behind its end.
int64_t add_pending(PendingForward pending);
// Errors  kt::Error for a ticket that was never given out, was taken before, or whose layer was
//         closed. For one that another operator fetches: the ticket is good for that one still.
PendingForward take_pending(int64_t ticket, std::string_view fetched_by = "sync");

}  // namespace kt
