// The row operations of every tier against rowwise_reference, bit for bit, and the reference
// against exact arithmetic. Tiers the features in use do not support are skipped by name.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "base/cpu_features.h"
#include "kernels/registry.h"
#include "random_tensors.h"

namespace kt {

extern const RowwiseOps rowwise_reference;

namespace {

// Random rows, with special values every so often when asked.
std::vector<float> random_row(int n, bool special, RandomNumbers& random) {
  std::vector<float> row(n);
  const std::vector<float>& specials = special_floats();
  for (float& value : row) {
    const bool take_special = special && random.integer(0, 7) == 0;
    value = take_special ? specials[random.integer(0, static_cast<int>(specials.size()) - 1)]
                         : random.normal();
  }
  return row;
}

std::vector<float> finite_row(int n, RandomNumbers& random) {
  std::vector<float> row = random_row(n, true, random);
  for (float& value : row) {
    if (!(std::fabs(value) < 1e30f)) value = 0.0f;
  }
  return row;
}

class RowwiseTest : public testing::TestWithParam<RowwiseKernel> {
 protected:
  void SetUp() override {
    if ((GetParam().isa & ~cpu_features().chosen) != 0) {
      GTEST_SKIP() << GetParam().ops->name << " needs " << isa_name(GetParam().isa)
                   << "; in use: " << isa_name(cpu_features().chosen);
    }
  }
  const RowwiseOps& ops() const { return *GetParam().ops; }
};

void expect_same(const std::vector<float>& result, const std::vector<float>& expected) {
  const int64_t at =
      first_difference(result.data(), expected.data(), static_cast<int64_t>(expected.size()));
  ASSERT_EQ(at, -1) << "element " << at << " is " << result[at] << ", the reference gives "
                    << expected[at];
}

TEST_P(RowwiseTest, LoadsEveryHalfPrecisionValue) {
  std::vector<uint16_t> src(65536);
  for (int i = 0; i < 65536; ++i) src[i] = static_cast<uint16_t>(i);
  std::vector<float> result(65536), expected(65536);
  ops().load_bf16(src.data(), result.data(), 65536, 65536);
  rowwise_reference.load_bf16(src.data(), expected.data(), 65536, 65536);
  EXPECT_EQ(std::memcmp(result.data(), expected.data(), 65536 * sizeof(float)), 0);
  ops().load_fp16(src.data(), result.data(), 65536, 65536);
  rowwise_reference.load_fp16(src.data(), expected.data(), 65536, 65536);
  EXPECT_EQ(std::memcmp(result.data(), expected.data(), 65536 * sizeof(float)), 0);
}

TEST_P(RowwiseTest, LoadsTailsAndPadsWithZeros) {
  for (int n = 0; n <= 70; ++n) {
    for (int padded_n : {n, n + 1, n + 64}) {
      const std::vector<uint16_t> src(n, 0x3f80);  // 1 in bf16
      std::vector<float> dst(padded_n + 16, 7.0f);
      ops().load_bf16(src.data(), dst.data(), n, padded_n);
      for (int i = 0; i < padded_n + 16; ++i) {
        ASSERT_EQ(dst[i], i < n          ? 1.0f
                          : i < padded_n ? 0.0f
                                         : 7.0f)
            << "bf16 n " << n << " to " << padded_n;
      }
      const std::vector<uint16_t> halves(n, 0x3c00);  // 1 in fp16
      std::fill(dst.begin(), dst.end(), 7.0f);
      ops().load_fp16(halves.data(), dst.data(), n, padded_n);
      for (int i = 0; i < padded_n + 16; ++i) {
        ASSERT_EQ(dst[i], i < n          ? 1.0f
                          : i < padded_n ? 0.0f
                                         : 7.0f)
            << "fp16 n " << n << " to " << padded_n;
      }
    }
  }
}

TEST_P(RowwiseTest, StoresTheNearestHalfPrecisionValue) {
  RandomNumbers random(31);
  std::vector<float> src;
  for (int i = 0; i < 200000; ++i) src.push_back(float_from_bits(random.bits()));
  // Every fp16 and bf16 value, and the ties between neighbours.
  for (uint32_t i = 0; i < 65536; ++i) {
    src.push_back(float_from_bits(i << 16));
    src.push_back(float_from_bits(i << 16 | 0x8000u));
    src.push_back(float_from_bits((0x38000000u + (i << 13)) | 0x1000u));
    src.push_back(std::ldexp(static_cast<float>(i), -25));
  }
  src.insert(src.end(), special_floats().begin(), special_floats().end());
  const int n = static_cast<int>(src.size());
  std::vector<uint16_t> result(n), expected(n);
  ops().store_bf16(src.data(), result.data(), n);
  rowwise_reference.store_bf16(src.data(), expected.data(), n);
  for (int i = 0; i < n; ++i) ASSERT_EQ(result[i], expected[i]) << "bf16 of " << src[i];
  ops().store_fp16(src.data(), result.data(), n);
  rowwise_reference.store_fp16(src.data(), expected.data(), n);
  for (int i = 0; i < n; ++i) ASSERT_EQ(result[i], expected[i]) << "fp16 of " << src[i];
}

TEST_P(RowwiseTest, StoresTailsOnly) {
  const std::vector<float> src(80, 1.0f);
  for (int n = 0; n <= 70; ++n) {
    std::vector<uint16_t> dst(80, 9);
    ops().store_bf16(src.data(), dst.data(), n);
    for (int i = 0; i < 80; ++i) ASSERT_EQ(dst[i], i < n ? 0x3f80 : 9) << "n " << n;
    std::fill(dst.begin(), dst.end(), uint16_t{9});
    ops().store_fp16(src.data(), dst.data(), n);
    for (int i = 0; i < 80; ++i) ASSERT_EQ(dst[i], i < n ? 0x3c00 : 9) << "n " << n;
  }
}

TEST_P(RowwiseTest, RotatesAsTheReference) {
  for (int block = 32; block <= 1024; block *= 2) {
    for (int blocks : {1, 2, 3}) {
      for (bool special : {false, true}) {
        SCOPED_TRACE(testing::Message()
                     << "block " << block << " times " << blocks << " special " << special);
        RandomNumbers random(block + blocks);
        std::vector<float> x = random_row(block * blocks, special, random);
        std::vector<float> expected = x;
        ops().rotate(x.data(), block * blocks, block);
        rowwise_reference.rotate(expected.data(), block * blocks, block);
        expect_same(x, expected);
      }
    }
  }
}

TEST_P(RowwiseTest, RotatesByTheHadamardMatrix) {
  for (int block = 32; block <= 1024; block *= 2) {
    RandomNumbers random(block);
    const std::vector<float> x = random_row(block, false, random);
    std::vector<float> rotated = x;
    ops().rotate(rotated.data(), block, block);
    double magnitude = 0;
    for (float value : x) magnitude += std::fabs(value);
    for (int i = 0; i < block; ++i) {
      double exact = 0;
      for (int j = 0; j < block; ++j) exact += __builtin_parity(i & j) ? -x[j] : x[j];
      ASSERT_NEAR(rotated[i], exact / std::sqrt(block), rotation_tolerance(block, magnitude))
          << "block " << block;
    }
  }
}

void expect_same_codes(const RowwiseOps& ops, const std::vector<float>& x, int offset,
                       int group_size) {
  const int n = static_cast<int>(x.size());
  const int groups = group_size > 0 ? (n + group_size - 1) / group_size : 0;
  std::vector<uint8_t> codes(n + 8, 0xee), expected_codes(n + 8, 0xee);
  std::vector<int32_t> sums(groups + 1, -5), expected_sums(groups + 1, -5);
  float scale = -1, expected_scale = -1;
  ops.quantize(x.data(), n, offset, codes.data(), &scale, group_size,
               groups > 0 ? sums.data() : nullptr);
  rowwise_reference.quantize(x.data(), n, offset, expected_codes.data(), &expected_scale,
                             group_size, groups > 0 ? expected_sums.data() : nullptr);
  ASSERT_TRUE(same_float(scale, expected_scale)) << scale << " and " << expected_scale;
  ASSERT_EQ(codes, expected_codes);
  ASSERT_EQ(sums, expected_sums);
}

TEST_P(RowwiseTest, QuantizesAsTheReference) {
  uint64_t seed = 1;
  for (int n : {64, 128, 192, 576, 1024}) {
    for (int offset : {0, 128}) {
      for (int group_size : {0, 16, 32, 48, 64, 80, 96, 128, n}) {
        SCOPED_TRACE(testing::Message()
                     << "n " << n << " offset " << offset << " group " << group_size);
        RandomNumbers random(++seed);
        expect_same_codes(ops(), finite_row(n, random), offset, group_size);
        std::vector<float> plain = random_row(n, false, random);
        expect_same_codes(ops(), plain, offset, group_size);
        plain[n - 1] = std::numeric_limits<float>::infinity();
        expect_same_codes(ops(), plain, offset, group_size);
        plain[n - 1] = -std::numeric_limits<float>::quiet_NaN();
        expect_same_codes(ops(), plain, offset, group_size);
        for (float edge :
             {0.0f, -0.0f, 0x1p-149f, 0x1p-100f, -0x1p-100f, 0x1.fffffep-101f, 0x1.fffffep127f}) {
          std::vector<float> row(n, 0.0f);
          row[n / 2] = edge;
          expect_same_codes(ops(), row, offset, group_size);
        }
        // amax 127 makes the inverse 1: every x.5 is a tie.
        for (int i = 0; i < n; ++i) plain[i] = static_cast<float>(random.integer(-126, 126)) + 0.5f;
        plain[0] = -127.0f;
        expect_same_codes(ops(), plain, offset, group_size);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(RowwiseTest, QuantizesWithinHalfAStep) {
  RandomNumbers random(41);
  const std::vector<float> x = random_row(1024, false, random);
  std::vector<uint8_t> codes(1024);
  std::vector<int32_t> sums(8);
  float scale = 0;
  ops().quantize(x.data(), 1024, 128, codes.data(), &scale, 128, sums.data());
  int32_t largest = 0;
  for (int g = 0; g < 8; ++g) {
    int32_t sum = 0;
    for (int i = g * 128; i < g * 128 + 128; ++i) {
      const int32_t code = codes[i] - 128;
      largest = std::max(largest, std::abs(code));
      sum += code;
      // Half a step, and the roundings of scale, inverse and product: 3 u of at most 127 steps.
      ASSERT_NEAR(x[i], code * scale, scale * (0.5f + 127 * 3 * 0x1p-24f));
    }
    ASSERT_EQ(sums[g], sum);
  }
  EXPECT_EQ(largest, 127);
}

TEST_P(RowwiseTest, GivesNoCodesToZeroAndNanRows) {
  std::vector<uint8_t> codes(64);
  float scale = 5;
  std::vector<float> x(64, 0x1p-101f);
  ops().quantize(x.data(), 64, 128, codes.data(), &scale, 0, nullptr);
  EXPECT_EQ(scale, 0.0f);
  EXPECT_EQ(codes, std::vector<uint8_t>(64, 128));
  x[63] = std::numeric_limits<float>::quiet_NaN();
  ops().quantize(x.data(), 64, 0, codes.data(), &scale, 0, nullptr);
  EXPECT_TRUE(std::isnan(scale));
  EXPECT_EQ(codes, std::vector<uint8_t>(64, 0));
}

// Every kind, with the limits and factors of models and some that no model has.
const std::vector<Activation>& activations() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static const std::vector<Activation> values = {
      {ActivationKind::kSilu, 0, 0},
      {ActivationKind::kSiluLimit, 10, 0},
      {ActivationKind::kSiluLimit, 0.125f, 0},
      {ActivationKind::kSiluThenLimit, 7, 0},
      {ActivationKind::kSwigluAlpha, 7, 1.702f},
      {ActivationKind::kSwigluAlpha, kInfinity, 0.25f},
      {ActivationKind::kGelu, 0, 0},
      {ActivationKind::kGeluTanh, 0, 0},
  };
  return values;
}

void activate(const RowwiseOps& ops, const Activation& activation, const std::vector<float>& gate,
              const std::vector<float>& up, std::vector<float>& out) {
  ops.activate[static_cast<int>(activation.kind)](gate.data(), up.data(), out.data(),
                                                  static_cast<int32_t>(out.size()),
                                                  activation.limit, activation.alpha);
}

std::string describe(const Activation& activation) {
  return "kind " + std::to_string(static_cast<int>(activation.kind)) + " limit " +
         std::to_string(activation.limit) + " alpha " + std::to_string(activation.alpha);
}

TEST_P(RowwiseTest, ActivatesAsTheReference) {
  RandomNumbers random(51);
  const std::vector<float>& specials = special_floats();
  std::vector<float> gate, up;
  for (float g : specials) {
    for (float u : specials) {
      gate.push_back(g);
      up.push_back(u);
    }
  }
  const int n = 1 << 16;
  for (int i = static_cast<int>(gate.size()); i < n; ++i) {
    gate.push_back(i % 2 == 0 ? float_from_bits(random.bits())
                              : 200.0f * (static_cast<float>(i) / n - 0.5f));
    up.push_back(i % 4 < 2 ? float_from_bits(random.bits()) : random.normal());
  }
  std::vector<float> result(n), expected(n);
  for (const Activation& activation : activations()) {
    SCOPED_TRACE(describe(activation));
    activate(ops(), activation, gate, up, result);
    activate(rowwise_reference, activation, gate, up, expected);
    expect_same(result, expected);
    for (int i = 0; i < n; ++i) {
      ASSERT_TRUE(std::isnan(result[i]) || !(std::isnan(gate[i]) || std::isnan(up[i])))
          << gate[i] << " and " << up[i] << " give " << result[i];
    }
  }
}

long double sigmoid(long double w) { return 1 / (1 + std::exp(-w)); }

long double exact_activation(const Activation& activation, float gate, float up) {
  const long double g = gate, u = up, limit = activation.limit, alpha = activation.alpha;
  const long double limited = std::min(g, limit);
  const long double limited_up = std::max(-limit, std::min(u, limit));
  switch (activation.kind) {
    case ActivationKind::kSilu: return g * sigmoid(g) * u;
    case ActivationKind::kSiluLimit: return limited * sigmoid(limited) * limited_up;
    case ActivationKind::kSiluThenLimit: return std::min(g * sigmoid(g), limit) * limited_up;
    case ActivationKind::kSwigluAlpha: return limited * sigmoid(alpha * limited) * (limited_up + 1);
    case ActivationKind::kGelu: return g * std::erfc(-g / std::sqrt(2.0L)) / 2 * u;
    default:  // (1 + tanh(z)) / 2 is sigmoid(2 z), and loses no digits that way
      return g * sigmoid(2 * std::sqrt(2 / M_PIl) * (g + 0.044715L * g * g * g)) * u;
  }
}

// Gates from where the sigmoid becomes 0 (or the result is no normal number any more) to 100, dense
// around 0, and ups on either side of every limit.
void fill_sweep(const Activation& activation, std::vector<float>& gate, std::vector<float>& up) {
  const int n = static_cast<int>(gate.size());
  const float lowest = activation.kind == ActivationKind::kGelu ? -12.8f
                       : activation.kind == ActivationKind::kGeluTanh
                           ? -9.0f
                           : -80.0f / std::max(activation.alpha, 1.0f);
  for (int i = 0; i < n; ++i) {
    const float part = static_cast<float>(i) / n;
    gate[i] = i % 2 == 0 ? lowest + (100.0f - lowest) * part : 16.0f * (part - 0.5f);
    up[i] = 24.0f * (static_cast<float>(i % 97) / 96 - 0.5f);
    gate[i] = std::max(gate[i], lowest);
  }
}

TEST_P(RowwiseTest, ActivationsAreExactToTheTolerance) {
  const int n = 1 << 16;
  std::vector<float> gate(n), up(n), out(n);
  for (const Activation& activation : activations()) {
    SCOPED_TRACE(describe(activation));
    fill_sweep(activation, gate, up);
    activate(ops(), activation, gate, up, out);
    for (int i = 0; i < n; ++i) {
      const double exact = static_cast<double>(exact_activation(activation, gate[i], up[i]));
      ASSERT_NEAR(out[i], exact, activation_tolerance(activation, gate[i], exact))
          << gate[i] << " and " << up[i];
    }
  }
}

// Formulas that are nearly right lie outside the tolerance somewhere on the sweep.
TEST(ActivationTolerance, CatchesWrongFormulas) {
  const auto clamp = [](double x, double limit) { return std::fmax(-limit, std::fmin(x, limit)); };
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  struct Fault {
    const char* what;
    Activation activation;
    std::function<double(double g, double u)> formula;
  };
  constexpr double kAlpha = 1.702f;
  const Activation limit{ActivationKind::kSiluLimit, 10, 0};
  const Activation then_limit{ActivationKind::kSiluThenLimit, 7, 0};
  const Activation alpha{ActivationKind::kSwigluAlpha, 7, 1.702f};
  const Activation silu{ActivationKind::kSilu, 0, 0};
  const Fault faults[] = {
      {"no limit of up below", limit,
       [&](double g, double u) {
         g = std::fmin(g, 10);
         return g * sigmoid(g) * std::fmin(u, 10);
       }},
      {"a limit of gate below too", limit,
       [&](double g, double u) { return clamp(g, 10) * sigmoid(clamp(g, 10)) * clamp(u, 10); }},
      {"limit after silu", limit,
       [&](double g, double u) { return std::fmin(g * sigmoid(g), 10) * clamp(u, 10); }},
      {"limit before silu", then_limit,
       [&](double g, double u) {
         g = std::fmin(g, 7);
         return g * sigmoid(g) * clamp(u, 7);
       }},
      {"alpha outside the sigmoid", alpha,
       [&](double g, double u) {
         g = std::fmin(g, 7);
         return kAlpha * g * sigmoid(g) * (clamp(u, 7) + 1);
       }},
      {"no alpha", alpha,
       [&](double g, double u) {
         g = std::fmin(g, 7);
         return g * sigmoid(g) * (clamp(u, 7) + 1);
       }},
      {"no + 1", alpha,
       [&](double g, double u) {
         g = std::fmin(g, 7);
         return g * sigmoid(kAlpha * g) * clamp(u, 7);
       }},
      {"+ 1 before the limit", alpha,
       [&](double g, double u) {
         g = std::fmin(g, 7);
         return g * sigmoid(kAlpha * g) * clamp(u + 1, 7);
       }},
      {"the other gelu",
       {ActivationKind::kGelu, 0, 0},
       [&](double g, double u) {
         return g * sigmoid(1.5957691216 * (g + 0.044715 * g * g * g)) * u;
       }},
      {"gelu and up the wrong way round",
       {ActivationKind::kGelu, 0, 0},
       [&](double g, double u) { return u * std::erfc(-u * M_SQRT1_2) / 2 * g; }},
      {"the quick gelu",
       {ActivationKind::kGeluTanh, 0, 0},
       [&](double g, double u) { return g * sigmoid(1.702 * g) * u; }},
      {"silu of bf16 rounding", silu,
       [&](double g, double u) { return g * sigmoid(g) * (1 + 0x1p-9) * u; }},
  };
  const int n = 1 << 12;
  std::vector<float> gate(n), up(n);
  for (const Fault& fault : faults) {
    fill_sweep(fault.activation, gate, up);
    bool caught = false;
    for (int i = 0; i < n && !caught; ++i) {
      const double exact = static_cast<double>(exact_activation(fault.activation, gate[i], up[i]));
      caught = !(std::fabs(fault.formula(gate[i], up[i]) - exact) <=
                 activation_tolerance(fault.activation, gate[i], exact));
    }
    EXPECT_TRUE(caught) << fault.what;
  }
}

TEST_P(RowwiseTest, ActivationsHaveTheirLimits) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> up(16, 1.0f);
  std::vector<float> gate(16, 0.0f), out(16);
  const float values[] = {kInfinity, -kInfinity, 0.0f, -0.0f, 100.0f, -100.0f, 1e38f, -1e38f};
  std::copy(std::begin(values), std::end(values), gate.begin());
  for (const Activation& activation : activations()) {
    SCOPED_TRACE(describe(activation));
    activate(ops(), activation, gate, up, out);
    const bool limited = activation.limit > 0 && activation.limit < kInfinity;
    EXPECT_EQ(out[0], limited ? out[4] : kInfinity);
    EXPECT_NEAR(out[1], 0.0f, 0x1p-120f);
    EXPECT_EQ(float_bits(out[2]), 0u);
    EXPECT_EQ(float_bits(out[3]), 0x80000000u);
    EXPECT_NEAR(out[5], 0.0f, 0x1p-120f + (activation.alpha == 0.25f ? 1e-8f : 0.0f));
    EXPECT_EQ(out[6], limited ? out[4] : 1e38f * (activation.alpha > 0 ? 2 : 1));
    EXPECT_NEAR(out[7], 0.0f, 0x1p-120f);
  }
  activate(ops(), activations()[0], gate, up, out);
  EXPECT_EQ(out[4], 100.0f);
  EXPECT_EQ(float_bits(out[5]), 0u);
}

// silu with neither limit nor alpha keeps the bits it had before there were other kinds.
TEST_P(RowwiseTest, SiluKeepsItsBits) {
  const std::vector<float> gate = {0.5f, -0.5f, 1.0f,  -1.0f,  3.25f, -3.25f, 10.0f,   -10.0f,
                                   30.f, -30.f, 79.9f, -79.9f, 1e-3f, -1e-3f, -87.99f, 0x1p-126f};
  const std::vector<uint32_t> bits = {0x3ec72fdf, 0xbe71a044, 0x3f69f051, 0xbeac1f5d,
                                      0x407a4b84, 0xbe1b47a4, 0x4147fdad, 0xba14c27f,
                                      0x42160000, 0xac76ee7c, 0x42c7c000, 0x892580d5,
                                      0x3a23ec04, 0xba23c212, 0x8364e1df, 0x00500000};
  std::vector<float> out(16);
  activate(ops(), activations()[0], gate, std::vector<float>(16, 1.25f), out);
  for (int i = 0; i < 16; ++i) EXPECT_EQ(float_bits(out[i]), bits[i]) << gate[i];
}

TEST_P(RowwiseTest, AddsScaledAsTheReference) {
  for (int n : {16, 32, 48, 1024}) {
    for (float weight :
         {0.0f, 1.0f, 0.3f, -2.5f, 0x1p-140f, std::numeric_limits<float>::infinity()}) {
      RandomNumbers random(n);
      const std::vector<float> x = random_row(n, true, random);
      std::vector<float> out = random_row(n, true, random);
      std::vector<float> expected = out;
      for (int i = 0; i < n; ++i) expected[i] = std::fma(weight, x[i], expected[i]);
      ops().add_scaled(x.data(), weight, out.data(), n);
      expect_same(out, expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tiers, RowwiseTest, testing::ValuesIn(list_rowwise_kernels()),
                         [](const auto& test) { return std::string(test.param.ops->name); });

}  // namespace
}  // namespace kt
