// Source strings, and the checks of what a checkpoint gives for them.
#include <initializer_list>
#include <sstream>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/parsing.h"
#include "base/span.h"
#include "format/source_decoders.h"

namespace kt {
namespace {

constexpr int64_t kMaxRanges = 64;

// Takes a number from 1 to `largest` off the front of `text`.
bool take_size(std::string_view& text, int64_t largest, int64_t* size) {
  const bool is_padded = text.starts_with('0');
  *size = take_number(text);
  return !is_padded && *size >= 1 && *size <= largest;
}

// fp8_block<R>x<C>, kt_int<bits>x<T>_rows or _columns; false: none of these.
bool parse_sizes(std::string_view text, SourceFormat* format) {
  if (take(text, "fp8_block")) {
    format->kind = SourceKind::kFp8;
    return take_size(text, kMaxMatrixSize, &format->block_rows) && take(text, "x") &&
           take_size(text, kMaxMatrixSize, &format->block_columns) && text.empty();
  }
  const bool is_int8 = take(text, "kt_int8x");
  if (!is_int8 && !take(text, "kt_int4x")) return false;
  int64_t ranges = 0;
  if (!take_size(text, kMaxRanges, &ranges)) return false;
  format->kind = SourceKind::kKt;
  format->bits = is_int8 ? 8 : 4;
  format->num_ranges = static_cast<int>(ranges);
  format->by_columns = text == "_columns";
  return format->by_columns || text == "_rows";
}

// Checks of the parts of one matrix. Errors: kt::Error, one sentence.
struct PartChecks {
  const SourceMatrix& matrix;

  std::string name() const {
    std::ostringstream text;
    text << matrix.format.name << " weights [" << matrix.n << ", " << matrix.k << "]";
    return text.str();
  }

  void type(int index, const char* part, std::initializer_list<DType> types) const {
    const DType given = matrix.parts[index].dtype;
    std::string known;
    for (const DType dtype : types) {
      if (dtype == given) return;
      known.append(known.empty() ? "" : " or ").append(dtype_name(dtype));
    }
    KT_CHECK(false,
             part << " of " << name() << " is " << dtype_name(given) << "; it must be " << known);
  }

  void shape(int index, const char* part, const std::vector<int64_t>& wanted) const {
    const std::vector<int64_t>& given = matrix.parts[index].shape;
    const auto text = [](const std::vector<int64_t>& sizes) {
      std::string all;
      for (const int64_t size : sizes)
        all.append(all.empty() ? "" : ", ").append(std::to_string(size));
      return all;
    };
    KT_CHECK(given == wanted, part << " of " << name() << " has shape [" << text(given)
                                   << "]; it must be [" << text(wanted) << "]");
  }

  void multiple(const char* size_name, int64_t size, int64_t of) const {
    KT_CHECK(size % of == 0, name()
                                 << " cannot be: " << size_name << " must be a multiple of " << of);
  }

