// The quantizers: error bounds, signs, padding, refusals, source types and determinism. Bytes:
// test_packed_layout.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/hadamard.h"
#include "format/quantize.h"

namespace kt {
namespace {

constexpr int kColumns = 64;

std::vector<float> normal_weights(int64_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> weights(count);
  for (float& w : weights) w = normal(generator);
  return weights;
}

// Student t with three degrees of freedom: a few weights far out.
std::vector<float> heavy_tailed_weights(int64_t count, int seed) {
  std::mt19937 generator(seed);
  std::student_t_distribution<float> student(3.0f);
  std::vector<float> weights(count);
  for (float& w : weights) w = 0.02f * student(generator);
  return weights;
}

struct Unpacked {
  std::vector<int8_t> codes;  // [64, padded_k]
  std::vector<float> scales;  // [64, num_groups]
};

std::vector<uint8_t> quantize(const PackedLayout& layout, const PanelRows& rows,
                              QuantizationError* error = nullptr) {
  std::vector<uint8_t> panel(layout.panel_bytes(rows.k), 0xcd);
  quantize_panel(layout, rows, panel.data(), error);
  return panel;
}

std::vector<uint8_t> quantize(const PackedLayout& layout, const std::vector<float>& w, int64_t n,
                              int64_t k, QuantizationError* error = nullptr) {
  return quantize(layout, matrix_panel_rows(w.data(), DType::kFloat32, n, k, 0), error);
}

Unpacked unpack(const PackedLayout& layout, int64_t k, const std::vector<uint8_t>& panel) {
  Unpacked result;
  result.codes.resize(kColumns * layout.padded_k(k));
  result.scales.resize(kColumns * layout.num_groups(k));
  unpack_panel(layout, k, panel.data(), result.codes.data(), result.scales.data());
  return result;
}

// Rows of w padded with zeros to [64, padded_k] and rotated as the layout says.
std::vector<float> rotated_rows(const PackedLayout& layout, const std::vector<float>& w, int64_t n,
                                int64_t k) {
  const int64_t padded_k = layout.padded_k(k);
  std::vector<float> rows(kColumns * padded_k, 0.0f);
  for (int64_t i = 0; i < std::min<int64_t>(n, kColumns); ++i) {
    std::copy_n(w.begin() + i * k, k, rows.begin() + i * padded_k);
    hadamard_rotate(rows.data() + i * padded_k, padded_k, layout.rotation_block(k));
  }
  return rows;
}

template <typename T>
T read_at(const std::vector<uint8_t>& bytes, int64_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

TEST(QuantizeInt8, ErrorIsAtMostHalfAStepAndScaleIsAmaxOver127) {
  for (const char* name : {"int8_n64k4_v1", "int8_n64k4_r512_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    for (int64_t k : {64, 100, 576, 1536}) {
      const int64_t padded_k = layout.padded_k(k);
      const std::vector<float> w = heavy_tailed_weights(50 * k, 5);
      const std::vector<float> rotated = rotated_rows(layout, w, 50, k);
      const std::vector<uint8_t> panel = quantize(layout, w, 50, k);
      const Unpacked packed = unpack(layout, k, panel);
      for (int row = 0; row < kColumns; ++row) {
        const float* const x = rotated.data() + row * padded_k;
        float amax = 0.0f;
        for (int64_t i = 0; i < padded_k; ++i) amax = std::max(amax, std::abs(x[i]));
        const float scale = packed.scales[row];
        EXPECT_EQ(scale, amax / 127.0f) << name << " row " << row;
        int32_t sum = 0;
        for (int64_t i = 0; i < padded_k; ++i) {
          const int code = packed.codes[row * padded_k + i];
          sum += code;
          // half a step, and the slack of x * (127 / amax): two roundings of a quotient of at most
          // 127
          EXPECT_LE(std::abs(x[i] - static_cast<double>(code) * scale),
                    scale * (0.5 + 127 * 0x1p-22));
        }
        EXPECT_EQ(read_at<int32_t>(panel, padded_k * 64 + row * 4), -128 * sum);
      }
    }
  }
}

// Squared error over w of the plain scheme: scale = bf16(max|w| / 7), nearest code in -8..7.
double nearest_int4_error(const std::vector<float>& w, int64_t k, int64_t group_size) {
  double total = 0.0;
  for (int64_t begin = 0; begin < static_cast<int64_t>(w.size()); begin += group_size) {
    if (begin % k + group_size > k) continue;
    float amax = 0.0f;
    for (int64_t i = begin; i < begin + group_size; ++i) amax = std::max(amax, std::abs(w[i]));
    const float scale = bf16_to_float(float_to_bf16(amax / 7.0f));
    for (int64_t i = begin; i < begin + group_size; ++i) {
      const double code = std::clamp(std::nearbyint(w[i] / scale), -8.0f, 7.0f);
      total += (code * scale - w[i]) * (code * scale - w[i]);
    }
  }
  return total;
}

TEST(QuantizeInt4, BeatsNearestRoundingByAQuarter) {
  const struct {
    const char* name;
    int64_t group_size;
  } cases[] = {{"int4g32_n64k8_v1", 32}, {"int4g128_n64k8_v1", 128}, {"int4_n64k8_v1", 1024}};
  for (const auto& [name, group_size] : cases) {
    for (bool heavy : {false, true}) {
      const std::vector<float> w =
          heavy ? heavy_tailed_weights(64 * 1024, 8) : normal_weights(64 * 1024, 8);
      QuantizationError error;
      quantize(PackedLayout::parse(name), w, 64, 1024, &error);
      // 0.70 at group 32 and below at longer ones on a million weights
      EXPECT_LT(error.error, 0.75 * nearest_int4_error(w, 1024, group_size))
          << name << (heavy ? " heavy" : "");
    }
  }
}

TEST(QuantizeInt4, IsWithinOnePercentOfAllScales) {
  const PackedLayout layout = PackedLayout::parse("int4g32_n64k8_v1");
  const std::vector<float> w = normal_weights(64 * 512, 12);
  QuantizationError error;
  quantize(layout, w, 64, 512, &error);
  double best_total = 0.0;
  for (int64_t begin = 0; begin < 64 * 512; begin += 32) {
    float amax = 0.0f;
    for (int64_t i = begin; i < begin + 32; ++i) amax = std::max(amax, std::abs(w[i]));
    double best = std::numeric_limits<double>::max();
    for (int step = 0; step < 200; ++step) {
      const float magnitude = amax / (6.5f + 0.05f * static_cast<float>(step / 2));
      const float scale = bf16_to_float(float_to_bf16(step % 2 == 0 ? magnitude : -magnitude));
      double sum = 0.0;
      for (int64_t i = begin; i < begin + 32; ++i) {
        const double code = std::clamp(std::nearbyint(w[i] / scale), -8.0f, 7.0f);
        sum += (code * scale - w[i]) * (code * scale - w[i]);
      }
      best = std::min(best, sum);
    }
    best_total += best;
  }
  EXPECT_LT(error.error, 1.01 * best_total);
}

TEST(QuantizeInt4, UsesBothSignsOfTheScaleAndMinusEight) {
  const PackedLayout layout = PackedLayout::parse("int4g32_n64k8_v1");
  const std::vector<float> w = normal_weights(64 * 512, 9);
  const Unpacked packed = unpack(layout, 512, quantize(layout, w, 64, 512));
  const auto negative =
      std::count_if(packed.scales.begin(), packed.scales.end(), [](float s) { return s < 0.0f; });
  // the sign follows that of the largest weight, a fair coin: 1024 groups, sigma 16
  EXPECT_GT(negative, 512 - 96);
  EXPECT_LT(negative, 512 + 96);
  EXPECT_GT(std::count(packed.codes.begin(), packed.codes.end(), -8), 512);
  EXPECT_GT(std::count(packed.codes.begin(), packed.codes.end(), 7), 0);
}

TEST(QuantizeInt4, ReproducesAGridWithEitherSign) {
  const PackedLayout layout = PackedLayout::parse("int4g32_n64k8_v1");
  for (float scale : {0.25f, -0.25f}) {
    std::vector<float> w(64 * 64);
    for (size_t i = 0; i < w.size(); ++i)
      w[i] = scale * static_cast<float>(static_cast<int>(i * 7 % 16) - 8);
    QuantizationError error;
    const std::vector<uint8_t> panel = quantize(layout, w, 64, 64, &error);
    const Unpacked packed = unpack(layout, 64, panel);
    EXPECT_EQ(error.error, 0.0);
    for (float found : packed.scales) EXPECT_EQ(found, scale);
    std::vector<float> back(64 * 64);
    dequantize_panel(layout, 64, panel.data(), back.data());
    EXPECT_EQ(back, w);
  }
}

TEST(QuantizePanel, ReportedErrorIsThatOfTheValues) {
  for (const char* name : {"int8_n64k4_v1", "int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1",
                           "int4g128_n64k8_v1", "int4_n64k8_r64_v1", "bf16_n64k2_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    constexpr int64_t kN = 64, kK = 576;
    const std::vector<float> w = normal_weights(kN * kK, 4);
    QuantizationError error;
    const std::vector<uint8_t> panel = quantize(layout, w, kN, kK, &error);
    std::vector<float> back(kN * kK);
    dequantize_panel(layout, kK, panel.data(), back.data());
    double squares = 0.0, signal = 0.0;
    for (int64_t i = 0; i < kN * kK; ++i) {
      const double difference = static_cast<double>(back[i]) - w[i];
      squares += difference * difference;
      signal += static_cast<double>(w[i]) * w[i];
    }
    // fp32 rotations and sums of 64: a few 1e-6 relative; bf16 differences are exact in fp32
    EXPECT_NEAR(error.error, squares, 1e-4 * squares) << name;
    EXPECT_NEAR(error.signal, signal, 1e-5 * signal) << name;
    const double relative = std::sqrt(error.error / error.signal);
    EXPECT_LT(relative, layout.format == WeightFormat::kInt4   ? 0.12
                        : layout.format == WeightFormat::kInt8 ? 0.012
                                                               : 0.002)
        << name;
    EXPECT_GT(relative, 1e-4) << name;
  }
}

TEST(QuantizePanel, AddsToTheErrorItIsGiven) {
  const PackedLayout layout = PackedLayout::parse("int4g32_n64k8_v1");
  const std::vector<float> w = normal_weights(64 * 64, 4);
  QuantizationError once, twice;
  quantize(layout, w, 64, 64, &once);
  quantize(layout, w, 64, 64, &twice);
  quantize(layout, w, 64, 64, &twice);
  EXPECT_EQ(twice.error, 2 * once.error);
  EXPECT_EQ(twice.signal, 2 * once.signal);
}

TEST(QuantizePanel, RotationUndoesItself) {
  // one large weight a row: without rotation it takes the whole int8 range, with it the row is flat
  constexpr int64_t kK = 512;
  std::vector<float> w = normal_weights(64 * kK, 6);
  for (int row = 0; row < 64; ++row) w[row * kK + row] = 2.0f;
  QuantizationError plain, rotated;
  quantize(PackedLayout::parse("int8_n64k4_v1"), w, 64, kK, &plain);
  const PackedLayout layout = PackedLayout::parse("int8_n64k4_r512_v1");
  const std::vector<uint8_t> panel = quantize(layout, w, 64, kK, &rotated);
  EXPECT_LT(rotated.error, 0.1 * plain.error);
  std::vector<float> back(64 * kK);
  dequantize_panel(layout, kK, panel.data(), back.data());
  for (int row = 0; row < 64; ++row) EXPECT_NEAR(back[row * kK + row], 2.0f, 0.02f);
}

TEST(QuantizePanel, CodesAreThoseOfTheScalarRotation) {
  // lane-wise and scalar butterflies give the same fp32 values: every scale is amax / 127 of
  // hadamard_rotate, exactly
  for (int64_t k : {64, 128, 512, 1024, 2048}) {
    const PackedLayout layout = PackedLayout::parse("int8_n64k4_r1024_v1");
    const std::vector<float> w = normal_weights(64 * k, 10);
    const std::vector<float> rotated = rotated_rows(layout, w, 64, k);
    const Unpacked packed = unpack(layout, k, quantize(layout, w, 64, k));
    for (int row = 0; row < 64; ++row) {
      float amax = 0.0f;
      for (int64_t i = 0; i < k; ++i) amax = std::max(amax, std::abs(rotated[row * k + i]));
      const float inverse = 127.0f / amax;
      for (int64_t i = 0; i < k; ++i) {
        ASSERT_EQ(packed.codes[row * k + i], std::nearbyint(rotated[row * k + i] * inverse))
            << k << " " << row;
      }
    }
  }
}

TEST(QuantizePanel, PadsWithZeros) {
  for (const char* name : {"int8_n64k4_v1", "int8_n64k4_r512_v1", "int4g32_n64k8_v1",
                           "int4g128_n64k8_r512_v1", "int4_n64k8_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {33, 70}, {64, 576}, {50, 640}}) {
      const std::vector<float> w = normal_weights(n * k, 2);
      const std::vector<uint8_t> panel = quantize(layout, w, n, k);
      const Unpacked packed = unpack(layout, k, panel);
      const int64_t padded_k = layout.padded_k(k);
      const int64_t groups = layout.num_groups(k);
      for (int64_t row = n; row < kColumns; ++row) {
        for (int64_t i = 0; i < padded_k; ++i)
          ASSERT_EQ(packed.codes[row * padded_k + i], 0) << name;
        for (int64_t g = 0; g < groups; ++g)
          ASSERT_EQ(packed.scales[row * groups + g], 0.0f) << name;
        if (layout.format == WeightFormat::kInt8) {
          ASSERT_EQ(read_at<int32_t>(panel, padded_k * 64 + row * 4), 0);
        }
      }
      if (layout.max_rotation != 0) continue;  // a rotation fills the padded columns
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t i = k; i < padded_k; ++i)
          ASSERT_EQ(packed.codes[row * padded_k + i], 0) << name;
      }
    }
  }
}

TEST(QuantizePanel, PacksWhatItUnpacks) {
  for (const char* name :
       {"int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "int4g128_n64k8_v1", "int4_n64k8_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    for (int64_t k : {70, 576}) {
      const std::vector<uint8_t> panel = quantize(layout, heavy_tailed_weights(61 * k, 1), 61, k);
      const Unpacked packed = unpack(layout, k, panel);
      std::vector<uint8_t> again(panel.size());
      pack_panel(layout, k, packed.codes.data(), packed.scales.data(), again.data());
      EXPECT_EQ(again, panel) << name << " k=" << k;
    }
  }
}

TEST(QuantizePanel, TinyRowsAndGroupsAreZeros) {
  for (const char* name : {"int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "int4_n64k8_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    std::vector<float> w(64 * 64, 0.0f);
    std::fill_n(w.begin() + 64, 64, 1e-38f);
    std::fill_n(w.begin() + 128, 64, 0x1p-149f);
    QuantizationError error;
    const Unpacked packed = unpack(layout, 64, quantize(layout, w, 64, 64, &error));
    EXPECT_TRUE(std::all_of(packed.codes.begin(), packed.codes.end(),
                            [](int8_t code) { return code == 0; }));
    EXPECT_TRUE(std::all_of(packed.scales.begin(), packed.scales.end(),
                            [](float scale) { return scale == 0.0f; }));
    EXPECT_TRUE(std::isfinite(error.error));
  }
}

TEST(QuantizePanel, ScaleOfTheWeightsDoesNotMatter) {
  // powers of two change no mantissa: the same codes for 2^-40 and 2^40 times the weights
  for (const char* name : {"int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    std::vector<float> w = normal_weights(64 * 64, 14);
    const Unpacked expected = unpack(layout, 64, quantize(layout, w, 64, 64));
    for (int exponent : {-40, 40}) {
      std::vector<float> scaled = w;
      for (float& value : scaled) value = std::ldexp(value, exponent);
      EXPECT_EQ(unpack(layout, 64, quantize(layout, scaled, 64, 64)).codes, expected.codes)
          << name << exponent;
    }
  }
}

TEST(QuantizePanel, RefusesWhatIsNotFiniteByRowAndColumn) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const char* name : {"int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "bf16_n64k2_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity}) {
        std::vector<float> wide(64 * 600, 1.0f);
        wide[37 * 600 + 531] = bad;
        std::vector<uint16_t> narrow(wide.size());
        for (size_t i = 0; i < wide.size(); ++i) {
          narrow[i] = dtype == DType::kBFloat16 ? float_to_bf16(wide[i]) : float_to_fp16(wide[i]);
        }
        const void* const source =
            dtype == DType::kFloat32 ? static_cast<const void*>(wide.data()) : narrow.data();
        try {
          quantize(layout, matrix_panel_rows(source, dtype, 64, 600, 0));
          ADD_FAILURE() << name << " took " << bad << " as " << dtype_name(dtype);
        } catch (const Error& error) {
          const std::string sentence = error.what();
          EXPECT_NE(sentence.find("row 37, column 531"), std::string::npos) << sentence;
        }
      }
    }
  }
}

TEST(QuantizePanel, RefusesWhatItsFormatCannotHold) {
  std::vector<float> w(64 * 64, 1.0f);
  w[0] = 0x1p51f;
  EXPECT_THROW(quantize(PackedLayout::parse("int8_n64k4_v1"), w, 64, 64), Error);
  EXPECT_NO_THROW(quantize(PackedLayout::parse("bf16_n64k2_v1"), w, 64, 64));
  w[0] = 0x1p50f;
  EXPECT_NO_THROW(quantize(PackedLayout::parse("int4g32_n64k8_r512_v1"), w, 64, 64));
  w[0] = std::numeric_limits<float>::max();  // rounds to infinity in bf16
  EXPECT_THROW(quantize(PackedLayout::parse("bf16_n64k2_v1"), w, 64, 64), Error);
  PanelRows rows = matrix_panel_rows(w.data(), DType::kInt8, 64, 64, 0);
  EXPECT_THROW(quantize(PackedLayout::parse("int8_n64k4_v1"), rows), Error);
}

TEST(QuantizePanel, RefusesLayoutsOfGivenCodesFirst) {
  std::vector<float> w(64, NAN);
  for (const char* name : {"int4hg32_n64k8_v1", "int6kg16_n64k16_v1", "fp8f_n64k4_v1"}) {
    try {
      quantize_panel(PackedLayout::parse(name),
                     matrix_panel_rows(w.data(), DType::kFloat32, 1, 64, 0), nullptr, nullptr);
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()),
                std::string(name) + " keeps the codes of files; quantize to int8, int4 or bf16");
    }
  }
}

