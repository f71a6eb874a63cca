// Matrices as they stand in checkpoints: their formats, and from them to panels without a loss, or
// to fp32. Quantizing is quantize.h's.
//
// A matrix w [n, k] (n output, k input features) is named by a source string and its parts, in this
// order; "scale" is fp32, bf16 or fp16 unless it says otherwise:
//
//   bf16, fp16, fp32    weight [n, k]
//   fp8_block<R>x<C>    weight e4m3 (or its bytes) [n, k]; scale fp32 or bf16 [ceil n/R, ceil k/C]
//   fp8_row             weight; scale fp32 or bf16 [n] or [n, 1]
//   mxfp8               weight; scale e8m0 [n, ceil k/32]
//   pack_quantized      weight int32 [n, ceil k/8] or uint8 [n, ceil k/2]; scale [n, groups]
//   gptq, gptq_v2       qweight int32 [k/8, n]; scales [groups, n]; qzeros int32 [groups, n/8]
//   awq                 qweight int32 [k, n/8]; qzeros int32 [groups, n/8]; scales [groups, n]
//   mxfp4               weight, two E2M1 a byte [n, k/2]; scale e8m0 [n, k/32]
//   nvfp4               weight [n, k/2]; scale e4m3 [n, k/16]; fp32 [1], a factor of all
//   gguf:<type>         blocks uint8 [n, bytes of a row]: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to
//                       Q6_K, IQ4_NL, IQ4_XS, MXFP4, BF16, F16, F32
//   kt_int8x<T>_rows    for each of T NUMA parts: bytes int8, flat; scale fp32, one a row of the
//   kt_int4x<T>_rows    part. Parts are ranges of rows (gate, up), or, with _columns, of columns
//                       (down)
//
// Nibbles are low first. The size of a group is k / groups, which must be whole.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "format/coded_panel.h"
#include "format/packed_layout.h"

namespace kt {

struct GgufType;

enum class SourceKind : uint8_t {
  kFloat,
  kFp8,
  kPackQuantized,
  kGptq,
  kAwq,
  kMxFp4,
  kNvFp4,
  kGguf,
  kKt,
};

// What a source string says.
struct SourceFormat {
  std::string name;
  SourceKind kind = SourceKind::kFloat;
  DType dtype = DType::kBFloat16;  // kFloat
  int64_t block_rows = 1;          // kFp8: under one scale
  int64_t block_columns = 0;       // kFp8; 0: the whole row
  bool e8m0 = false;               // kFp8: powers of two for scales
  int zero_offset = 0;             // kGptq: added to what is stored
  const GgufType* gguf = nullptr;  // kGguf, and floats of GGUF
  int bits = 8;                    // kKt
  int num_ranges = 1;              // kKt: NUMA parts
  bool by_columns = false;         // kKt

  // Errors: kt::Error naming the string and the known ones.
  static SourceFormat parse(const std::string& name);
  int num_parts() const;  // of one matrix
};

// A tensor of a checkpoint, contiguous. Not owned.
struct SourcePart {
  const void* data = nullptr;
  DType dtype = DType::kUint8;
  std::vector<int64_t> shape;
};

// A matrix whose parts have been checked: every byte that decoding reads is there.
struct SourceMatrix {
  SourceFormat format;
  std::vector<SourcePart> parts;
  int64_t n = 0;
  int64_t k = 0;
  // Format and group size of its codes and scales; groups of a size that no layout has are
  // possible. kBFloat16: floats.
  PackedLayout coded;
};

// Errors  kt::Error, one sentence: n or k that the format cannot have, a wrong number of parts, a
//         part of another type or shape, a stored zero point of 15 in gptq (not gptq_v2), which no
//         two readers agree on. No data is read but the zero points of gptq.
SourceMatrix open_source(const SourceFormat& format, std::vector<SourcePart> parts, int64_t n,
                         int64_t k);

// The layout that keeps codes and scales as they are; bf16 for floats. with_zeros: one with zero
// points for gptq that needs none, for a layer of which other matrices do.
// Errors  kt::Error: no layout has such groups, or fp16 such scales (zero points with bf16 or fp32
//         scales).
PackedLayout source_layout(const SourceMatrix& matrix, bool with_zeros = false);

// Whether panels of `layout` are quantized anew from the values: rotated ones, bf16, and int8 and
// int4 from floats. Others keep the codes.
bool quantizes(const SourceMatrix& matrix, const PackedLayout& layout);

// Errors  kt::Error: the layout neither quantizes nor keeps these codes, scales and groups.
void check_source_layout(const SourceMatrix& matrix, const PackedLayout& layout);

// The values of rows first .. first + count - 1, count <= 64: w [count, k] fp32. `first` is a
// multiple of 8, whose words awq has.
void decode_rows(const SourceMatrix& matrix, int64_t first, int64_t count, float* w);

// Some rows of a matrix and where in a panel they go.
struct SourceRows {
  const SourceMatrix* matrix = nullptr;
  int64_t first = 0;
  int64_t count = 0;
  int column = 0;
};
// Rows 64p.. of a matrix; gate rows 32p.. in columns 0-31 and up rows 32p.. in 32-63.
std::vector<SourceRows> matrix_source_rows(const SourceMatrix& matrix, int64_t p);
std::vector<SourceRows> w13_source_rows(const SourceMatrix& gate, const SourceMatrix& up,
                                        int64_t p);

// One panel of these rows, which check_source_layout() has taken; the other columns are padding.
// Errors   PanelError naming the row of the panel and the column or group: a value or scale that is
//          not finite, or that the layout's type has not. dst is then undefined.
// Threads  re-entrant.
void pack_source_panel(const PackedLayout& layout, const std::vector<SourceRows>& rows,
                       uint8_t* dst);

}  // namespace kt
