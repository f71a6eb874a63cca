// The codes and scales of one panel in the open: what sources are decoded to, and what panels are
// packed from. The bytes of panels are packed_layout.h's.
#pragma once

#include <cstdint>
#include <vector>

#include "format/packed_layout.h"

namespace kt {

// The 64 rows (output features) of one panel of a format with codes.
//
// Shapes    codes [64 rows, code_stride], of which padded_k are used: unsigned codes, those of int8
//           + 128, those of fp8 as they are. What stands beside a group is [groups, 64 rows], what
//           stands beside 256 k [blocks, 64 rows]; what the format's ScaleForm has not is empty.
// Lifetime  a panel may be used again and again; it keeps its memory.
struct CodedPanel {
  // Makes room for k columns, all of them zeros. The group size may be any here.
  void reset(const PackedLayout& layout, int64_t k);

  uint8_t* row(int column) { return codes.data() + column * code_stride; }
  const uint8_t* row(int column) const { return codes.data() + column * code_stride; }

  PackedLayout layout;
  int64_t k = 0;
  int64_t padded_k = 0;
  int64_t group_size = 0;   // padded_k for the whole row
  int64_t code_stride = 0;  // an odd number of lines, so that rows share no set of a cache
  std::vector<uint8_t> codes;
  std::vector<float> scale;          // s, of all but kBlock and kBlockMin
  std::vector<uint8_t> zero;         // kFp16Zero
  std::vector<float> minimum;        // m of kFp16Min
  std::vector<uint8_t> sub_scale;    // c of kBlock (int8) and kBlockMin
  std::vector<uint8_t> sub_minimum;  // b of kBlockMin
  std::vector<float> block_scale;    // d of kBlock and kBlockMin
  std::vector<float> block_minimum;  // e of kBlockMin
  std::vector<float> column_scale;   // t [64] of kColumn
};

// The values of k columns of one row, as base/weight_format.h has them: w [k] fp32, each rounded
// once. The layout's rotation is not undone.
void coded_values(const CodedPanel& panel, int column, float* w);

}  // namespace kt
