// One pass of up to a few thousand tokens through one layer: buffers, phases and who computes what.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "moe/activation_rows.h"
#include "moe/moe_layer.h"
#include "moe/moe_scratch.h"
#include "moe/work_split.h"

namespace kt {

// Up to this many activation values (tokens x hidden, rows x intermediate) each worker quantizes
// all of them itself instead of sharing the work and paying a barrier: 16384 values take about 8
// us, less than one DeepSeek-V3 token waits for memory on any socket.
constexpr int64_t kRedundantValues = 16384;

// Panels that one worker gave to kernels, by projection. A cache line each: counting disturbs no
// other worker.
struct alignas(64) PanelReads {
  std::atomic<uint64_t> panels[2] = {};
};

// output = addend, rounded, or zeros without one: a pass whose tokens are all computed elsewhere.
void store_addend(const RowwiseOps& ops, const MoeInput& input, int64_t hidden_size);

// Phases, a barrier between each:
//   few rows   1. quantize tokens (every worker all of them, into its own buffer); w13 panels,
//                 SiLU and multiply
//              2. quantize intermediate rows (the same way); w2 panels, weighted sum
//   many rows  1. quantize tokens (shared)
//              2. w13 panels, SiLU and multiply; a worker that has all panels of an expert
//                 quantizes its rows as well, while its cache holds them
//              3. quantize the rows left (shared)
//              4. w2 panels, weighted sum
//
// Where a kernel works in AMX tiles, whoever quantizes a row packs it as well (RowPacking): in the
// first phase of many rows one for each expert of a token.
//
// A worker owns whole output columns of w2 and walks the experts in ascending order: the sum needs
// no partial buffer, no atomics, and has one order for any number of threads.
class ForwardPass {
 public:
  // reads [pool.num_threads()] are added to.
  ForwardPass(const ExpertStore& store, WorkerPool& pool, const LayerKernels& kernels,
              const Routing& routing, MoeScratch& scratch, const MoeInput& input,
              std::vector<PanelReads>& reads);
  void run();

 private:
  // The private memory of one worker.
  struct WorkerBuffers {
    float* tile = nullptr;        // [kRowBlock, 64]
    float* row = nullptr;         // one fp32 row
    uint8_t* expanded = nullptr;  // one expanded panel
    float* columns = nullptr;     // [panels_together(), num_tokens, 64] sums of w2 panels
    ActivationRows tokens;        // few rows only
    ActivationRows rows;
    PanelReads* reads = nullptr;
  };

  int64_t panel_sums() const;  // of one w2 panel
  int64_t panels_together() const;
  WorkerBuffers buffers(const Worker& worker) const;
  int64_t rows_bytes(int64_t rows, Projection projection) const;
  ActivationRows rows_at(uint8_t* base, int64_t rows, Projection projection) const;
  int64_t expanded_panel_bytes(Projection projection) const;

  // Gives every expert whose kernel works in tiles its place in the packed buffers, behind those
  // before it and rounded up to whole tiles. None with few rows: they take the other kernels.
  void place_packed_rows();
  const GemmKernel& kernel_of(Projection projection, int64_t expert_pos) const;
  // Where routing row r of the expert begins, as RowPacking::pack_row wants it.
  uint8_t* packed_row(Projection projection, int64_t expert_pos, int64_t r) const;
  // Packs row `source` of `rows` as routing row r of the expert, if its kernel works in tiles.
  void pack_row(Projection projection, int64_t expert_pos, int64_t r, int64_t source,
                const ActivationRows& rows) const;
  // Packs every row of w13 whose token is in `part` of the quantized tokens.
  void pack_tokens(IndexRange part) const;

  void quantize_token(int64_t token, float* row, const ActivationRows& out) const;
  // Row `source` of the intermediate as row `r` of shared_rows_, and packed if its expert's are.
  void quantize_expert_row(int64_t expert_pos, int64_t r, int64_t source, float* row) const;
  // Row `source` of the intermediate as row `row_idx` of `out`.
  void quantize_intermediate(int64_t row_idx, int64_t source, float* row,
                             const ActivationRows& out) const;
  void quantize(float* row, int64_t row_idx, Projection projection,
                const ActivationRows& out) const;

  template <typename Consume>
  void multiply_panel(Projection projection, int64_t expert_pos, int64_t p,
                      const uint8_t* next_panel, const ActivationRows& rows,
                      const WorkerBuffers& mine, Consume&& consume) const;
  // Notes for each worker the experts, by position in the routing, whose w13 panels all fall to it.
  // Each in turn uses the intermediate rows from those of the first on, so the writes stay in the
  // cache. None with several nodes, where a node has a share of the columns, and with few rows.
  void find_whole_experts();
  IndexRange rows_of(IndexRange experts) const;
  void compute_w13(const Worker& worker, const WorkerBuffers& mine, const ActivationRows& tokens);
  // The worker's even part of the rows of all other experts.
  void quantize_rows_left(const Worker& worker, const WorkerBuffers& mine);
  void compute_w2(const Worker& worker, const WorkerBuffers& mine, const ActivationRows& rows);
  void compute_w2_panels(IndexRange panels, const WorkerBuffers& mine,
                         const ActivationRows& rows) const;
  void store_columns(float* columns, int64_t p) const;

  const ExpertStore& store_;
  WorkerPool& pool_;
  const LayerKernels& kernels_;
  const Routing& routing_;
  MoeScratch& scratch_;
  const MoeInput& input_;
  std::vector<PanelReads>& reads_;
  const bool few_rows_;
  ActivationRows shared_tokens_;
  ActivationRows shared_rows_;
  uint8_t* packed_[2] = {};        // by projection; null: no expert's rows are packed
  float* intermediate_ = nullptr;  // [rows, intermediate stride]
  int64_t intermediate_stride_ = 0;
  int64_t rows_left_ = 0;  // of experts that are whole for no worker
};

}  // namespace kt
