// One row of the kernel table at a time beside the machine's limits: what
// `python -m kt_kernel.bench kernels` prints.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "format/packed_layout.h"
#include "kernels/registry.h"
#include "system/numa_arena.h"

namespace kt {

// Random packed panels of one layout, far more than a cache holds, random activations, and the
// clock. All rates are per second of CPU time of the calling thread, so other processes cost
// bandwidth but not turns.
//
// Threads  one at a time.
// Errors   kt::Error for the name of a row that is not among kernels(), m outside 1 .. max_rows.
class KernelBench {
 public:
  // `buffer_bytes` of panels with k columns of k.
  //
  // Errors  kt::Error for k that is no multiple of 64 up to kMaxIntegerK, no rows, or a buffer of
  //         fewer than two panels.
  KernelBench(const PackedLayout& layout, int64_t k, int max_rows, int64_t buffer_bytes);

  // The rows for these weights and groups that may run here: the host has their features and
  // KT_FORCE_ISA leaves them.
  std::vector<std::string> kernels() const;
  int64_t panel_bytes() const { return panel_bytes_; }

  // Whether the kernel gives what the reference row gives: the same bits for integer codes, within
  // the roundings where bf16 is multiplied.
  bool matches(const std::string& kernel, int m);
  // Packed bytes a second of a walk through the buffer, each panel multiplied by m rows.
  double stream_rate(const std::string& kernel, int m);
  // Operations (two a multiply-accumulate) a second on one panel again and again.
  double hot_rate(const std::string& kernel, int m);
  // The limits of the kernel's features: bytes a second of reading the buffer, operations a second
  // on registers.
  double read_rate(const std::string& kernel);
  double peak_rate(const std::string& kernel) const;

 private:
  struct Activations {
    int64_t stride = 0;  // values, of each of:
    NumaArena int8, uint8, bf16;
    std::vector<float> scale;
    std::vector<int32_t> group_sum;
    std::vector<int32_t> row_idx;
  };

  struct Packed {
    const GemmKernel* kernel = nullptr;
    NumaArena rows;
  };

  const GemmKernel& find(const std::string& name) const;
  // The same, checked for m rows.
  const GemmKernel& find(const std::string& name, int m) const;
  void fill_panels();
  void fill_activations();
  void multiply(const GemmKernel& kernel, int m, int64_t panel, float* c);
  const void* activations_of(DType dtype) const;
  // All rows as the kernel's packing wants them, made at the first call.
  const NumaArena& packed_of(const GemmKernel& kernel);
  // Of a result of a kernel that rounds.
  double rounding_bound(const GemmKernel& kernel) const;
  double activation_rms(bool is_bf16) const;
  int64_t panels_of_a_stretch(const GemmKernel& kernel, int m);
  int64_t next_stretch(int64_t panels);
  const uint8_t* panel(int64_t index) const { return panels_.data() + index * panel_bytes_; }

  const PackedLayout layout_;
  const int64_t k_;
  const int max_rows_;
  const int64_t panel_bytes_;
  const int64_t num_panels_;
  const int group_size_;
  const int a_block_;
  const int num_blocks_;
  std::vector<const GemmKernel*> kernels_;
  const GemmKernel* reference_ = nullptr;
  double largest_rms_ = 0;  // of the weights of a column
  NumaArena panels_;
  NumaArena expanded_;
  Activations a_;
  std::deque<Packed> packed_;
  float* c_ = nullptr;  // [max_rows, 64] fp32 in:
  NumaArena c_arena_;   // on lines of a cache as a worker's tile is: else each store meets two
  std::vector<float> expected_;  // the same
  int64_t cursor_ = 0;           // the panel where the next stretch begins
};

}  // namespace kt
