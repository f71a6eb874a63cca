#include "format/source.h"

#include <algorithm>
#include <memory>

#include "base/check.h"
#include "format/quantize.h"
#include "format/source_decoders.h"

namespace kt {
namespace {

// Sizes of the same meaning for every layout: 0 and what is larger are the whole row.
int64_t group_of(const PackedLayout& layout, int64_t k) {
  return layout.group_size == 0 ? k : std::min<int64_t>(layout.group_size, k);
}

bool is_plain(ScaleForm scales) {
  return scales == ScaleForm::kRow || scales == ScaleForm::kBf16 || scales == ScaleForm::kFp16 ||
         scales == ScaleForm::kFp32;
}

// Whether the same codes and scales can stand in `layout`; a scale that its type has not is found
// when it is packed.
bool keeps(const SourceMatrix& matrix, const PackedLayout& layout) {
  const WeightFormatInfo& from = format_info(matrix.coded.format);
  const WeightFormatInfo& to = format_info(layout.format);
  if (layout.max_rotation != 0 || from.scales == ScaleForm::kNone || from.code != to.code ||
      group_of(matrix.coded, matrix.k) != group_of(layout, matrix.k)) {
    return false;
  }
  const bool has_zeros =
      matrix.format.kind == SourceKind::kGptq || matrix.format.kind == SourceKind::kAwq;
  return from.scales == to.scales || (is_plain(from.scales) && is_plain(to.scales)) ||
         (has_zeros && to.scales == ScaleForm::kFp16Zero);
}

void decode(const SourceRows& rows, CodedPanel* panel) {
  const SourceMatrix& matrix = *rows.matrix;
  switch (matrix.format.kind) {
    case SourceKind::kFloat: break;  // no codes
    case SourceKind::kFp8: return decode_fp8(matrix, rows, panel);
    case SourceKind::kPackQuantized: return decode_pack_quantized(matrix, rows, panel);
    case SourceKind::kGptq: return decode_gptq(matrix, rows, panel);
    case SourceKind::kAwq: return decode_awq(matrix, rows, panel);
    case SourceKind::kMxFp4:
    case SourceKind::kNvFp4: return decode_fp4(matrix, rows, panel);
    case SourceKind::kGguf: return decode_gguf(matrix, rows, panel);
    case SourceKind::kKt: return decode_kt(matrix, rows, panel);
  }
}

// The values of such rows, which are in a panel of codes, row by row.
void panel_values(const CodedPanel& panel, const SourceRows& rows, float* w) {
  for (int64_t i = 0; i < rows.count; ++i)
    coded_values(panel, rows.column + static_cast<int>(i), w + i * panel.k);
}

const uint8_t* float_row(const SourceMatrix& matrix, int64_t row) {
  const int64_t row_bytes = matrix.k * dtype_bits(matrix.format.dtype) / 8;
  return static_cast<const uint8_t*>(matrix.parts[0].data) + row * row_bytes;
}

}  // namespace

PackedLayout source_layout(const SourceMatrix& matrix, bool with_zeros) {
  PackedLayout layout = matrix.coded;
  if (with_zeros && matrix.format.kind == SourceKind::kGptq) layout.format = WeightFormat::kInt4Z;
  try {
    layout.name();
  } catch (const Error& error) {
    KT_CHECK(false, matrix.format.name << " weights of this checkpoint have no layout that keeps "
                                       << "them: " << error.what()
                                       << "; choose a method that quantizes anew");
  }
  if (layout.format == WeightFormat::kInt4Z) {
    const SourcePart& scales = matrix.parts[matrix.format.kind == SourceKind::kGptq ? 1 : 2];
    const int64_t count = scales.dtype == DType::kFloat16 ? 0 : scales.shape[0] * scales.shape[1];
    for (int64_t i = 0; i < count; ++i) {
      const float scale = float_at(scales, i);
      KT_CHECK(fp16_to_float(float_to_fp16(scale)) == scale,
               matrix.format.name << " weights with zero points keep fp16 scales, and the "
                                  << dtype_name(scales.dtype) << " scale " << scale << " of row "
                                  << i % matrix.n
                                  << " is no number of fp16; choose a method that quantizes anew");
    }
  }
  return layout;
}

bool quantizes(const SourceMatrix& matrix, const PackedLayout& layout) {
  const bool is_float = matrix.format.kind == SourceKind::kFloat;
  const bool is_int = layout.format == WeightFormat::kInt8 || layout.format == WeightFormat::kInt4;
  return layout.format == WeightFormat::kBFloat16 || layout.max_rotation != 0 ||
         (is_float && is_int);
}

void check_source_layout(const SourceMatrix& matrix, const PackedLayout& layout) {
  const std::string wanted = layout.name();
  if (quantizes(matrix, layout) || keeps(matrix, layout)) return;
  const std::string own = source_layout(matrix).name();
  KT_CHECK(false, matrix.format.name << " weights cannot become " << wanted << "; they are kept as "
                                     << own << ", or quantized anew to bf16 or to rotated int8 or "
                                     << "int4");
}

void decode_rows(const SourceMatrix& matrix, int64_t first, int64_t count, float* w) {
  const SourceRows rows{&matrix, first, count, 0};
  if (matrix.format.kind == SourceKind::kFloat) {
    const SourcePart part{float_row(matrix, first), matrix.format.dtype, {}};
    for (int64_t i = 0; i < count * matrix.k; ++i) w[i] = float_at(part, i);
    return;
  }
  CodedPanel panel;
  panel.reset(matrix.coded, matrix.k);
  decode(rows, &panel);
  panel_values(panel, rows, w);
}

std::vector<SourceRows> matrix_source_rows(const SourceMatrix& matrix, int64_t p) {
  const int64_t first = p * kPackedColumns;
  return {{&matrix, first, std::min<int64_t>(kPackedColumns, matrix.n - first), 0}};
}

std::vector<SourceRows> w13_source_rows(const SourceMatrix& gate, const SourceMatrix& up,
                                        int64_t p) {
  constexpr int kHalf = kPackedColumns / 2;
  const int64_t count = std::min<int64_t>(kHalf, gate.n - p * kHalf);
  return {{&gate, p * kHalf, count, 0}, {&up, p * kHalf, count, kHalf}};
}

void pack_source_panel(const PackedLayout& layout, const std::vector<SourceRows>& rows,
                       uint8_t* dst) {
  const int64_t k = rows[0].matrix->k;
  const SourceFormat& format = rows[0].matrix->format;
  if (!quantizes(*rows[0].matrix, layout)) {
    CodedPanel panel;
    panel.reset(layout, k);
    for (const SourceRows& some : rows) decode(some, &panel);
    return pack_panel(panel, dst);
  }
  PanelRows floats;
  floats.k = k;
  floats.dtype = format.kind == SourceKind::kFloat ? format.dtype : DType::kFloat32;
  std::unique_ptr<float[]> values;
  if (format.kind != SourceKind::kFloat)
    values = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(kPackedColumns * k));
  for (const SourceRows& some : rows) {
    if (values == nullptr) {
      for (int64_t i = 0; i < some.count; ++i)
        floats.row[some.column + i] = float_row(*some.matrix, some.first + i);
    } else {
      float* const w = values.get() + some.column * k;
      decode_rows(*some.matrix, some.first, some.count, w);
      for (int64_t i = 0; i < some.count; ++i) floats.row[some.column + i] = w + i * k;
    }
  }
  quantize_panel(layout, floats, dst, nullptr);
}

}  // namespace kt
