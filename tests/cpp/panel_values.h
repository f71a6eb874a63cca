// Made-up panels as values: every code and scale by itself, the bytes that packed_layout.h gives
// them, written as one ascending stream, and what the weights are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/weight_format.h"
#include "format/packed_layout.h"
#include "random_tensors.h"

namespace kt {

enum class Fill { kRandom, kLargest, kSmallest, kAlternating };

// Codes and scales of 64 columns.
struct PanelValues {
  PackedLayout layout;
  int k = 0;
  int group_size = 0;
  int num_groups = 0;
  std::vector<uint8_t> stored;  // [64][k] what the panel holds: unsigned, or an index of the table
  std::vector<uint8_t> codes;   // [64][k] unsigned, behind the table; of fp8 its byte
  std::vector<float> scale;     // [groups][64]
  std::vector<float> minimum;   // [groups][64], or empty
  std::vector<int> zero;        // [groups][64]: the format's offset where it has no zeros
  std::vector<float> column;    // [64], or empty
  LineVector<uint8_t> bytes;

  const WeightFormatInfo& info() const { return format_info(layout.format); }
  int64_t group_at(int k_at, int j) const { return int64_t{k_at / group_size} * 64 + j; }

  // The weight in double precision, but for the rounding of a fp32 scale times a column's.
  double value(int k_at, int j) const {
    const int64_t g = group_at(k_at, j);
    const uint8_t code = codes[int64_t{j} * k + k_at];
    if (info().code == DType::kFp8) return double{fp8_to_float(code)} * scale[g];
    double weight = double{scale[g]} * (code - zero[g]);
    if (!minimum.empty()) weight += minimum[g];
    return column.empty() ? weight : weight * column[j];
  }
  // As kernels that multiply bf16 have it.
  uint16_t bf16_value(int k_at, int j) const {
    return float_to_bf16(static_cast<float>(value(k_at, j)));
  }
};

// The byte stream of a panel.
class PanelWriter {
 public:
  explicit PanelWriter(const PanelValues& values) : v_(values) {}

  template <typename Value>
  void append(Value value) {
    uint8_t raw[sizeof value];
    std::memcpy(raw, &value, sizeof value);
    bytes_.insert(bytes_.end(), raw, raw + sizeof value);
  }

  // The codes of [begin, end).
  void append_codes(int begin, int end) {
    const DType type = v_.info().code;
    for (int k = begin; k < end; k += v_.info().step_k) {
      switch (type) {
        case DType::kInt8: append_bytes(k); break;
        case DType::kFp8: append_fp8(k); break;
        case DType::kInt6:
          append_nibbles(k);
          append_nibbles(k + 8);
          append_pairs(k, 4);
          break;
        case DType::kInt5:
          append_nibbles(k);
          append_bits(k, 2, 4);
          break;
        case DType::kInt3:
          append_pairs(k, 0);
          append_bits(k, 4, 2);
          break;
        case DType::kInt2: append_pairs(k, 0); break;
        default: append_nibbles(k);
      }
    }
  }

  LineVector<uint8_t>& bytes() { return bytes_; }

 private:
  int code(int k, int column) const { return v_.stored[int64_t{column} * v_.k + k]; }

