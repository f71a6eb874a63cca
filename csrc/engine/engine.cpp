#include "engine/engine.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "base/check.h"
#include "base/cpu_features.h"

namespace kt {
namespace {

struct LayerTable {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<EngineLayer>> layers;
  std::unordered_map<int64_t, PendingForward> pending;
  ForkGuard home;
};

// Not of the table: a fork's handles differ from the inherited ones.
std::atomic<int64_t> next_handle{1};
std::atomic<int64_t> next_ticket{1};

// Never destroyed: a thread may still sync while the process exits. In a fork a new one: a thread
// that is not there may hold the lock of the other, whose layers nobody there can use.
LayerTable& layer_table() {
  static std::atomic<LayerTable*> table{new LayerTable};
  LayerTable* found = table.load(std::memory_order_acquire);
  if (!found->home.inherited()) return *found;
  auto fresh = std::make_unique<LayerTable>();
  if (table.compare_exchange_strong(found, fresh.get())) found = fresh.release();
  return *found;
}

// Whether or not it succeeded.
void wait_for_end(const PendingForward& pending) {
  if (pending.stream_ticket == 0) return;
  try {
    pending.layer->engine->stream().wait(pending.stream_ticket);
  } catch (const std::exception&) {
    // the caller closed the layer instead of asking for the result: its error has no one to go to
  }
}

}  // namespace

Engine::Engine(int num_threads, int num_nodes, const std::vector<int>& node_ids)
    : topology_(detect_topology()), warnings_(topology_.warnings), scratch_(make_moe_scratch()) {
  const PoolPlan plan = plan_pool(topology_, num_threads, num_nodes, node_ids);
  warnings_.insert(warnings_.end(), plan.warnings.begin(), plan.warnings.end());
  pool_ = std::make_unique<WorkerPool>(plan);
  stream_ = std::make_unique<CpuStream>([this] { pool_->adopt_current_thread(); });
}

Engine::~Engine() {
  devices_.clear();
  stream_.reset();  // runs what is queued while the pool still stands
}

void Engine::run(std::function<void()> job) {
  stream_->run([this, &job] {
    const WorkerPool::CallerPin pin(*pool_);
    job();
  });
}

DeviceSync& Engine::device_sync(int device) {
  home_.check();
  const std::lock_guard<std::mutex> lock(devices_mutex_);
  std::unique_ptr<DeviceSync>& sync = devices_[device];
  if (sync == nullptr) {
    const DeviceSyncOptions options = DeviceSyncOptions::from_environment(device);
    sync = std::make_unique<DeviceSync>(*stream_, device, options);
  }
  return *sync;
}

void Engine::for_each_device(FunctionRef<void(DeviceSync&)> visit) {
  home_.check();
  std::vector<DeviceSync*> made;
  {
    const std::lock_guard<std::mutex> lock(devices_mutex_);
    for (const auto& [device, sync] : devices_) {
      if (sync != nullptr) made.push_back(sync.get());
    }
  }
  // without the lock: a visit may wait for the device, or for the GIL, whose holder wants the lock
  for (DeviceSync* const sync : made) visit(*sync);
}

EngineLayer::EngineLayer(std::shared_ptr<Engine> layer_engine, const MoeConfig& config)
    : engine(std::move(layer_engine)),
      layer(config, engine->pool(), engine->scratch(), cpu_features().chosen) {
  if (layer.compiles_kernels()) prepare_kernels();
}

void EngineLayer::prepare_kernels() {
  // Worker 0 of a forward is the stream's thread or the caller of run(), and code is compiled for
  // each thread by itself: once on the stream's, once on this one, as who makes layers runs them.
  const auto prepare = [this] { layer.prepare_kernels(); };
  engine->stream().wait(engine->stream().submit(prepare));
  engine->run(prepare);
}

TileReport EngineLayer::check_tiles() {
  TileReport report;
  if (!layer.has_tiles()) return report;
  engine->run([&] { report = layer.check_tiles(); });
  if (report.verdict == TileVerdict::kSlower) prepare_kernels();
  return report;
}

EngineLayer::~EngineLayer() {
  if (engine->inherited()) return;
  const uint64_t ticket = last_deferred_ticket_.load(std::memory_order_acquire);
  if (ticket != 0) engine->stream().wait(ticket);
  engine->for_each_device([this](DeviceSync& device) { device.retire(this); });
}

void EngineLayer::run(const MoeInput& input) {
  MoeInput now = input;
  if (left_.has_value()) layer.count_dropped_share();  // its run_deferred() never came
  left_.reset();
  if (chain_ != nullptr) {
    const LayerChain::Taken taken = chain_->take(chain_position(), input.num_tokens);
    if (taken.dropped) layer.count_dropped_share();
    now.addend = taken.share;
  }
  const MoeConfig& config = layer.config();
  bool leaves = false;
  if (max_deferred() > 0) {
    split_deferred(input.topk_ids, input.id_dtype, input.topk_weights, input.num_tokens,
                   input.top_k, config.num_experts, input.skip, max_deferred(), split_);
    for (const int expert : split_.deferred) layer.check_expert(expert);
    leaves = !split_.deferred.empty();
    if (leaves) now.skip = split_.skip_now.data();
  }
  layer.forward(now);
  if (leaves) leave(input);
}

void EngineLayer::leave(const MoeInput& input) {
  const size_t num_ids = static_cast<size_t>(input.num_tokens) * input.top_k;
  const auto* const ids = static_cast<const uint8_t*>(input.topk_ids);
  left_ids_.assign(ids, ids + num_ids * dtype_bits(input.id_dtype) / 8);
  left_weights_.assign(input.topk_weights, input.topk_weights + num_ids);
  left_ = input;
  left_->topk_ids = left_ids_.data();
  left_->topk_weights = left_weights_.data();
  left_->skip = split_.skip_deferred.data();
}

bool EngineLayer::run_deferred(const MoeInput& input) {
  if (!left_.has_value() || left_->hidden_states != input.hidden_states ||
      left_->num_tokens != input.num_tokens) {
    return false;
  }
  std::exception_ptr error;
  try {
    const int64_t values = int64_t{left_->num_tokens} * layer.config().hidden_size;
    left_->fp32_output = chain_->begin_share(values);
    layer.forward_deferred(*left_);
  } catch (...) {
    error = std::current_exception();
  }
  chain_->end_share(chain_position(), left_->num_tokens, std::move(error));
  left_.reset();
  return true;
}

uint64_t EngineLayer::submit(const MoeInput& input, std::shared_ptr<const void> alive) {
  CpuStream& stream = engine->stream();
  if (max_deferred() == 0) {
    // run_deferred() for the case that a link comes first
    return stream.submit([this, input, alive = std::move(alive)] {
      run(input);
      run_deferred(input);
    });
  }
  const uint64_t ticket = stream.submit([this, input, alive] { run(input); });
  const uint64_t deferred =
      stream.submit([this, input, alive = std::move(alive)] { run_deferred(input); });
  last_deferred_ticket_.store(deferred, std::memory_order_release);
  return ticket;
}

void EngineLayer::link(std::shared_ptr<LayerChain> chain, int position, int max_deferred) {
  if (left_.has_value()) layer.count_dropped_share();
  left_.reset();
  chain_ = std::move(chain);
  chain_position_.store(position, std::memory_order_relaxed);
  max_deferred_.store(max_deferred, std::memory_order_relaxed);
}

void link_layers(const std::vector<std::shared_ptr<EngineLayer>>& layers,
                 const std::vector<int>& max_deferred) {
  KT_CHECK(layers.size() == max_deferred.size(), "got " << layers.size() << " layers, but "
                                                        << max_deferred.size()
                                                        << " numbers of deferred experts.");
  if (layers.empty()) return;
  const EngineLayer& first = *layers.front();
  for (const std::shared_ptr<EngineLayer>& each : layers) {
    KT_CHECK(each->engine == first.engine, "layers " << first.layer.config().layer_idx << " and "
                                                     << each->layer.config().layer_idx
                                                     << " have different worker pools; layers of "
                                                        "one chain share one.");
    KT_CHECK(each->layer.config().hidden_size == first.layer.config().hidden_size,
             "layers of one chain must have one hidden_size, not "
                 << first.layer.config().hidden_size << " and " << each->layer.config().hidden_size
                 << ".");
  }
  for (const int count : max_deferred) {
    KT_CHECK(count >= 0, "max_deferred is " << count << "; it must be at least 0.");
  }
  first.engine->run([&] {
    const auto chain = std::make_shared<LayerChain>();
    for (size_t i = 0; i < layers.size(); ++i) {
      const bool has_successor = i + 1 < layers.size();
      layers[i]->link(chain, static_cast<int>(i), has_successor ? max_deferred[i] : 0);
    }
  });
}

int64_t register_layer(std::shared_ptr<EngineLayer> layer) {
  LayerTable& table = layer_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const int64_t handle = next_handle++;
  table.layers.emplace(handle, std::move(layer));
  return handle;
}

std::shared_ptr<EngineLayer> find_layer(int64_t handle) {
  LayerTable& table = layer_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.layers.find(handle);
  KT_CHECK(found != table.layers.end(), "there is no open MoE layer with handle "
                                            << handle
                                            << "; it was closed, or its process is another one.");
  return found->second;
}

void close_layer(int64_t handle) {
  std::shared_ptr<EngineLayer> layer;  // both are destroyed after the lock is free
  std::vector<PendingForward> dropped;
  LayerTable& table = layer_table();
  {
    const std::lock_guard<std::mutex> lock(table.mutex);
    const auto found = table.layers.find(handle);
    if (found == table.layers.end()) return;
    layer = std::move(found->second);
    table.layers.erase(found);
    layer->closed_ = true;
    for (auto entry = table.pending.begin(); entry != table.pending.end();) {
      if (entry->second.layer == layer) {
        dropped.push_back(std::move(entry->second));
        entry = table.pending.erase(entry);
      } else {
        ++entry;
      }
    }
  }
  for (const PendingForward& pending : dropped) wait_for_end(pending);
}

int64_t add_pending(PendingForward pending) {
  LayerTable& table = layer_table();
  {
    const std::lock_guard<std::mutex> lock(table.mutex);
    if (!pending.layer->closed_) {
      const int64_t ticket = next_ticket++;
      table.pending.emplace(ticket, std::move(pending));
      return ticket;
    }
  }
  // its output is written until then
  wait_for_end(pending);
  KT_CHECK(false, "layer " << pending.layer->layer.config().layer_idx
                           << " was closed while a forward was being submitted to it; close a "
                              "layer after its last submit has returned.");
}

PendingForward take_pending(int64_t ticket, std::string_view fetched_by) {
  LayerTable& table = layer_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.pending.find(ticket);
  KT_CHECK(found != table.pending.end(),
           "ticket " << ticket
                     << " was already fetched by sync, never given out, or its layer was closed.");
  KT_CHECK(found->second.fetched_by == fetched_by, "ticket " << ticket << " is not one for "
                                                             << fetched_by << "; give it to "
                                                             << found->second.fetched_by << ".");
  PendingForward pending = std::move(found->second);
  table.pending.erase(found);
  return pending;
}

}  // namespace kt
