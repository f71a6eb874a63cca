#include "engine/engine.h"

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
  int64_t next_handle = 1;
  int64_t next_ticket = 1;
};

LayerTable& layer_table() {
  static LayerTable* table =
      new LayerTable;  // never destroyed: a thread may still sync while the process exits
  return *table;
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
  stream_.reset();  // runs what is queued while the pool still stands
}

void Engine::run(std::function<void()> job) {
  stream_->run([this, &job] {
    const WorkerPool::CallerPin pin(*pool_);
    job();
  });
}

EngineLayer::EngineLayer(std::shared_ptr<Engine> layer_engine, const MoeConfig& config)
    : engine(std::move(layer_engine)),
      layer(config, engine->pool(), engine->scratch(), cpu_features().chosen) {}

void EngineLayer::run(const MoeInput& input) { layer.forward(input); }

bool EngineLayer::run_deferred(const MoeInput&) { return false; }

int EngineLayer::chain_position() const { return 0; }

int64_t register_layer(std::shared_ptr<EngineLayer> layer) {
  LayerTable& table = layer_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  table.layers.emplace(table.next_handle, std::move(layer));
  return table.next_handle++;
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
    for (auto entry = table.pending.begin(); entry != table.pending.end();) {
      if (entry->second.layer == layer) {
        dropped.push_back(std::move(entry->second));
        entry = table.pending.erase(entry);
      } else {
        ++entry;
      }
    }
  }
  for (const PendingForward& pending : dropped) {
    try {
      layer->engine->stream().wait(pending.stream_ticket);
    } catch (const std::exception&) {
      // the caller closed the layer instead of asking for the result: its error has no one to go to
    }
  }
}

int64_t add_pending(PendingForward pending) {
  LayerTable& table = layer_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  table.pending.emplace(table.next_ticket, std::move(pending));
  return table.next_ticket++;
}

PendingForward take_pending(int64_t ticket) {
  LayerTable& table = layer_table();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.pending.find(ticket);
  KT_CHECK(found != table.pending.end(),
           "ticket " << ticket
                     << " was already fetched by sync, never given out, or its layer was closed.");
  PendingForward pending = std::move(found->second);
  table.pending.erase(found);
  return pending;
}

}  // namespace kt
