// Sources in buffers of exactly their size, so that a sanitizer finds every byte too many; what
// they decode to is checked in tests/python/test_sources.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/span.h"
#include "format/quantize.h"
#include "format/source.h"
#include "moe_problem.h"

namespace kt {
namespace {

// A source, the sizes its matrices can have, and its parts: type and shape.
struct Part {
  DType dtype;
  std::vector<int64_t> shape;
};
struct Case {
  const char* source;
  int64_t n_unit;
  int64_t k_unit;
  std::vector<Part> (*parts)(int64_t n, int64_t k);
};

std::vector<Part> kt_parts(int64_t rows, int64_t columns, int bits, int count) {
  std::vector<Part> parts;
  for (int i = 0; i < count; ++i) {
    parts.push_back({DType::kInt8, {rows * columns * bits / 8}});
    parts.push_back({DType::kFloat32, {rows}});
  }
  return parts;
}

std::vector<Part> awq_parts(int64_t n, int64_t k, int64_t groups) {
  return {{DType::kInt32, {k, n / 8}},
          {DType::kInt32, {groups, n / 8}},
          {DType::kFloat16, {groups, n}}};
}

#define KT_GGUF(name, columns, bytes)                                        \
  {"gguf:" name, 1, columns, [](int64_t n, int64_t k) -> std::vector<Part> { \
     return {{DType::kUint8, {n, k / columns * bytes}}};                     \
   }}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"bf16", 1, 1,
       [](int64_t n, int64_t k) -> std::vector<Part> { return {{DType::kBFloat16, {n, k}}}; }},
      {"fp32", 1, 1,
       [](int64_t n, int64_t k) -> std::vector<Part> { return {{DType::kFloat32, {n, k}}}; }},
      {"fp8_block48x96", 1, 1,
       [](int64_t n, int64_t k) -> std::vector<Part> {
         return {{DType::kFp8, {n, k}}, {DType::kFloat32, {ceil_div(n, 48), ceil_div(k, 96)}}};
       }},
      {"fp8_row", 1, 1,
       [](int64_t n, int64_t k) -> std::vector<Part> {
         return {{DType::kFp8, {n, k}}, {DType::kBFloat16, {n}}};
       }},
      {"mxfp8", 1, 1,
       [](int64_t n, int64_t k) -> std::vector<Part> {
         return {{DType::kFp8, {n, k}}, {DType::kE8M0, {n, ceil_div(k, 32)}}};
       }},
      {"pack_quantized", 1, 64,
       [](int64_t n, int64_t k) -> std::vector<Part> {
         return {{DType::kUint8, {n, k / 2}}, {DType::kFloat32, {n, k / 64}}};
       }},
      {"pack_quantized", 1, 1,
       [](int64_t n, int64_t k) -> std::vector<Part> {
         return {{DType::kInt32, {n, ceil_div(k, 8)}}, {DType::kFloat32, {n, 1}}};
       }},
      {"gptq", 8, 64,
       [](int64_t n, int64_t k) -> std::vector<Part> {
         return {{DType::kInt32, {k / 8, n}},
                 {DType::kFloat16, {k / 64, n}},
                 {DType::kInt32, {k / 64, n / 8}}};
       }},
      {"awq", 8, 64, [](int64_t n, int64_t k) { return awq_parts(n, k, k / 64); }},
      {"awq", 8, 1, [](int64_t n, int64_t k) { return awq_parts(n, k, 1); }},
      {"mxfp4", 1, 32,
       [](int64_t n, int64_t k) -> std::vector<Part> {
         return {{DType::kUint8, {n, k / 2}}, {DType::kE8M0, {n, k / 32}}};
       }},
      {"nvfp4", 1, 16,
       [](int64_t n, int64_t k) -> std::vector<Part> {
         return {{DType::kUint8, {n, k / 2}}, {DType::kFp8, {n, k / 16}}, {DType::kFloat32, {1}}};
       }},
      {"kt_int8x2_rows", 64, 64, [](int64_t n, int64_t k) { return kt_parts(n / 2, k, 8, 2); }},
      {"kt_int4x3_columns", 32, 384, [](int64_t n, int64_t k) { return kt_parts(n, k / 3, 4, 3); }},
      KT_GGUF("F16", 1, 2),
      KT_GGUF("Q4_0", 32, 18),
      KT_GGUF("Q4_1", 32, 20),
      KT_GGUF("Q5_0", 32, 22),
      KT_GGUF("Q5_1", 32, 24),
      KT_GGUF("Q8_0", 32, 34),
      KT_GGUF("Q2_K", 256, 84),
      KT_GGUF("Q3_K", 256, 110),
      KT_GGUF("Q4_K", 256, 144),
      KT_GGUF("Q5_K", 256, 176),
      KT_GGUF("Q6_K", 256, 210),
      KT_GGUF("IQ4_NL", 32, 18),
      KT_GGUF("IQ4_XS", 256, 136),
      KT_GGUF("MXFP4", 32, 17),
  };
  return all;
}

