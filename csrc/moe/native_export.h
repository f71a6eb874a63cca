// One expert's codes and scales in the form that SGLang's fork keeps them in on a GPU, cut for the
// ranks of a tensor-parallel group.
#pragma once

#include <cstdint>

#include "format/coded_panel.h"
#include "moe/expert_store.h"

namespace kt {

// What a row of n features and k columns is written as:
//
//   layout           weights                          scales
//   int4g<g>         [n, k / 2], code + 8, low first  bf16 [n, k / g]
//   fp4g32           [n, k / 2] E2M1, low first       bf16 [n, k / 32]
//   fp8g32           [n, k] e4m3                      uint8 e8m0 [n, k / 32]
//   fp8fg128         [n, k] e4m3                      fp32 [ceil(n / 128), ceil(k / 128)]
//   fp8f             [n, k] e4m3                      fp32 [n]
class NativeForm {
 public:
  // Errors   kt::Error: layouts of w13 and w2 that differ or have no such form, or ranks that would
  //          cut a group, or a block of 128 rows or columns.
  NativeForm(const MoeConfig& config, int64_t ranks);

  // fp8fg128 is also how blocks of fewer rows are kept, which one scale for 128 rows cannot stand
  // for: reads all scales of such an expert, which takes less than its write, and writes nothing.
  //
  // Errors   kt::Error naming the first row whose scale is not that of its block.
  void check_blocks(const ExpertStore& store, int expert) const;

  int64_t weight_bytes(int64_t n, int64_t k) const;
  int64_t scale_bytes(int64_t n, int64_t k) const;

  // Writes columns [begin, begin + count) of row `column` of the panel as row `row` of a matrix of
  // `count` columns.
  void write_row(const CodedPanel& panel, int column, int64_t begin, int64_t count, int64_t row,
                 uint8_t* weights, uint8_t* scales) const;

 private:
  bool has_nibbles() const;
  bool has_blocks() const;  // 128 rows under one scale
  void write_scales(const CodedPanel& panel, int column, int64_t begin, int64_t count, int64_t row,
                    uint8_t* scales) const;

  PackedLayout layout_;
};

}  // namespace kt