TEST(QuantizePanel, SourceTypesAgreeWhereTheyAreExact) {
  // multiples of 1/256 below 1/2 and a few powers of two down to fp16's subnormals: exact in all
  // three
  std::vector<float> wide(64 * 100);
  for (size_t i = 0; i < wide.size(); ++i)
    wide[i] = static_cast<float>(static_cast<int>(i * 37 % 255) - 127) / 256.0f;
  for (int e = 1; e <= 24; ++e) wide[e] = (e % 2 == 0 ? 1.0f : -1.0f) * std::ldexp(1.0f, -e);
  wide[30] = -0.0f;
  std::vector<uint16_t> bf16(wide.size()), fp16(wide.size());
  for (size_t i = 0; i < wide.size(); ++i) {
    bf16[i] = float_to_bf16(wide[i]);
    fp16[i] = float_to_fp16(wide[i]);
    ASSERT_EQ(bf16_to_float(bf16[i]), wide[i]);
    ASSERT_EQ(fp16_to_float(fp16[i]), wide[i]);
  }
  for (const char* name : {"int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "bf16_n64k2_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    const auto expected =
        quantize(layout, matrix_panel_rows(wide.data(), DType::kFloat32, 64, 100, 0));
    EXPECT_EQ(quantize(layout, matrix_panel_rows(bf16.data(), DType::kBFloat16, 64, 100, 0)),
              expected)
        << name;
    EXPECT_EQ(quantize(layout, matrix_panel_rows(fp16.data(), DType::kFloat16, 64, 100, 0)),
              expected)
        << name;
  }
}

TEST(QuantizePanel, EveryFiniteHalfConvertsAsDTypeSays) {
  std::vector<uint16_t> halves;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    if ((bits & 0x7c00u) != 0x7c00u) halves.push_back(static_cast<uint16_t>(bits));
  }
  const int64_t k = static_cast<int64_t>(halves.size());
  const PackedLayout layout = PackedLayout::parse("bf16_n64k2_v1");
  const std::vector<uint8_t> panel =
      quantize(layout, matrix_panel_rows(halves.data(), DType::kFloat16, 1, k, 0));
  for (int64_t i = 0; i < k; ++i) {
    ASSERT_EQ(read_at<uint16_t>(panel, i / 2 * 256 + i % 2 * 2),
              float_to_bf16(fp16_to_float(halves[i])))
        << i;
  }
}

