#include "base/weight_format.h"

namespace kt {
namespace {

// 2 * E2M1 + 12: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives as integers from 0 on. The half is
// in the scale.
constexpr uint8_t kFp4Table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
// llama.cpp's kvalues_iq4nl + 128
constexpr uint8_t kIq4Table[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                   129, 141, 153, 166, 181, 197, 217, 241};

}  // namespace

const std::vector<WeightFormatInfo>& list_weight_formats() {
  using F = WeightFormat;
  using S = ScaleForm;
  static const std::vector<WeightFormatInfo> formats = {
      {F::kInt8, "int8", DType::kInt8, S::kRow, 128, 4, nullptr},
      {F::kInt8H, "int8h", DType::kInt8, S::kFp16, 128, 4, nullptr},
      {F::kInt8F, "int8f", DType::kInt8, S::kFp32, 128, 4, nullptr},
      {F::kInt6K, "int6k", DType::kInt6, S::kBlock, 32, 16, nullptr},
      {F::kInt5H, "int5h", DType::kInt5, S::kFp16, 16, 8, nullptr},
      {F::kInt5M, "int5m", DType::kInt5, S::kFp16Min, 0, 8, nullptr},
      {F::kInt5KM, "int5km", DType::kInt5, S::kBlockMin, 0, 8, nullptr},
      {F::kInt4, "int4", DType::kInt4, S::kBf16, 8, 8, nullptr},
      {F::kInt4H, "int4h", DType::kInt4, S::kFp16, 8, 8, nullptr},
      {F::kInt4F, "int4f", DType::kInt4, S::kFp32, 8, 8, nullptr},
      {F::kInt4Z, "int4z", DType::kInt4, S::kFp16Zero, 0, 8, nullptr},
      {F::kInt4M, "int4m", DType::kInt4, S::kFp16Min, 0, 8, nullptr},
      {F::kInt4KM, "int4km", DType::kInt4, S::kBlockMin, 0, 8, nullptr},
      {F::kInt3K, "int3k", DType::kInt3, S::kBlock, 4, 16, nullptr},
      {F::kInt2KM, "int2km", DType::kInt2, S::kBlockMin, 0, 16, nullptr},
      {F::kFp4, "fp4", DType::kFp4, S::kBf16, 12, 8, kFp4Table},
      {F::kFp4C, "fp4c", DType::kFp4, S::kColumn, 12, 8, kFp4Table},
      {F::kIq4H, "iq4h", DType::kIq4, S::kFp16, 128, 8, kIq4Table},
      {F::kIq4K, "iq4k", DType::kIq4, S::kBlock, 128, 8, kIq4Table},
      {F::kFp8, "fp8", DType::kFp8, S::kBf16, 0, 4, nullptr},
      {F::kFp8F, "fp8f", DType::kFp8, S::kFp32, 0, 4, nullptr},
      {F::kBFloat16, "bf16", DType::kBFloat16, S::kNone, 0, 2, nullptr},
  };
  return formats;
}

const WeightFormatInfo& format_info(WeightFormat format) {
  return list_weight_formats()[static_cast<size_t>(format)];
}

bool takes_bf16_rows(WeightFormat format) {
  const DType code = format_info(format).code;
  return code == DType::kBFloat16 || code == DType::kFp8;
}

bool has_groups(WeightFormat format) {
  const ScaleForm scales = format_info(format).scales;
  return scales != ScaleForm::kNone && scales != ScaleForm::kRow;
}

}  // namespace kt
