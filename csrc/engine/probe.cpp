#include "engine/probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "base/check.h"
#include "base/cpu_features.h"

namespace kt {
namespace {

double seconds_of(const std::chrono::steady_clock::duration& elapsed) {
  return std::chrono::duration<double>(elapsed).count();
}

// The result of a probe must be used, or the compiler may leave the probe out.
std::atomic<uint64_t> probe_sink{0};

// Operations a second of all workers on registers.
double peak_of(EngineLayer& layer, DType multiplied, int milliseconds) {
  const Probes probes = select_probes(multiplied, cpu_features().chosen);
  // 2e9 multiply-accumulate instructions a second is the order of any core; the exact time does not
  // matter
  const int64_t iterations = std::max<int64_t>(int64_t{milliseconds} * 80'000, 1);
  WorkerPool& pool = layer.engine->pool();
  double seconds = 0;
  layer.engine->run([&] {
    const auto body = [&](const Worker&) {
      probe_sink.fetch_xor(probes.run_peak(iterations), std::memory_order_relaxed);
    };
    const auto start = std::chrono::steady_clock::now();
    pool.run({body});
    seconds = seconds_of(std::chrono::steady_clock::now() - start);
  });
  return static_cast<double>(iterations * probes.operations_per_iteration) * pool.num_threads() /
         seconds;
}

}  // namespace

double probe_read(EngineLayer& layer) {
  const ReadProbeFn read =
      select_probes(DType::kInt8, cpu_features().chosen).read;  // reads are the same for all
  const std::vector<NumaArena>& arenas = layer.layer.store().arenas();
  KT_CHECK(!arenas.empty(),
           "layer " << layer.layer.config().layer_idx << " has no experts on the CPU to read.");
  WorkerPool& pool = layer.engine->pool();
  double seconds = 0;
  uint64_t bytes = 0;
  layer.engine->run([&] {
    const auto body = [&](const Worker& worker) {
      uint64_t sum = 0;
      for (const NumaArena& arena : arenas) {
        const int node = pool.plan().nodes[worker.node].id;
        const bool mine = arena.node_id() < 0 || arena.node_id() == node;
        if (!mine) continue;
        const bool shared = arena.node_id() < 0;
        const IndexRange lines = even_part(static_cast<int64_t>(arena.size()) / 64,
                                           shared ? worker.index : worker.index_in_node,
                                           shared ? pool.num_threads() : worker.node_threads);
        sum ^= read(arena.data() + lines.begin * 64, lines.size() * 64);
      }
      probe_sink.fetch_xor(sum, std::memory_order_relaxed);
    };
    const auto start = std::chrono::steady_clock::now();
    pool.run({body});
    seconds = seconds_of(std::chrono::steady_clock::now() - start);
  });
  for (const NumaArena& arena : arenas) bytes += arena.size();
  return static_cast<double>(bytes) / seconds;
}

double probe_peak(EngineLayer& layer, int milliseconds) {
  DType w13 = DType::kInt8, w2 = DType::kInt8;
  layer.engine->run([&] {
    w13 = layer.layer.multiplied(Projection::kW13);
    w2 = layer.layer.multiplied(Projection::kW2);
  });
  const double peak = peak_of(layer, w13, milliseconds);
  if (w13 == w2) return peak;
  // two of three operations are gate's and up's
  return 3 / (2 / peak + 1 / peak_of(layer, w2, milliseconds));
}

double probe_dispatch(Engine& engine) {
  constexpr int kRounds = 2001;
  std::vector<double> nanoseconds(kRounds);
  engine.run([&] {
    const auto nothing = [](const Worker&) {};
    for (double& ns : nanoseconds) {
      const auto start = std::chrono::steady_clock::now();
      engine.pool().run({nothing});
      ns = seconds_of(std::chrono::steady_clock::now() - start) * 1e9;
    }
  });
  std::nth_element(nanoseconds.begin(), nanoseconds.begin() + kRounds / 2, nanoseconds.end());
  return nanoseconds[kRounds / 2];
}

}  // namespace kt
