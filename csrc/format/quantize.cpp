#include "format/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>

#include "base/check.h"
#include "format/column_lanes.h"
#include "format/panel_error.h"

namespace kt {
namespace {

constexpr int kLoadColumns = 256;  // k of one piece of four rows while it is transposed
constexpr int kSumColumns = 64;    // k of one fp32 partial sum; those are added in fp64
// Rows and groups below are zeros, as RowwiseOps::quantize has it.
constexpr float kSmallestAmax = 0x1p-100f;

// Largest |w| that is taken, as fp32 bits. Codes: 2^50, so that no square of a rotated weight
// overflows. bf16: the largest fp32 that does not round to infinity.
constexpr int32_t kLargestQuantized = 0x58800000;
constexpr int32_t kLargestBf16 = 0x7f7f7fff;

// dst[i] = fp32 value of src[i]; returns whether any |value| has bits above `largest` (NaN and
// infinity have).
bool convert_row(const float* src, int64_t count, int32_t largest, float* dst) {
  int32_t over = 0;
  for (int64_t i = 0; i < count; ++i) {
    over |= (std::bit_cast<int32_t>(src[i]) & 0x7fffffff) > largest;
    dst[i] = src[i];
  }
  return over != 0;
}

bool convert_row(const uint16_t* src, DType dtype, int64_t count, int32_t largest, float* dst) {
  int32_t over = 0;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t bits = static_cast<int32_t>(uint32_t{src[i]} << 16);
      over |= (bits & 0x7fffffff) > largest;
      dst[i] = std::bit_cast<float>(bits);
    }
    return over != 0;
  }
  for (int64_t i = 0; i < count; ++i) {
    // fp16_to_float without branches: a subnormal is put under the exponent of 2^-14, which is then
    // taken off
    const uint32_t sign = (uint32_t{src[i]} & 0x8000u) << 16;
    const uint32_t magnitude = (uint32_t{src[i]} & 0x7fffu) << 13;
    const uint32_t normal = magnitude + 0x38000000u;
    const float subnormal = std::bit_cast<float>(magnitude | 0x38800000u) - 0x1p-14f;
    const uint32_t finite = magnitude < 0x00800000u ? std::bit_cast<uint32_t>(subnormal) : normal;
    over |= magnitude >= 0x0f800000u;
    dst[i] = std::bit_cast<float>(finite | sign);
  }
  return over != 0;
}

float source_value(const PanelRows& rows, int row, int64_t column) {
  if (rows.dtype == DType::kFloat32) return static_cast<const float*>(rows.row[row])[column];
  const uint16_t bits = static_cast<const uint16_t*>(rows.row[row])[column];
  return rows.dtype == DType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

[[noreturn]] void refuse_value(const PanelRows& rows, int row, int64_t begin, int32_t largest) {
  const float limit = std::bit_cast<float>(largest);
  int64_t column = begin;
  while (std::abs(source_value(rows, row, column)) <= limit) ++column;
  throw PanelError(text_of("weight ", source_value(rows, row, column)), row,
                   text_of("column ", column),
                   text_of("cannot be packed: it must be finite and at most ", limit,
                           " in magnitude; repair the checkpoint"));
}

// Converts k in [begin, begin + count) of one row to fp32.
void load_row(const PanelRows& rows, int row, int64_t begin, int64_t count, int32_t largest,
              float* dst) {
  const void* const src = rows.row[row];
  const bool over =
      rows.dtype == DType::kFloat32
          ? convert_row(static_cast<const float*>(src) + begin, count, largest, dst)
          : convert_row(static_cast<const uint16_t*>(src) + begin, rows.dtype, count, largest, dst);
  if (over) refuse_value(rows, row, begin, largest);
}

// x[i] = columns 4 quad .. 4 quad + 3 at k = i, for i < padded_k; zeros for what is padded.
// Not inlined: GCC 12.2 crashes (pass slp) on the inlined function when AVX-512 flags are added.
[[gnu::noinline]] void load_quad(const PanelRows& rows, int quad, int64_t padded_k, int32_t largest,
                                 F4* x) {
  alignas(64) float piece[kLanes][kLoadColumns];
  for (int64_t begin = 0; begin < padded_k; begin += kLoadColumns) {
    const int64_t padded = std::min<int64_t>(kLoadColumns, padded_k - begin);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = quad * kLanes + lane;
      const int64_t count = rows.row[row] == nullptr ? 0 : std::min(padded, rows.k - begin);
      if (count > 0) load_row(rows, row, begin, count, largest, piece[lane]);
      std::fill(piece[lane] + count, piece[lane] + padded, 0.0f);
    }
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F4 four[4] = {load_lanes(&piece[0][i]), load_lanes(&piece[1][i]),
                          load_lanes(&piece[2][i]), load_lanes(&piece[3][i])};
      transpose_lanes(four, x + begin + i);
    }
  }
}

