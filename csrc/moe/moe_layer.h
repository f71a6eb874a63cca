// One MoE layer on one machine, synchronous: routing, per-expert choice of kernel, phases on the
// pool.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "moe/expert_store.h"
#include "moe/layer_kernels.h"
#include "moe/routing.h"
#include "moe/tile_check.h"

namespace kt {

// One forward. hidden_states and output [num_tokens, hidden_size] in `dtype` (kBFloat16, kFloat16
// or kFloat32), topk_ids and topk_weights as in route().
struct MoeInput {
  const void* hidden_states = nullptr;
  DType dtype = DType::kBFloat16;
  const void* topk_ids = nullptr;
  DType id_dtype = DType::kInt64;
  const float* topk_weights = nullptr;
  int num_tokens = 0;
  int top_k = 0;
  const uint8_t* skip = nullptr;  // [num_experts], experts computed elsewhere; may be null
  // [num_tokens, hidden_size], added to the sum before it is rounded; may be null
  const float* addend = nullptr;
  void* output = nullptr;
  float* fp32_output = nullptr;  // if set, the sum goes here unrounded and output is not used
};

// Counters of one layer since its construction; readable while it runs.
struct MoeCounters {
  uint64_t forwards = 0;
  uint64_t tokens = 0;
  uint64_t rows = 0;            // (token, expert) pairs computed
  uint64_t weight_bytes = 0;    // packed bytes of the distinct experts of each forward
  uint64_t read_bytes = 0;      // packed bytes of the panels that kernels were given
  uint64_t barriers = 0;        // of the pool, in passes: 2 or 4 each (forward_pass.h)
  uint64_t busy_ns = 0;         // wall time inside forward() and forward_deferred()
  uint64_t deferred_rows = 0;   // those of `rows` that forward_deferred() computed
  uint64_t dropped_shares = 0;  // deferred shares of another pass that were not added here
  // [num_experts] ids seen by forward(), whoever computed them; -1 is none of them
  std::vector<int64_t> expert_counts;
};

class MoeScratch;

// output[t] = sum over slots s with topk_ids[t, s] here, in ascending (expert, slot) order:
//               topk_weights[t, s] * (down_e activation(gate_e x_t + b, up_e x_t + b) + b)
//             + addend[t], last and in fp32; b the biases of an expert that has some
//
// Bits     the same input gives the same output for any thread and node count; for integer
//          layouts for any batch composition too.
// Errors   kt::Error naming the layer: ids out of range, an expert that was not loaded.
// Threads  forward() by one thread at a time (the CPU stream's); counters() from any. Counting
//          neither locks nor allocates.
// Memory   scratch is shared by all layers of a pool and grows to the largest pass seen: a batch
//          is cut into passes of at most 4096 tokens and 32768 rows.
class MoeLayer {
 public:
  MoeLayer(const MoeConfig& config, WorkerPool& pool, std::shared_ptr<MoeScratch> scratch,
           IsaSet isa);
  ~MoeLayer();

  const MoeConfig& config() const { return store_.config(); }
  ExpertStore& store() { return store_; }
  // Whether its kernels compile code for its sizes, on each thread that runs them.
  // prepare_kernels() does so for the workers of the pool, its caller among them; called as
  // forward() is.
  bool compiles_kernels() const;
  void prepare_kernels();
  // Whether check_tiles() can have something to check: not on a host without AMX. From any thread.
  bool has_tiles() const { return (isa_ & (kIsaAmxInt8 | kIsaAmxBf16)) != 0; }
  // Once a process for each kernel in tiles, on the first layer that has an expert for it: see
  // moe/tile_check.h. Called as forward() is, with experts loaded. No text where there was nothing
  // to check.
  TileReport check_tiles();
  void forward(const MoeInput& input);
  // The rest of a forward whose first part skipped some experts: counts rows and time only.
  void forward_deferred(const MoeInput& input);
  // Throws kt::Error if `expert` cannot be computed here: not on the CPU, or never loaded.
  void check_expert(int expert) const;
  void count_dropped_share();
  // What the kernel for an expert with many rows multiplies; as forward() is called.
  DType multiplied(Projection projection) const;
  MoeCounters counters() const;
  std::string explain() const;  // the kernels in use

 private:
  struct Counters;
  uint64_t compute(const MoeInput& input);
  uint64_t compute_pass(const MoeInput& pass, uint64_t& weight_bytes);
  void count_ids(const MoeInput& input);
  // After a verdict on kernels in tiles: what they left.
  void select_again();

  IsaSet isa_;
  uint64_t verdicts_;     // at the selection
  LayerKernels kernels_;  // before the store: a choice that is refused allocates nothing
  ExpertStore store_;
  WorkerPool& pool_;
  std::shared_ptr<MoeScratch> scratch_;
  Routing routing_;
  std::unique_ptr<Counters> counters_;
};

// Buffers of a forward, reused by all layers of a pool.
std::shared_ptr<MoeScratch> make_moe_scratch();

}  // namespace kt
