// The bytes of packed weights: sizes and offsets, the same for every ISA. Quantization is in
// quantize.h.
//
// A matrix w [n, k] (n output, k input features) is cut into panels of 64 output columns. k is
// padded with zeros to padded_k, n to whole panels (codes, scales and compensation 0). A panel is
// one ascending stream of 64-byte lines:
//
//   int8  [padded_k / 4][64 columns][4 k] int8 codes; then int32 compensation[64] =
//         -128 * sum_k code; then fp32 scale[64]
//   int4  for each group g of group_size k (the last may be short): [group / 8][64 columns]
//         [4 bytes], byte j of a column holding code k + j in its low and code k + 4 + j in its
//         high nibble, stored unsigned as code + 8; then bf16 scale[64] of the group.
//         group_size 0: one group of padded_k.
//   bf16  [padded_k / 2][64 columns][2 k]
//
// So each k-step is four lines: line j holds columns 16j .. 16j + 15.
//
// gate and up are merged into w13: panel p holds gate rows 32p .. 32p + 31 in columns 0-31 and up
// rows 32p .. 32p + 31 in columns 32-63, so SiLU(gate) * up is finished inside a panel. down (w2)
// has its rows in order.
//
// Rotation: columns of w are multiplied by a block-diagonal Hadamard matrix before quantization,
// with blocks of rotation_block(k): activations are rotated by the same one. rotation 0: none.
#pragma once

#include <cstdint>
#include <string>

#include "base/dtype.h"

namespace kt {

// Columns of a panel, and the bytes of one of its k-steps: four lines.
constexpr int kPackedColumns = 64;
constexpr int kPackedStepBytes = kPackedColumns * 4;

struct PackedLayout {
  DType code = DType::kInt8;  // kInt8, kInt4 or kBFloat16
  int group_size = 0;         // int4 only; 0: the whole row
  int max_rotation = 0;       // largest rotation block; 0: not rotated

  // Versioned key: "int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "int4_n64k8_v1" (whole row),
  // "bf16_n64k2_v1".
  std::string name() const;
  // Inverse of name(). Errors: kt::Error naming the string and the known forms.
  static PackedLayout parse(const std::string& name);

  // Errors of all sizes: kt::Error for n or k outside 1 .. 2^30.
  int64_t padded_k(int64_t k) const;     // multiple of 64 (int8, int4) or 32 (bf16)
  int64_t num_panels(int64_t n) const;   // ceil(n / 64)
  int64_t panel_bytes(int64_t k) const;  // a multiple of 64
  int64_t matrix_bytes(int64_t n, int64_t k) const;
  int num_groups(int64_t k) const;            // int4: groups of a row; else 1
  int effective_group_size(int64_t k) const;  // group_size, or padded_k for the whole row
  // Largest power of two that divides padded_k(k), at most max_rotation; 0 without rotation.
  int rotation_block(int64_t k) const;

  bool operator==(const PackedLayout&) const = default;
};

}  // namespace kt