// hadamard_rotate (base/hadamard.h) of four columns, bit for bit: the same butterflies, two
// distances in one pass.
void rotate_quad(F4* x, int64_t padded_k, int block) {
  if (block <= 1) return;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (F4* part = x; part < x + padded_k; part += block) {
    int distance = 1;
    if (std::countr_zero(static_cast<unsigned>(block)) % 2 != 0) {
      for (int i = 0; i < block; i += 2) {
        const F4 u = part[i], v = part[i + 1];
        part[i] = u + v;
        part[i + 1] = u - v;
      }
      distance = 2;
    }
    for (; distance < block; distance *= 4) {
      for (int i = 0; i < block; i += 4 * distance) {
        F4* const a = part + i;
        for (int j = 0; j < distance; ++j) {
          const F4 u = a[j] + a[j + distance], v = a[j] - a[j + distance];
          const F4 s = a[j + 2 * distance] + a[j + 3 * distance];
          const F4 t = a[j + 2 * distance] - a[j + 3 * distance];
          a[j] = u + s;
          a[j + distance] = v + t;
          a[j + 2 * distance] = u - s;
          a[j + 3 * distance] = v - t;
        }
      }
    }
    for (int i = 0; i < block; ++i) part[i] *= scale;
  }
}

// Sums of the four columns, in fp64 and lane by lane.
struct LaneSums {
  double error[kLanes] = {};
  double signal[kLanes] = {};

  void add(F4 more_error, F4 more_signal) {
    for (int lane = 0; lane < kLanes; ++lane) {
      error[lane] += double{more_error[lane]};
      signal[lane] += double{more_signal[lane]};
    }
  }
};

// error += sum (x - value(x))^2 and signal += sum x^2 over k, by pieces of kSumColumns.
template <typename Value>
void measure(const F4* x, int64_t count, LaneSums* sums, Value&& value) {
  for (int64_t begin = 0; begin < count; begin += kSumColumns) {
    const int64_t end = std::min(count, begin + kSumColumns);
    F4 error = all_lanes(0.0f), signal = all_lanes(0.0f);
    for (int64_t k = begin; k < end; ++k) {
      const F4 difference = value(x[k]) - x[k];
      error += difference * difference;
      signal += x[k] * x[k];
    }
    sums->add(error, signal);
  }
}

F4 largest_magnitude(const F4* x, int64_t count) {
  F4 amax = all_lanes(0.0f);
  for (int64_t k = 0; k < count; ++k) amax = max_lanes(abs_lanes(x[k]), amax);
  return amax;
}

void quantize_quad_int8(const F4* x, int64_t padded_k, int quad, uint8_t* dst, LaneSums* sums) {
  const F4 zero = all_lanes(0.0f);
  const F4 amax = largest_magnitude(x, padded_k);
  const F4 scale = select_lanes(amax >= kSmallestAmax, amax / 127.0f, zero);
  const F4 inverse = select_lanes(amax >= kSmallestAmax, 127.0f / amax, zero);
  I4 code_sum = all_lanes(0);
  uint8_t* line = dst + quad * kLanes * 4;
  for (int64_t k = 0; k < padded_k; k += 4, line += kPackedStepBytes) {
    I4 code[4];
    for (int i = 0; i < 4; ++i) code[i] = integers_of(x[k + i] * inverse);
    code_sum += (code[0] + code[1]) + (code[2] + code[3]);
    store_lanes(
        (code[0] & 255) | ((code[1] & 255) << 8) | ((code[2] & 255) << 16) | (code[3] << 24), line);
  }
  uint8_t* const tail = dst + padded_k * kPackedColumns + quad * kLanes * 4;
  store_lanes(code_sum * -128, tail);
  store_lanes(scale, tail + kPackedColumns * 4);
  if (sums != nullptr) {
    measure(x, padded_k, sums, [&](F4 w) { return round_lanes(w * inverse) * scale; });
  }
}

