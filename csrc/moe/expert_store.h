// The packed weights of one layer, cut over NUMA nodes. Owns its memory; no arithmetic but
// quantization at load.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "format/quantize.h"
#include "format/source.h"
#include "moe/moe_config.h"
#include "system/numa_arena.h"
#include "system/worker_pool.h"

namespace kt {

// Every matrix is cut by its output columns in whole panels over the nodes of the pool, in
// proportion to their threads: nothing is summed across nodes and every byte is stored once.
//
// Threads   load_* by one thread at a time, before or between forwards; panel(), and what tells how
//           much is loaded, from any thread.
// Lifetime  the pool must outlive the store.
class ExpertStore {
 public:
  // Allocates (not touching) the memory of all experts of config.expert_ids and reserved_ids. The
  // reserved ones come last, so that no huge page of theirs is touched by the others.
  ExpertStore(const MoeConfig& config, WorkerPool& pool);

  const MoeConfig& config() const { return config_; }
  bool has(int expert) const { return slot_[expert] >= 0; }  // lives here
  bool loaded(int expert) const { return slot_[expert] >= 0 && loaded_[slot_[expert]]; }
  bool all_loaded() const;  // all of config.expert_ids

  // Rows of one expert in a float type: gate, up [intermediate_size, hidden_size], down
  // [hidden_size, intermediate_size], row-major. Quantizes and packs on the pool, each panel on the
  // node that owns it.
  //
  // Errors  (all of load_*) kt::Error for an expert without a place here, or twice in one
  //         call. load(): layouts that keep the codes of files.
  struct Source {
    int expert;
    const void* gate;
    const void* up;
    const void* down;
    DType dtype;
  };
  void load(const std::vector<Source>& sources);

  // The matrices of one expert as a checkpoint has them, sizes as above. Kept as they are, or
  // decoded and quantized, as the layouts have it (format/source.h); what they cannot become is
  // refused before any expert is touched.
  struct Encoded {
    int expert;
    SourceMatrix gate;
    SourceMatrix up;
    SourceMatrix down;
  };
  void load_sources(const std::vector<Encoded>& sources);

  // Packed bytes of one expert (matrix_bytes of w13 and of w2).
  struct Packed {
    int expert;
    const uint8_t* w13;
    const uint8_t* w2;
  };
  void load_packed(const std::vector<Packed>& sources);
  // Inverse of load_packed, for one expert.
  void export_packed(int expert, uint8_t* w13, uint8_t* w2) const;

  // Biases of one expert: gate, up [intermediate_size], down [hidden_size]. They are added to the
  // sums of w13 before the activation and to those of w2 before the weight of the slot, and stay
  // when weights are loaded again. An expert that was given none has none.
  //
  // Errors  kt::Error for an expert without a place here.
  struct Biases {
    int expert;
    const float* gate;
    const float* up;
    const float* down;
  };
  void load_biases(const std::vector<Biases>& sources);
  // 64 values in the order of the panel's columns, or null.
  const float* bias(Projection projection, int expert, int64_t p) const;

  int64_t num_panels(Projection projection) const;
  int64_t panel_bytes(Projection projection) const;
  int64_t padded_k(Projection projection) const;
  // Panels owned by node `node` (position in the pool's plan).
  IndexRange node_panels(Projection projection, int node) const;
  const uint8_t* panel(Projection projection, int expert, int64_t p) const;

  // The memory itself, for the read probe.
  const std::vector<NumaArena>& arenas() const { return arenas_; }
  // Of the experts of config.expert_ids and the reserved ones that are loaded.
  uint64_t bytes() const;
  PageReport pages() const;

 private:
  template <typename Fill>
  void fill_panels(const std::vector<int>& experts, Fill&& fill);
  uint8_t* mutable_panel(Projection projection, int slot, int64_t p) const;
  void check_expert(int expert) const;

  MoeConfig config_;
  WorkerPool& pool_;
  std::vector<int> slot_;                  // expert -> slot, -1: not here
  std::vector<std::atomic<bool>> loaded_;  // by slot
  std::vector<NumaArena> arenas_;          // one for each projection and node
  std::vector<uint8_t*> panel0_[2];        // by projection and panel: where slot 0 has it
  std::vector<int64_t> slot_stride_[2];    // by projection and panel: bytes from slot to slot
  // By projection and slot: [panels][64], empty without biases; no slots in a layer without any.
  std::vector<std::vector<float>> biases_[2];
};

}  // namespace kt