TEST(QuantizePanel, Bf16CopiesEveryFinitePattern) {
  std::vector<uint16_t> bits;
  for (uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    if ((pattern & 0x7f80u) != 0x7f80u) bits.push_back(static_cast<uint16_t>(pattern));
  }
  const int64_t k = static_cast<int64_t>(bits.size());
  const PackedLayout layout = PackedLayout::parse("bf16_n64k2_v1");
  const std::vector<uint8_t> panel =
      quantize(layout, matrix_panel_rows(bits.data(), DType::kBFloat16, 1, k, 0));
  for (int64_t i = 0; i < k; ++i)
    ASSERT_EQ(read_at<uint16_t>(panel, i / 2 * 256 + i % 2 * 2), bits[i]) << i;
}

// FNV-1a.
uint64_t digest(const std::vector<uint8_t>& bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001b3u;
  return hash;
}

TEST(QuantizePanel, BytesAreTheSameOnEveryMachineAndCompiler) {
  // sums of three uniform draws of a linear congruential generator: no library distribution
  std::vector<float> w(64 * 576);
  uint32_t state = 1;
  for (float& value : w) {
    int32_t sum = 0;
    for (int i = 0; i < 3; ++i) {
      state = state * 1664525u + 1013904223u;
      sum += static_cast<int32_t>(state >> 16) - 32768;
    }
    value = static_cast<float>(sum) * 0x1p-20f;
  }
  const struct {
    const char* name;
    uint64_t digest;
  } cases[] = {
      {"int8_n64k4_r512_v1", 0xa523e161fc271cedu}, {"int4g32_n64k8_r512_v1", 0xb5c85fc17f2c9585u},
      {"int4g128_n64k8_v1", 0x5d4c7bd62d58600eu},  {"int4_n64k8_r512_v1", 0x1d31fccaee7dfa82u},
      {"bf16_n64k2_v1", 0x96a0380ebed1739fu},
  };
  for (const auto& [name, expected] : cases) {
    EXPECT_EQ(digest(quantize(PackedLayout::parse(name), w, 64, 576)), expected) << name;
  }
}

TEST(QuantizePanel, SameBytesTwiceFromTwoThreadsAndAtAnyAddress) {
  for (const char* name :
       {"int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "int4_n64k8_v1", "bf16_n64k2_v1"}) {
    const PackedLayout layout = PackedLayout::parse(name);
    const std::vector<float> w = heavy_tailed_weights(60 * 576, 21);
    const std::vector<uint8_t> expected = quantize(layout, w, 60, 576);
    std::vector<uint8_t> first, second;
    std::thread one([&] { first = quantize(layout, w, 60, 576); });
    std::thread two([&] { second = quantize(layout, w, 60, 576); });
    one.join();
    two.join();
    EXPECT_EQ(first, expected) << name;
    EXPECT_EQ(second, expected) << name;
    std::vector<float> moved(w.size() + 1);
    std::copy(w.begin(), w.end(), moved.begin() + 1);
    EXPECT_EQ(quantize(layout, matrix_panel_rows(moved.data() + 1, DType::kFloat32, 60, 576, 0)),
              expected)
        << name;
  }
}

}  // namespace
}  // namespace kt