// The scales that are tried for a group: |scale| = max|w| / t for t = first, first * ratio, ...,
// with both signs.
struct ScaleGrid {
  int64_t group_size;  // the grid serves groups of at most this many weights
  float first;
  float ratio;
  int count;
};
// The longer a group, the more it gains by clipping its largest weight. Mean squared error above
// that of the best of 200 scales, on normal, Laplace and Student t weights: at most 0.3 % for
// groups, 0.5 % for whole rows.
constexpr ScaleGrid kScaleGrids[] = {
    {32, 7.10f, 1.055f, 5},  {64, 7.30f, 1.059f, 5},   {128, 7.80f, 1.057f, 5},
    {256, 8.20f, 1.055f, 6}, {1024, 9.00f, 1.085f, 8}, {INT64_MAX, 9.70f, 1.105f, 13},
};

// sum w q and sum q^2 of one choice of codes. With the best scale sum w q / sum q^2 for these codes
// the squared error is sum w^2 - (sum w q)^2 / sum q^2, so codes are compared by the last term:
// gain().
struct CodeSums {
  F4 wq = all_lanes(0.0f);
  F4 qq = all_lanes(0.0f);

  void add(F4 w, F4 q) {
    wq += w * q;
    qq += q * q;
  }
  // Codes that are all zero gain 0 and have the scale 0.
  F4 scale() const { return wq / max_lanes(qq, all_lanes(1.0f)); }
  F4 gain() const { return wq * scale(); }
};

inline F4 inverse_or_zero(F4 scale) {
  const F4 zero = all_lanes(0.0f);
  return select_lanes(scale != zero, 1.0f / scale, zero);
}

// Codes -8..7 of w at 1 / scale, still as floats.
inline F4 int4_codes(F4 w, F4 inverse) {
  return clamp_lanes(round_lanes(w * inverse), all_lanes(-8.0f), all_lanes(7.0f));
}

// Searches the grid on w / amax (in `unit`). Returns the refitted signed scale of the best codes,
// times amax.
F4 search_scale(const F4* unit, int64_t count, F4 amax) {
  const ScaleGrid* grid = kScaleGrids;
  while (count > grid->group_size) ++grid;
  F4 best_gain = all_lanes(-1.0f), best_scale = all_lanes(0.0f);
  const auto consider = [&](const CodeSums& sums, float sign) {
    const F4 gain = sums.gain();
    best_scale = select_lanes(gain > best_gain, sums.scale() * sign, best_scale);
    best_gain = max_lanes(gain, best_gain);
  };
  float steps = grid->first;
  for (int i = 0; i < grid->count; ++i, steps *= grid->ratio) {
    // codes q of a negative scale are summed as -q in -7..8: products and squares are the same
    CodeSums positive, negative;
    for (int64_t k = 0; k < count; ++k) {
      const F4 rounded = round_lanes(unit[k] * steps);
      positive.add(unit[k], clamp_lanes(rounded, all_lanes(-8.0f), all_lanes(7.0f)));
      negative.add(unit[k], clamp_lanes(rounded, all_lanes(-7.0f), all_lanes(8.0f)));
    }
    consider(positive, 1.0f);
    consider(negative, -1.0f);
  }
  return best_scale * amax;
}

// The bf16 scale of one group: the searched one, or its least-squares refit if that is better.
F4 int4_scale(const F4* w, int64_t count, F4* unit) {
  const F4 zero = all_lanes(0.0f);
  const F4 amax = largest_magnitude(w, count);
  const F4 inverse_amax = select_lanes(amax >= kSmallestAmax, 1.0f / amax, zero);
  for (int64_t k = 0; k < count; ++k) unit[k] = w[k] * inverse_amax;
  const F4 searched = round_to_bf16(search_scale(unit, count, amax));
  const F4 inverse = inverse_or_zero(searched);
  CodeSums sums;
  F4 error = zero;
  for (int64_t k = 0; k < count; ++k) {
    const F4 q = int4_codes(w[k], inverse);
    const F4 difference = q * searched - w[k];
    sums.add(w[k], q);
    error += difference * difference;
  }
  const F4 refit = round_to_bf16(sums.scale());
  const F4 refit_inverse = inverse_or_zero(refit);
  F4 refit_error = zero;
  for (int64_t k = 0; k < count; ++k) {
    const F4 difference = int4_codes(w[k], refit_inverse) * refit - w[k];
    refit_error += difference * difference;
  }
  return select_lanes(refit_error < error, refit, searched);
}

