// The bytes of packed weights: sizes and offsets, the same for every ISA. Quantization is in
// quantize.h.
//
// A matrix w [n, k] (n output, k input features) is cut into panels of 64 output columns. k is
// padded with zeros to padded_k, n to whole panels (codes, scales and compensation 0). A panel is
// one ascending stream of 64-byte lines:
//
//   int8  [padded_k / 4][64 columns][4 k] int8 codes; then int32 compensation[64] =
//         -128 * sum_k code; then fp32 scale[64]
//   bf16  [padded_k / 2][64 columns][2 k]
//   others, for each group g of group_size k (the last may be short): its codes, then its scales
//         (ScaleForm, [64] of each). kBlock, kBlockMin: before each 256 k their fp16 d[64] (and
//         e[64]). kColumn: fp32 t[64] at the panel's end. group_size 0: one group of padded_k.
//
// Codes of a group, by their bits (WeightFormatInfo::code; u = unsigned code):
//   4     [group / 8][64 columns][4 bytes], byte j of a column holding u of k + j in its low and of
//         k + 4 + j in its high nibble; int4, int4h, int4f: u = code + 8
//   8     int8h, int8f: [group / 4][64 columns][4 k] two's complement; fp8: [group / 4][16][4
//         columns][4 k] with each 16 bytes as k, k + 1 of the four columns, then k + 2, k + 3
//   5     for each 8 k the 4 lines of the low 4 bits, then one line of bits 4: for each 16 columns
//         two uint64, bit 4 c + j of the first that of column c at k + j, of the second at k + 4 +
//         j
//   6     for each 16 k the 8 lines of the low 4 bits, then 4 lines of bits 4 and 5: [64
//         columns][4 bytes], byte j of a column holding those of k + j, k + 4 + j, k + 8 + j and
//         k + 12 + j from its low bits on
//   3     for each 16 k 4 lines of bits 0 and 1 as above, then 2 lines of bits 2: for each 16
//         columns four uint64 as above, of k, k + 4, k + 8 and k + 12
//   2     for each 16 k 4 lines as above
//
// So each step of whole lines has four: line j holds columns 16j .. 16j + 15.
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

#include "base/weight_format.h"

namespace kt {

// Columns of a panel, and the bytes of one of its k-steps: four lines.
constexpr int kPackedColumns = 64;
constexpr int kPackedStepBytes = kPackedColumns * 4;

// Largest n and k: sizes in bytes (n * k * 2) stay below 2^63 and groups of k are ints.
constexpr int64_t kMaxMatrixSize = int64_t{1} << 30;

struct PackedLayout {
  WeightFormat format = WeightFormat::kInt8;
  int group_size = 0;    // k of one scale; 0: the whole row
  int max_rotation = 0;  // int8 and int4 only: largest rotation block; 0: not rotated

  // Versioned key: "int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "int4_n64k8_v1" (whole row),
  // "bf16_n64k2_v1", "int6kg16_n64k16_v1".
  std::string name() const;
  // Inverse of name(). Errors: kt::Error naming the string and the known forms.
  static PackedLayout parse(const std::string& name);

  // Errors of all sizes: kt::Error for n or k outside 1 .. 2^30.
  int64_t padded_k(int64_t k) const;     // multiple of 64, or 32 (bf16)
  int64_t num_panels(int64_t n) const;   // ceil(n / 64)
  int64_t panel_bytes(int64_t k) const;  // a multiple of 64
  int64_t matrix_bytes(int64_t n, int64_t k) const;
  int num_groups(int64_t k) const;            // scales of a row
  int effective_group_size(int64_t k) const;  // group_size, or padded_k for the whole row
  // Largest power of two that divides padded_k(k), at most max_rotation; 0 without rotation.
  int rotation_block(int64_t k) const;
  // Columns of k that share one scale of the activations beside it. Rotated weights, and those with
  // one scale a row: padded_k. Other groups: whole groups of together at least 128 k and whole
  // 64 k, since codes that are given cannot be rotated and one scale a row costs accuracy then
  // (docs/accuracy.md).
  int64_t activation_block(int64_t k) const;
  bool has_row_scales() const;  // whether that is padded_k for every k
  int num_activation_blocks(int64_t k) const;

  // Where a panel of k columns has its bytes: the codes from column `at` on (at a multiple of
  // step_k), the scales of a group, the d of a 256 k block, what is behind the last group.
  int64_t code_offset(int64_t at) const;
  int64_t scale_offset(int64_t k, int64_t group) const;
  int64_t block_offset(int64_t block) const;
  int64_t tail_offset(int64_t k) const;

  bool operator==(const PackedLayout&) const = default;
};

}  // namespace kt