  // Groups of k: size `dimension` of a part that has two. The size of one, 0 for the whole row.
  int group_size(int index, const char* part, int dimension, int64_t* groups) const {
    const std::vector<int64_t>& given = matrix.parts[index].shape;
    *groups = given.size() == 2 ? given[dimension] : 0;
    KT_CHECK(*groups >= 1, part << " of " << name() << " has " << given.size()
                                << " dimensions; it must have two, and a group at least");
    KT_CHECK(matrix.k % *groups == 0,
             part << " of " << name() << " has " << *groups
                  << " groups, whose number does not divide k; quantize in groups that do");
    return *groups == 1 ? 0 : static_cast<int>(matrix.k / *groups);
  }
};

WeightFormat with_scales_of(DType scale) {
  if (scale == DType::kBFloat16) return WeightFormat::kInt4;
  return scale == DType::kFloat16 ? WeightFormat::kInt4H : WeightFormat::kInt4F;
}

constexpr std::initializer_list<DType> kFp8Types = {DType::kFp8, DType::kUint8};
constexpr std::initializer_list<DType> kFp4Types = {DType::kUint8, DType::kInt8, DType::kFp4};
constexpr std::initializer_list<DType> kE8M0Types = {DType::kE8M0, DType::kUint8};
constexpr std::initializer_list<DType> kScaleTypes = {DType::kBFloat16, DType::kFloat16,
                                                      DType::kFloat32};

void open_fp8(SourceMatrix* matrix) {
  const PartChecks checks{*matrix};
  const SourceFormat& format = matrix->format;
  const int64_t n = matrix->n, k = matrix->k;
  const int64_t width = format.block_columns == 0 ? k : format.block_columns;
  checks.type(0, "weight", kFp8Types);
  checks.shape(0, "weight", {n, k});
  if (format.e8m0) {
    checks.type(1, "scale", kE8M0Types);
  } else {
    checks.type(1, "scale", {DType::kFloat32, DType::kBFloat16});
  }
  if (format.block_columns == 0 && matrix->parts[1].shape.size() == 1) {
    checks.shape(1, "scale", {n});
  } else {
    checks.shape(1, "scale", {ceil_div(n, format.block_rows), ceil_div(k, width)});
  }
  const WeightFormat coded = format.e8m0 ? WeightFormat::kFp8 : WeightFormat::kFp8F;
  matrix->coded = {coded, static_cast<int>(width >= k && !format.e8m0 ? 0 : width), 0};
}

void open_pack_quantized(SourceMatrix* matrix) {
  const PartChecks checks{*matrix};
  checks.type(0, "weight", {DType::kInt32, DType::kUint8});
  const int64_t codes = matrix->parts[0].dtype == DType::kInt32 ? 8 : 2;
  checks.shape(0, "weight", {matrix->n, ceil_div(matrix->k, codes)});
  checks.type(1, "scale", kScaleTypes);
  int64_t groups = 0;
  const int size = checks.group_size(1, "scale", 1, &groups);
  checks.shape(1, "scale", {matrix->n, groups});
  matrix->coded = {with_scales_of(matrix->parts[1].dtype), size, 0};
}

// GPTQ and AWQ, whose parts differ in their order and in what a word holds.
void open_words(SourceMatrix* matrix) {
  const PartChecks checks{*matrix};
  const bool is_gptq = matrix->format.kind == SourceKind::kGptq;
  const int64_t n = matrix->n, k = matrix->k;
  const int scales = is_gptq ? 1 : 2, zeros = is_gptq ? 2 : 1;
  checks.multiple("n", n, 8);
  if (is_gptq) checks.multiple("k", k, 8);
  checks.type(0, "qweight", {DType::kInt32});
  checks.shape(0, "qweight",
               is_gptq ? std::vector<int64_t>{k / 8, n} : std::vector<int64_t>{k, n / 8});
  checks.type(scales, "scales", kScaleTypes);
  int64_t groups = 0;
  const int size = checks.group_size(scales, "scales", 0, &groups);
  checks.shape(scales, "scales", {groups, n});
  checks.type(zeros, "qzeros", {DType::kInt32});
  checks.shape(zeros, "qzeros", {groups, n / 8});
  if (is_gptq) check_stored_zeros(*matrix);
  const WeightFormat coded = is_gptq && is_symmetric(*matrix)
                                 ? with_scales_of(matrix->parts[scales].dtype)
                                 : WeightFormat::kInt4Z;
  matrix->coded = {coded, size, 0};
}

void open_fp4(SourceMatrix* matrix) {
  const PartChecks checks{*matrix};
  const bool is_nvfp4 = matrix->format.kind == SourceKind::kNvFp4;
  const int64_t n = matrix->n, k = matrix->k, group = is_nvfp4 ? 16 : 32;
  checks.multiple("k", k, group);
  checks.type(0, "weight", kFp4Types);
  checks.shape(0, "weight", {n, k / 2});
  checks.type(1, "scale", is_nvfp4 ? kFp8Types : kE8M0Types);
  checks.shape(1, "scale", {n, k / group});
  if (is_nvfp4) {
    checks.type(2, "factor", {DType::kFloat32});
    if (!matrix->parts[2].shape.empty()) checks.shape(2, "factor", {1});
  }
  const WeightFormat coded = is_nvfp4 ? WeightFormat::kFp4C : WeightFormat::kFp4;
  matrix->coded = {coded, static_cast<int>(group), 0};
}

void open_kt(SourceMatrix* matrix) {
  const PartChecks checks{*matrix};
  const SourceFormat& format = matrix->format;
  const int64_t ranges = format.num_ranges;
  checks.multiple(format.by_columns ? "k" : "n", format.by_columns ? matrix->k : matrix->n,
                  ranges * (format.by_columns ? (format.bits == 8 ? 64 : 128) : 32));
  checks.multiple(format.by_columns ? "n" : "k", format.by_columns ? matrix->n : matrix->k,
                  format.by_columns ? 32 : (format.bits == 8 ? 64 : 128));
  const int64_t rows = format.by_columns ? matrix->n : matrix->n / ranges;
  const int64_t columns = format.by_columns ? matrix->k / ranges : matrix->k;
  for (int part = 0; part < format.num_parts(); part += 2) {
    checks.type(part, "weight", {DType::kInt8, DType::kUint8});
    checks.shape(part, "weight", {rows * columns * format.bits / 8});
    checks.type(part + 1, "scale", {DType::kFloat32});
    checks.shape(part + 1, "scale", {rows});
  }
  const bool has_groups = format.by_columns && ranges > 1;
  const WeightFormat int8 = has_groups ? WeightFormat::kInt8F : WeightFormat::kInt8;
  matrix->coded = {format.bits == 8 ? int8 : WeightFormat::kInt4F,
                   static_cast<int>(has_groups ? columns : 0), 0};
}

void open_gguf(SourceMatrix* matrix) {
  const PartChecks checks{*matrix};
  const GgufType& type = *matrix->format.gguf;
  checks.multiple("k", matrix->k, type.columns);
  checks.type(0, "weight", {DType::kUint8});
  checks.shape(0, "weight", {matrix->n, matrix->k / type.columns * type.bytes});
  matrix->coded = type.coded;
}

}  // namespace

SourceFormat SourceFormat::parse(const std::string& name) {
  SourceFormat format;
  format.name = name;
  const auto is = [&](const char* known, SourceKind kind) {
    if (name != known) return false;
    format.kind = kind;
    return true;
  };
  const auto is_float = [&](const char* known, DType dtype) {
    if (is(known, SourceKind::kFloat)) format.dtype = dtype;
    return name == known;
  };
  if (is_float("bf16", DType::kBFloat16) || is_float("fp16", DType::kFloat16) ||
      is_float("fp32", DType::kFloat32) || is("fp8_row", SourceKind::kFp8) ||
      is("pack_quantized", SourceKind::kPackQuantized) || is("gptq_v2", SourceKind::kGptq) ||
      is("awq", SourceKind::kAwq) || is("mxfp4", SourceKind::kMxFp4) ||
      is("nvfp4", SourceKind::kNvFp4) || parse_sizes(name, &format)) {
    return format;
  }
  if (is("gptq", SourceKind::kGptq)) {
    format.zero_offset = 1;
    return format;
  }
  if (is("mxfp8", SourceKind::kFp8)) {
    format.block_columns = 32;
    format.e8m0 = true;
    return format;
  }
  if (name.substr(0, 5) == "gguf:") {
    format.gguf = find_gguf_type(name.substr(5));
    KT_CHECK(format.gguf != nullptr,
             "GGUF type " << name.substr(5) << " is not supported; known: " << list_gguf_types());
    format.kind = format.gguf->decode == nullptr ? SourceKind::kFloat : SourceKind::kGguf;
    format.dtype = format.gguf->dtype;
    return format;
  }
  KT_CHECK(false, "unknown source \""
                      << name
                      << "\"; known: bf16, fp16, fp32, fp8_block128x128 (any block), fp8_row, "
                         "mxfp8, pack_quantized, gptq, gptq_v2, awq, mxfp4, nvfp4, gguf:Q4_K (and "
                         "other types), kt_int8x2_rows, kt_int4x2_columns (up to "
                      << kMaxRanges << " parts)");
}

int SourceFormat::num_parts() const {
  switch (kind) {
    case SourceKind::kFloat:
    case SourceKind::kGguf: return 1;
    case SourceKind::kFp8:
    case SourceKind::kPackQuantized:
    case SourceKind::kMxFp4: return 2;
    case SourceKind::kGptq:
    case SourceKind::kAwq:
    case SourceKind::kNvFp4: return 3;
    case SourceKind::kKt: return 2 * num_ranges;
  }
  return 0;
}

SourceMatrix open_source(const SourceFormat& format, std::vector<SourcePart> parts, int64_t n,
                         int64_t k) {
  SourceMatrix matrix{format, std::move(parts), n, k, {}};
  KT_CHECK(n >= 1 && k >= 1 && n <= kMaxMatrixSize && k <= kMaxMatrixSize,
           format.name << " weights cannot be [" << n << ", " << k << "]; sizes are from 1 to "
                       << kMaxMatrixSize);
  KT_CHECK(static_cast<int>(matrix.parts.size()) == format.num_parts(),
           format.name << " weights have " << format.num_parts() << " tensors a matrix, got "
                       << matrix.parts.size());
  switch (format.kind) {
    case SourceKind::kFloat:
      matrix.coded = {WeightFormat::kBFloat16, 0, 0};
      if (format.gguf != nullptr) {
        open_gguf(&matrix);
      } else {
        PartChecks{matrix}.type(0, "weight", {format.dtype});
        PartChecks{matrix}.shape(0, "weight", {n, k});
      }
      break;
    case SourceKind::kFp8: open_fp8(&matrix); break;
    case SourceKind::kPackQuantized: open_pack_quantized(&matrix); break;
    case SourceKind::kGptq:
    case SourceKind::kAwq: open_words(&matrix); break;
    case SourceKind::kMxFp4:
    case SourceKind::kNvFp4: open_fp4(&matrix); break;
    case SourceKind::kGguf: open_gguf(&matrix); break;
    case SourceKind::kKt: open_kt(&matrix); break;
  }
  return matrix;
}

}  // namespace kt