// A matrix with its bytes, each part in memory of its own.
struct Matrix {
  std::vector<std::unique_ptr<uint8_t[]>> memory;
  SourceMatrix source;
};

// Bytes below 0x3c are finite in every type, and as scales and codes of ordinary size. Zero points
// of gptq must not be stored as 15.
uint8_t random_byte(std::mt19937* generator) {
  const auto byte = static_cast<uint8_t>((*generator)() % 0x3c);
  return byte % 16 == 15 ? byte - 1 : byte;
}

Matrix make_matrix(const Case& test, int64_t n, int64_t k, std::mt19937* generator) {
  Matrix matrix;
  std::vector<SourcePart> parts;
  for (const Part& part : test.parts(n, k)) {
    const int64_t count =
        std::accumulate(part.shape.begin(), part.shape.end(), int64_t{1}, std::multiplies<>());
    const int64_t bytes = count * dtype_bits(part.dtype) / 8;
    matrix.memory.push_back(std::make_unique<uint8_t[]>(bytes));
    for (int64_t i = 0; i < bytes; ++i) matrix.memory.back()[i] = random_byte(generator);
    parts.push_back({matrix.memory.back().get(), part.dtype, part.shape});
  }
  matrix.source = open_source(SourceFormat::parse(test.source), parts, n, k);
  return matrix;
}

TEST(Sources, ReadTheirPartsAndNoByteMore) {
  std::mt19937 generator(8);
  for (const Case& test : cases()) {
    for (const auto& [rows, columns] : {std::pair{1, 1}, std::pair{70, 328}, std::pair{130, 900}}) {
      const int64_t n = round_up(rows, test.n_unit), k = round_up(columns, test.k_unit);
      SCOPED_TRACE(testing::Message() << test.source << " [" << n << ", " << k << "]");
      const Matrix matrix = make_matrix(test, n, k, &generator);
      const PackedLayout layout = source_layout(matrix.source);
      std::vector<uint8_t> packed(layout.panel_bytes(k));
      for (int64_t p = 0; p < layout.num_panels(n); ++p) {
        const std::vector<SourceRows> part = matrix_source_rows(matrix.source, p);
        pack_source_panel(layout, part, packed.data());
        std::vector<float> found(64 * k);
        dequantize_panel(layout, k, packed.data(), found.data());
        const auto values = std::make_unique<float[]>(part[0].count * k);
        decode_rows(matrix.source, part[0].first, part[0].count, values.get());
        const bool rounds = layout.format == WeightFormat::kBFloat16;
        for (int64_t i = 0; i < part[0].count * k; ++i) {
          const float value = rounds ? bf16_to_float(float_to_bf16(values[i])) : values[i];
          ASSERT_EQ(found[i], value) << "row " << i / k << " at " << i % k;
          ASSERT_TRUE(std::isfinite(value));
        }
      }
    }
  }
}