  void append_bytes(int k) {
    for (int column = 0; column < 64; ++column) {
      for (int j = 0; j < 4; ++j) append(static_cast<int8_t>(code(k + j, column) - 128));
    }
  }
  // a table's pairs (k, k + 1) of four columns, then their pairs (k + 2, k + 3)
  void append_fp8(int k) {
    for (int first = 0; first < 64; first += 4) {
      for (int pair = k; pair < k + 4; pair += 2) {
        for (int column = first; column < first + 4; ++column) {
          append(static_cast<uint8_t>(code(pair, column)));
          append(static_cast<uint8_t>(code(pair + 1, column)));
        }
      }
    }
  }
  void append_nibbles(int k) {
    for (int column = 0; column < 64; ++column) {
      for (int j = 0; j < 4; ++j) {
        const int low = code(k + j, column) & 15, high = code(k + 4 + j, column) & 15;
        append(static_cast<uint8_t>(low + 16 * high));
      }
    }
  }
  // Two bits of 16 k, from bit `from` of a code on.
  void append_pairs(int k, int from) {
    for (int column = 0; column < 64; ++column) {
      for (int j = 0; j < 4; ++j) {
        int byte = 0;
        for (int quad = 0; quad < 4; ++quad)
          byte |= (code(k + 4 * quad + j, column) >> from & 3) << (2 * quad);
        append(static_cast<uint8_t>(byte));
      }
    }
  }
  // Bit `from` of 4 * quads k.
  void append_bits(int k, int quads, int from) {
    for (int first = 0; first < 64; first += 16) {
      for (int quad = 0; quad < quads; ++quad) {
        uint64_t word = 0;
        for (int c = 0; c < 16; ++c) {
          for (int j = 0; j < 4; ++j) {
            const uint64_t bit = code(k + 4 * quad + j, first + c) >> from & 1;
            word |= bit << (4 * c + j);
          }
        }
        append(word);
      }
    }
  }

  const PanelValues& v_;
  LineVector<uint8_t> bytes_;
};

// Which scales are drawn: those of weights, or, for formats with the exponents of fp32, also ones
// so large that sums of 2^30 stay finite, and subnormal ones: a power of two, whose multiples are
// bf16, since conversions differ in whether they round what is subnormal up to a normal number.
enum class ScaleRange { kUsual, kWide };

// Zero, negative, subnormal in fp16, and of the size of real ones.
inline float random_scale(RandomNumbers& random, ScaleRange range) {
  const int kind = random.integer(0, 63);
  if (kind < 2) return 0.0f;
  const float normal = random.normal();
  if (range == ScaleRange::kWide && kind == 4) return std::copysign(0x1p-133f, normal);
  if (range == ScaleRange::kWide && kind == 5) return 0x1p90f * normal;
  return (kind < 4 ? 0x1p-18f : 0.01f) * normal;
}

inline uint8_t fill_code(Fill fill, RandomNumbers& random, const WeightFormatInfo& info, int at) {
  const bool is_row = info.scales == ScaleForm::kRow;  // its codes have no -128
  const int last = (1 << dtype_bits(info.code)) - 1;
  int smallest = is_row ? 1 : 0, largest = last;
  if (info.code == DType::kFp8) {
    smallest = 0xfe;  // -448
    largest = 0x7e;
  }
  if (info.table != nullptr) {
    const auto [low, high] = std::minmax_element(info.table, info.table + last + 1);
    smallest = static_cast<int>(low - info.table);
    largest = static_cast<int>(high - info.table);
  }
  switch (fill) {
    case Fill::kLargest: return static_cast<uint8_t>(largest);
    case Fill::kSmallest: return static_cast<uint8_t>(smallest);
    case Fill::kAlternating: return static_cast<uint8_t>(at % 2 == 0 ? smallest : largest);
    default: break;
  }
  const auto code = static_cast<uint8_t>(random.integer(is_row ? 1 : 0, last));
  const bool is_nan = info.code == DType::kFp8 && (code & 0x7f) == 0x7f;
  return is_nan ? uint8_t{0} : code;
}

// Draws the scales of the groups of one panel and appends them to its stream.
class ScaleMaker {
 public:
  ScaleMaker(PanelValues& values, PanelWriter& writer, int n, RandomNumbers& random,
             ScaleRange range)
      : v_(values), writer_(writer), n_(n), random_(random), range_(range) {}

  // d and e of the next 256 k.
  void append_heads() {
    for (float& d : d_) d = append_fp16(0.1f);
    if (v_.info().scales != ScaleForm::kBlockMin) return;
    for (float& e : e_) e = append_fp16(0.1f);
  }