void quantize_quad_int4(const F4* x, int64_t padded_k, int64_t group_size, int quad, F4* unit,
                        uint8_t* dst, LaneSums* sums) {
  for (int64_t begin = 0; begin < padded_k; begin += group_size) {
    const F4* const w = x + begin;
    const int64_t count = std::min(group_size, padded_k - begin);
    const F4 scale = int4_scale(w, count, unit);
    const F4 inverse = inverse_or_zero(scale);
    uint8_t* line = dst + quad * kLanes * 4;
    for (int64_t k = 0; k < count; k += 8, line += kPackedStepBytes) {
      I4 word = all_lanes(0);
      for (int i = 0; i < 4; ++i) {
        word |= (integers_of(int4_codes(w[k + i], inverse)) + 8) << (8 * i);
        word |= (integers_of(int4_codes(w[k + 4 + i], inverse)) + 8) << (8 * i + 4);
      }
      store_lanes(word, line);
    }
    dst += count * kPackedColumns / 2;
    uint16_t scale_bits[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      scale_bits[lane] = static_cast<uint16_t>(static_cast<uint32_t>(bits_of(scale)[lane]) >> 16);
    }
    std::memcpy(dst + quad * sizeof scale_bits, scale_bits, sizeof scale_bits);
    dst += kPackedColumns * sizeof(uint16_t);
    if (sums != nullptr) {
      measure(w, count, sums, [&](F4 value) { return int4_codes(value, inverse) * scale; });
    }
  }
}

void quantize_quad_bf16(const F4* x, int64_t padded_k, int quad, uint8_t* dst, LaneSums* sums) {
  uint8_t* line = dst + quad * kLanes * 4;
  for (int64_t k = 0; k < padded_k; k += 2, line += kPackedStepBytes) {
    const I4 low = (bits_of(round_to_bf16(x[k])) >> 16) & 0xffff;
    store_lanes(low | bits_of(round_to_bf16(x[k + 1])), line);
  }
  if (sums != nullptr) measure(x, padded_k, sums, round_to_bf16);
}

}  // namespace

void check_quantizes(const PackedLayout& layout) {
  KT_CHECK(layout.format == WeightFormat::kInt8 || layout.format == WeightFormat::kInt4 ||
               layout.format == WeightFormat::kBFloat16,
           layout.name() << " keeps the codes of files; quantize to int8, int4 or bf16");
}

void quantize_panel(const PackedLayout& layout, const PanelRows& rows, uint8_t* dst,
                    QuantizationError* error) {
  check_quantizes(layout);
  KT_CHECK(rows.dtype == DType::kFloat32 || rows.dtype == DType::kBFloat16 ||
               rows.dtype == DType::kFloat16,
           "weights to pack are fp32, bf16 or fp16, got " << dtype_name(rows.dtype));
  const int64_t padded_k = layout.padded_k(rows.k);
  const int64_t group_size = layout.effective_group_size(rows.k);
  const int block = layout.rotation_block(rows.k);
  const int32_t largest =
      layout.format == WeightFormat::kBFloat16 ? kLargestBf16 : kLargestQuantized;
  const int64_t unit_columns = layout.format == WeightFormat::kInt4 ? group_size : 0;
  const auto buffer =
      std::make_unique_for_overwrite<F4[]>(static_cast<size_t>(padded_k + unit_columns));
  F4* const x = buffer.get();
  QuantizationError total;
  for (int quad = 0; quad < kPackedColumns / kLanes; ++quad) {
    LaneSums sums;
    LaneSums* const wanted = error == nullptr ? nullptr : &sums;
    load_quad(rows, quad, padded_k, largest, x);
    rotate_quad(x, padded_k, block);
    switch (layout.format) {
      case WeightFormat::kInt8: quantize_quad_int8(x, padded_k, quad, dst, wanted); break;
      case WeightFormat::kInt4:
        quantize_quad_int4(x, padded_k, group_size, quad, x + padded_k, dst, wanted);
        break;
      case WeightFormat::kBFloat16: quantize_quad_bf16(x, padded_k, quad, dst, wanted); break;
      default: break;  // check_quantizes()
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      total.error += sums.error[lane];
      total.signal += sums.signal[lane];
    }
  }
  if (error != nullptr) {
    error->error += total.error;
    error->signal += total.signal;
  }
}

}  // namespace kt