TEST(Sources, W13PanelsHaveGateBeforeUp) {
  std::mt19937 generator(9);
  for (const Case& test : cases()) {
    const int64_t n = round_up(40, test.n_unit), k = round_up(64, test.k_unit);
    const Matrix gate = make_matrix(test, n, k, &generator);
    const Matrix up = make_matrix(test, n, k, &generator);
    const PackedLayout layout = source_layout(gate.source);
    std::vector<uint8_t> packed(layout.panel_bytes(k));
    std::vector<float> found(64 * k), values(8 * k);
    const int64_t p = num_w13_panels(n) - 1;
    pack_source_panel(layout, w13_source_rows(gate.source, up.source, p), packed.data());
    dequantize_panel(layout, k, packed.data(), found.data());
    for (int column = 0; column < 64; ++column) {
      const int64_t row = 32 * p + column % 32, first = row / 8 * 8;
      std::fill(values.begin(), values.end(), 0.0f);
      if (row < n) {
        decode_rows((column < 32 ? gate : up).source, first, std::min<int64_t>(8, n - first),
                    values.data());
      }
      if (layout.format == WeightFormat::kBFloat16)
        for (float& value : values) value = bf16_to_float(float_to_bf16(value));
      const auto value = values.begin() + (row - first) * k;
      EXPECT_TRUE(std::equal(value, value + k, found.begin() + column * k))
          << test.source << " column " << column;
    }
  }
}

// Files cut for two and for three nodes, in layers on one, two and three.
TEST(Sources, BecomeTheSamePanelsOnEveryNumberOfNodes) {
  std::mt19937 generator(3);
  const auto matrix_of = [&](const std::string& source, int64_t n, int64_t k) {
    const auto is_it = [&](const Case& test) { return test.source == source; };
    return make_matrix(*std::find_if(cases().begin(), cases().end(), is_it), n, k, &generator);
  };
  MoeConfig config = config_of("int8f_n64k4_v1", 192, 384, 3, 1);
  config.layouts[1] = PackedLayout::parse("int4fg128_n64k8_v1");
  std::vector<Matrix> matrices;
  std::vector<ExpertStore::Encoded> experts;
  for (const int expert : config.expert_ids) {
    for (int i = 0; i < 2; ++i) matrices.push_back(matrix_of("kt_int8x2_rows", 384, 192));
    matrices.push_back(matrix_of("kt_int4x3_columns", 192, 384));
    const auto last = matrices.end();
    experts.push_back({expert, last[-3].source, last[-2].source, last[-1].source});
  }
  const auto packed_on = [&](const std::vector<int>& threads_by_node) {
    WorkerPool pool(plan_of(threads_by_node));
    ExpertStore store(config, pool);
    store.load_sources(experts);
    std::vector<std::vector<uint8_t>> found;
    for (const int expert : config.expert_ids) {
      for (const Projection projection : {Projection::kW13, Projection::kW2})
        found.emplace_back(store.num_panels(projection) * store.panel_bytes(projection));
      store.export_packed(expert, found.end()[-2].data(), found.end()[-1].data());
    }
    return found;
  };
  const auto on_one = packed_on({1});
  for (const auto& threads : {std::vector{2}, {1, 1}, {2, 1, 1}})
    EXPECT_EQ(packed_on(threads), on_one) << threads.size() << " nodes";
}

TEST(Sources, PartsThatAreTooSmallAreRefused) {
  std::mt19937 generator(10);
  for (const Case& test : cases()) {
    const int64_t n = round_up(70, test.n_unit), k = round_up(328, test.k_unit);
    const Matrix matrix = make_matrix(test, n, k, &generator);
    for (size_t i = 0; i < matrix.source.parts.size(); ++i) {
      for (size_t dimension = 0; dimension < matrix.source.parts[i].shape.size(); ++dimension) {
        std::vector<SourcePart> parts = matrix.source.parts;
        --parts[i].shape[dimension];
        EXPECT_THROW(open_source(matrix.source.format, parts, n, k), Error)
            << test.source << " part " << i;
      }
    }
  }
}

}  // namespace
}  // namespace kt