  void append_group() {
    const ScaleForm form = v_.info().scales;
    for (int j = 0; j < 64; ++j) {
      float scale = 0;
      if (form == ScaleForm::kBf16 || form == ScaleForm::kColumn) {
        const bool is_column = form == ScaleForm::kColumn;  // another factor is to come
        const uint16_t bits = float_to_bf16(draw(j, is_column ? ScaleRange::kUsual : range_));
        writer_.append(bits);
        scale = bf16_to_float(bits);
      } else if (form == ScaleForm::kFp32) {
        writer_.append(scale = draw(j, range_));
      } else if (form == ScaleForm::kBlock) {
        const auto c = static_cast<int8_t>(j < n_ ? random_.integer(-128, 127) : 0);
        writer_.append(c);
        scale = d_[j] * c;
      } else if (form == ScaleForm::kBlockMin) {
        const auto c = static_cast<uint8_t>(j < n_ ? random_.integer(0, 255) : 0);
        writer_.append(c);
        scale = d_[j] * c;
      } else {
        scale = append_fp16(1.0f, j);
      }
      v_.scale.push_back(scale);
    }
    for (int j = 0; j < 64; ++j) {
      int zero = v_.info().code_offset;
      if (form == ScaleForm::kFp16Zero) {
        zero = random_.integer(0, 9) == 0 ? 255 : random_.integer(0, 16);
        writer_.append(static_cast<uint8_t>(zero));
      } else if (form == ScaleForm::kFp16Min) {
        v_.minimum.push_back(append_fp16(8.0f, j));
      } else if (form == ScaleForm::kBlockMin) {
        const auto b = static_cast<uint8_t>(j < n_ ? random_.integer(0, 255) : 0);
        writer_.append(b);
        v_.minimum.push_back(-(e_[j] * b));
      }
      v_.zero.push_back(zero);
    }
  }

  void append_columns() {
    if (v_.info().scales != ScaleForm::kColumn) return;
    for (int j = 0; j < 64; ++j) {
      v_.column.push_back(0.5f + random_.normal());
      writer_.append(v_.column.back());
    }
  }

 private:
  float draw(int j, ScaleRange range) { return j < n_ ? random_scale(random_, range) : 0.0f; }
  float append_fp16(float factor, int j = 0) {
    const uint16_t bits = float_to_fp16(factor * draw(j, ScaleRange::kUsual));
    writer_.append(bits);
    return fp16_to_float(bits);
  }

  PanelValues& v_;
  PanelWriter& writer_;
  int n_;  // columns from here on are padding: their scales and minima are 0
  RandomNumbers& random_;
  ScaleRange range_;
  float d_[64] = {};
  float e_[64] = {};
};

// A panel of groups, the last 64 - n columns of scale 0.
inline PanelValues make_panel_values(const PackedLayout& layout, int k, int n, Fill fill,
                                     RandomNumbers& random, ScaleRange range = ScaleRange::kUsual) {
  PanelValues v;
  v.layout = layout;
  v.k = k;
  v.group_size = layout.effective_group_size(k);
  v.num_groups = layout.num_groups(k);
  const WeightFormatInfo& info = v.info();
  v.stored.resize(int64_t{64} * k);
  for (int64_t i = 0; i < int64_t{64} * k; ++i)
    v.stored[i] = fill_code(fill, random, info, static_cast<int>(i % k));
  v.codes = v.stored;
  if (info.table != nullptr) {
    for (uint8_t& code : v.codes) code = info.table[code];
  }
  PanelWriter writer(v);
  ScaleMaker scales(v, writer, n, random, range);
  const bool has_heads = info.scales == ScaleForm::kBlock || info.scales == ScaleForm::kBlockMin;
  for (int begin = 0; begin < k; begin += v.group_size) {
    if (has_heads && begin % kSuperBlock == 0) scales.append_heads();
    writer.append_codes(begin, std::min(begin + v.group_size, k));
    scales.append_group();
  }
  scales.append_columns();
  v.bytes = std::move(writer.bytes());
  return v;
}

}  // namespace kt
