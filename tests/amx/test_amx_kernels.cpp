// What the kernels in tiles do, counted by the interpreter; the tiles of a thread through forks,
// threads and other libraries; and the check of one expert before they are used. That their results
// are right for all shapes is in tests/cpp/test_kernels.cpp, which runs on this tier too.
#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <thread>

#include "amx/interpreter.h"
#include "base/cpu_features.h"
#include "cpp/child_process.h"
#include "cpp/gemm_problem.h"
#include "engine/kernel_bench.h"
#include "moe/moe_layer.h"
#include "moe/tile_check.h"

namespace kt {
namespace {

const GemmKernel& kernel_named(const std::string& name) {
  for (const GemmKernel& kernel : list_gemm_kernels()) {
    if (kernel.name == name) return kernel;
  }
  throw std::runtime_error("no kernel " + name);
}

const char* const kInt8Row = "gemm_u8_int8_fp32_32x64x4_amxint8";
const char* const kInt4Row = "gemm_s8_int4x_fp32_32x64x4_amxint8";
const char* const kInt4ToBf16Row = "gemm_s8_int4b_fp32_32x64x2_amxbf16";
const char* const kInt8ToBf16Row = "gemm_s8_int8hb_fp32_32x64x2_amxbf16";
const char* const kFp4ToBf16Row = "gemm_s8_fp4b_fp32_32x64x2_amxbf16";
const char* const kFp8ToBf16Row = "gemm_bf16_fp8b_fp32_32x64x2_amxbf16";
const char* const kBf16Row = "gemm_bf16_bf16_fp32_32x64x2_amxbf16";

struct Counts {
  uint64_t products, loads, stores, zeros, configs, releases, bytes_loaded;
};

Counts counts() {
  const auto of = [](const char* name) { return kt_amx_counter(name); };
  return {of("tdpbusd") + of("tdpbsud") + of("tdpbssd") + of("tdpbuud") + of("tdpbf16ps"),
          of("loads") + of("streaming_loads"),
          of("stores"),
          of("zeros"),
          of("configs"),
          of("releases"),
          of("bytes_loaded")};
}

// Of one call on m rows.
Counts counts_of(const char* name, int group_size, int m, int k) {
  const GemmKernel& kernel = kernel_named(name);
  const Problem p =
      make_problem(layout_of(kernel.weights, group_size), m, k, 64, false, Fill::kRandom, 1);
  kt_amx_counters_reset();
  run_gemm(kernel, p);
  return counts();
}

struct Row {
  const char* name;
  int group_size;
  int tile_k;  // k of one product
};
const Row kRows[] = {{kInt8Row, 0, 64},        {kInt4Row, 0, 64},        {kInt4Row, 128, 64},
                     {kInt4ToBf16Row, 32, 32}, {kInt8ToBf16Row, 32, 32}, {kFp4ToBf16Row, 32, 32},
                     {kFp8ToBf16Row, 32, 32},  {kBf16Row, 0, 32}};

class AmxCounts : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_NE(cpu_features().chosen & kIsaAmxInt8, 0u) << "run with KT_FORCE_ISA=amx";
    if (!kt_amx_is_emulating()) GTEST_SKIP() << "this host has AMX: nothing is counted";
  }
};

// 2 x 2 tiles of C: one load a product, each tile of B once for 32 rows, and nothing leaves the
// tiles but the sums.
TEST_F(AmxCounts, BlocksOf32RowsLoadOneTileAProduct) {
  constexpr int k = 512, m = 64;
  for (const Row& row : kRows) {
    SCOPED_TRACE(testing::Message() << row.name << " group " << row.group_size);
    const Counts found = counts_of(row.name, row.group_size, m, k);
    const uint64_t chunks = k / row.tile_k;
    const uint64_t blocks = m / 32;
    EXPECT_EQ(found.products, blocks * 2 * 4 * chunks);
    EXPECT_EQ(found.loads, found.products);
    EXPECT_EQ(found.bytes_loaded, found.loads * 1024);
    // four tiles a half of the columns, and again for each group that ends in the tiles
    const uint64_t flushes = row.group_size == 128 ? k / 128 : 1;
    EXPECT_EQ(found.stores, blocks * 2 * 4 * flushes);
    EXPECT_EQ(found.zeros, found.stores);
    EXPECT_EQ(found.configs, 1u);
    EXPECT_EQ(found.releases, 1u);
  }
}

// 1 x 4 tiles: one of A and four of B for four products.
TEST_F(AmxCounts, BlocksOf16RowsReadThePanelOnce) {
  constexpr int k = 512;
  for (const Row& row : kRows) {
    for (const int m : {5, 16}) {
      SCOPED_TRACE(testing::Message() << row.name << " m " << m);
      const Counts found = counts_of(row.name, row.group_size, m, k);
      const uint64_t chunks = k / row.tile_k;
      EXPECT_EQ(found.products, 4 * chunks);
      EXPECT_EQ(found.loads, 5 * chunks);
    }
  }
}

TEST_F(AmxCounts, RowsBehindWholeBlocksTakeTheSmallerForm) {
  const Counts found = counts_of(kInt8Row, 0, 40, 256);
  EXPECT_EQ(found.products, (2 * 4 + 4) * 4u);
  EXPECT_EQ(found.loads, (2 * 4 + 5) * 4u);
}

class Tiles : public testing::Test {
 protected:
  void SetUp() override { ASSERT_NE(cpu_features().chosen & kIsaAmxInt8, 0u); }
  void TearDown() override { release_tiles(); }

  static bool multiplies_right() {
    const GemmKernel& kernel = kernel_named(kInt8Row);
    const Problem p =
        make_problem({WeightFormat::kInt8, 0, 0}, 20, 128, 64, true, Fill::kRandom, 9);
    const std::vector<float> c = run_gemm(kernel, p);
    const std::vector<float> expected = integer_result(p);
    return first_difference(c.data(), expected.data(), static_cast<int64_t>(c.size())) == -1;
  }
};

TEST_F(Tiles, BelongToAThread) {
  require_tiles();
  bool right[4] = {};
  {
    std::vector<std::jthread> threads;
    for (bool& result : right) threads.emplace_back([&result] { result = multiplies_right(); });
  }
  for (const bool result : right) EXPECT_TRUE(result);
  EXPECT_TRUE(multiplies_right());
}

// A fork's thread starts without tiles, whatever its parent noted; the parent keeps its own.
TEST_F(Tiles, AreConfiguredAnewInAFork) {
  require_tiles();
  EXPECT_EQ(in_child([] { return multiplies_right() ? "right" : "wrong"; }), "right");
  EXPECT_TRUE(multiplies_right());
}

TEST_F(Tiles, AreConfiguredAnewAfterAnotherLibrary) {
  require_tiles();
  asm volatile("tilerelease");  // as oneDNN's brgemm leaves them
  forget_tiles();
  EXPECT_TRUE(multiplies_right());
}

// Why forget_tiles() is needed.
TEST_F(Tiles, ThatAnotherLibraryReleasedAreIllegal) {
  EXPECT_EXIT(
      {
        require_tiles();
        asm volatile("tilerelease");
        multiplies_right();
      },
      testing::KilledBySignal(SIGILL), "");
}

MoeConfig layer_config(const char* layout, const char* w2) {
  MoeConfig config;
  config.num_experts = 3;
  config.top_k = 2;
  config.hidden_size = 192;
  config.intermediate_size = 160;
  config.set_layout(PackedLayout::parse(layout));
  if (w2 != nullptr) config.layouts[1] = PackedLayout::parse(w2);
  config.expert_ids = {0, 1, 2};
  return config;
}

// A loaded layer on two threads, and a batch of which every expert gets rows for both forms of a
// block.
class LayerOnTiles {
 public:
  LayerOnTiles(const char* layout, IsaSet isa, float spread = 0.07f, const char* w2 = nullptr)
      : pool_(plan()), layer_(layer_config(layout, w2), pool_, make_moe_scratch(), isa) {
    RandomNumbers random(3);
    const MoeConfig& config = layer_.config();
    std::vector<std::vector<float>> matrices;
    std::vector<ExpertStore::Source> sources;
    for (int i = 0; i < 9; ++i) {
      matrices.emplace_back(config.hidden_size * config.intermediate_size);
      for (float& value : matrices.back()) value = spread * random.normal();
    }
    for (int e = 0; e < 3; ++e) {
      sources.push_back({e, matrices[3 * e].data(), matrices[3 * e + 1].data(),
                         matrices[3 * e + 2].data(), DType::kFloat32});
    }
    layer_.store().load(sources);
    hidden_.resize(kTokens * config.hidden_size);
    for (float& value : hidden_) value = random.normal();
    output_.resize(hidden_.size());
    for (int t = 0; t < kTokens; ++t) {
      ids_.insert(ids_.end(), {t % 3, (t + 1 + t % 2) % 3});
      weights_.insert(weights_.end(), {0.5f, 0.25f});
    }
  }

  MoeLayer& layer() { return layer_; }

  const std::vector<float>& forward() {
    MoeInput input;
    input.hidden_states = hidden_.data();
    input.dtype = DType::kFloat32;
    input.topk_ids = ids_.data();
    input.id_dtype = DType::kInt32;
    input.topk_weights = weights_.data();
    input.num_tokens = kTokens;
    input.top_k = 2;
    input.output = output_.data();
    layer_.forward(input);
    return output_;
  }

 private:
  static constexpr int kTokens = 130;
  static PoolPlan plan() {
    PoolPlan plan;
    plan.nodes.push_back({0, false, {-1, -1}});
    return plan;
  }

  WorkerPool pool_;
  MoeLayer layer_;
  std::vector<float> hidden_, output_, weights_;
  std::vector<int32_t> ids_;
};

constexpr IsaSet kAmx = kIsaAmxInt8 | kIsaAmxBf16;

class AmxLayer : public Tiles {};

TEST_F(AmxLayer, GivesTheBitsOfAvx512ForIntegerSums) {
  for (const char* layout : {"int8_n64k4_r512_v1", "int4g128_n64k8_r512_v1", "int4_n64k8_v1"}) {
    SCOPED_TRACE(layout);
    LayerOnTiles amx(layout, cpu_features().chosen);
    LayerOnTiles avx512(layout, cpu_features().chosen & ~kAmx);
    ASSERT_NE(amx.layer().explain().find("amxint8"), std::string::npos) << amx.layer().explain();
    kt_amx_counters_reset();
    const std::vector<float> expected = avx512.forward();
    EXPECT_EQ(counts().products, 0u);
    EXPECT_EQ(first_difference(amx.forward().data(), expected.data(),
                               static_cast<int64_t>(expected.size())),
              -1);
    EXPECT_TRUE(!kt_amx_is_emulating() || counts().products > 0);
  }
}

// Threads that wait for work hold no tiles.
TEST_F(AmxLayer, ReleasesTheTilesItConfigured) {
  if (!kt_amx_is_emulating()) GTEST_SKIP() << "this host has AMX: nothing is counted";
  LayerOnTiles layer("bf16_n64k2_v1", cpu_features().chosen);
  kt_amx_counters_reset();
  layer.forward();
  EXPECT_GT(counts().configs, 0u);
  EXPECT_LE(counts().configs, 4u);  // two workers, the phases of w13 and of w2
  EXPECT_EQ(counts().releases, counts().configs);
}

TEST_F(AmxLayer, IsCheckedOnceAndRight) {
  for (const char* layout : {"int8_n64k4_r512_v1", "int4g32_n64k8_r512_v1", "bf16_n64k2_v1"}) {
    SCOPED_TRACE(layout);
    LayerOnTiles first(layout, cpu_features().chosen);
    const TileReport report = first.layer().check_tiles();
    EXPECT_EQ(report.verdict, TileVerdict::kRight) << report.text;
    EXPECT_NE(report.text.find("gave the right result"), std::string::npos) << report.text;
    LayerOnTiles second(layout, cpu_features().chosen);
    EXPECT_EQ(second.layer().check_tiles().text, "");
  }
}

// Products that overflow, and others that tiles flush to zero, are the weights' fault.
TEST_F(AmxLayer, IsNotBlamedForWeightsThatSayNothing) {
  for (const float spread : {0.0f, 1e-20f, 1e-15f, 1e15f}) {
    set_tile_verdict(kernel_named(kBf16Row), TileVerdict::kUnchecked);
    LayerOnTiles layer("bf16_n64k2_v1", cpu_features().chosen, spread);
    EXPECT_EQ(layer.layer().check_tiles().text, "") << spread;
    EXPECT_EQ(tile_verdict(kernel_named(kBf16Row)), TileVerdict::kUnchecked) << spread;
  }
}

void multiply_all_but_the_last_row(const GemmArgs& args) {
  GemmArgs fewer = args;
  --fewer.m;
  kernel_named(kInt8Row).gemm(fewer);
}

// In a child: the wrong row stays in the table.
TEST_F(AmxLayer, FindsAWrongKernel) {
  const std::string found = in_child([] {
    const GemmKernel& right = kernel_named(kInt8Row);
    set_tile_verdict(right, TileVerdict::kUnchecked);
    register_gemm({"gemm_u8_int8_fp32_32x64x4_wrong", right.isa, right.weights, right.a_dtype,
                   right.mr, right.m_from + 1, multiply_all_but_the_last_row, nullptr,
                   GemmSource::kOneDnn, nullptr, right.packing});
    LayerOnTiles layer("int8_n64k4_r512_v1", cpu_features().chosen);
    const TileReport report = layer.layer().check_tiles();
    return report.verdict == TileVerdict::kWrong ? report.text : "not found: " + report.text;
  });
  EXPECT_NE(found.find("is WRONG on this machine"), std::string::npos) << found;
}

void multiply_a_little_wrong(const GemmArgs& args) {
  kernel_named(kInt8Row).gemm(args);
  for (int i = 0; i < args.m; ++i) args.c[i * args.c_stride] *= 1.0001f;
}

// Beside a kernel that may round, an exact one is still judged by its bits. In a child.
TEST_F(AmxLayer, JudgesEachOfTwoKernelsByItsOwnBound) {
  const auto judged = [](const char* w13, const char* w2) {
    return in_child([=] {
      const GemmKernel& exact = kernel_named(kInt8Row);
      const GemmKernel& rounding = kernel_named(kBf16Row);
      for (const GemmKernel* row : {&exact, &rounding})
        set_tile_verdict(*row, TileVerdict::kUnchecked);
      register_gemm({"gemm_u8_int8_fp32_32x64x4_wrong", exact.isa, exact.weights, exact.a_dtype,
                     exact.mr, exact.m_from + 1, multiply_a_little_wrong, nullptr,
                     GemmSource::kOneDnn, nullptr, exact.packing});
      LayerOnTiles layer(w13, cpu_features().chosen, 0.07f, w2);
      const std::string text = layer.layer().check_tiles().text;
      const bool found = tile_verdict(exact) == TileVerdict::kWrong &&
                         tile_verdict(rounding) == TileVerdict::kRight;
      return (found ? "found: " : "not found: ") + text;
    });
  };
  for (const auto& [w13, w2] : {std::pair("int8_n64k4_r512_v1", "bf16_n64k2_v1"),
                                std::pair("bf16_n64k2_v1", "int8_n64k4_r512_v1")}) {
    const std::string text = judged(w13, w2);
    EXPECT_TRUE(text.starts_with("found: ")) << w13 << " " << text;
    EXPECT_NE(text.find(std::string(kInt8Row) + " is WRONG"), std::string::npos) << text;
    EXPECT_NE(text.find(std::string(kBf16Row) + " gave the right"), std::string::npos) << text;
  }
}

TEST_F(AmxLayer, TakesAvx512OnceItsKernelWasFoundWrong) {
  LayerOnTiles layer("int4g128_n64k8_r512_v1", cpu_features().chosen);
  const std::vector<float> before = layer.forward();
  set_tile_verdict(kernel_named(kInt4Row), TileVerdict::kWrong);
  kt_amx_counters_reset();
  EXPECT_EQ(
      first_difference(layer.forward().data(), before.data(), static_cast<int64_t>(before.size())),
      -1);
  EXPECT_EQ(counts().products, 0u);
  EXPECT_EQ(layer.layer().explain().find("amxint8"), std::string::npos);
  set_tile_verdict(kernel_named(kInt4Row), TileVerdict::kUnchecked);
}

// Rows of one kernel share what was found wrong, for it may be the kernel; each has an expansion of
// its own to be found right with.
TEST(TileVerdicts, AreSharedWhereTheKernelMayBeWrong) {
  const GemmKernel& found = kernel_named(kFp4ToBf16Row);
  const GemmKernel& sharing = kernel_named(kInt4ToBf16Row);
  set_tile_verdict(found, TileVerdict::kUnchecked);
  for (const TileVerdict verdict : {TileVerdict::kRight, TileVerdict::kSlower}) {
    set_tile_verdict(found, verdict);
    EXPECT_EQ(tile_verdict(found), verdict);
    EXPECT_EQ(tile_verdict(sharing), TileVerdict::kUnchecked);
  }
  set_tile_verdict(found, TileVerdict::kWrong);
  EXPECT_EQ(tile_verdict(found), TileVerdict::kWrong);
  EXPECT_EQ(tile_verdict(sharing), TileVerdict::kWrong);
  EXPECT_EQ(tile_verdict(kernel_named(kInt8ToBf16Row)), TileVerdict::kUnchecked);
  set_tile_verdict(sharing, TileVerdict::kUnchecked);
  EXPECT_EQ(tile_verdict(found), TileVerdict::kUnchecked);
}

TEST(JudgeTiles, RefusesADifferenceAndComparesTimes) {
  const GemmKernel& exact = kernel_named(kInt8Row);
  const GemmKernel& rounding = kernel_named(kBf16Row);
  EXPECT_EQ(judge_tiles(exact, 1e-7, "the scalar kernels", 0, 0).verdict, TileVerdict::kWrong);
  EXPECT_EQ(judge_tiles(rounding, 0.03, "the scalar kernels", 0, 0).verdict, TileVerdict::kRight);
  EXPECT_EQ(judge_tiles(rounding, 0.04, "the scalar kernels", 0, 0).verdict, TileVerdict::kWrong);
  EXPECT_EQ(judge_tiles(rounding, NAN, "the scalar kernels", 0, 0).verdict, TileVerdict::kWrong);
  EXPECT_EQ(judge_tiles(exact, 0, "", 1e-3, 2e-3).verdict, TileVerdict::kRight);
  const TileReport slower = judge_tiles(exact, 0, "", 2e-3, 1e-3);
  EXPECT_EQ(slower.verdict, TileVerdict::kSlower);
  EXPECT_EQ(slower.text,
            "One expert took 2 ms with gemm_u8_int8_fp32_32x64x4_amxint8 and 1 ms with oneDNN's "
            "kernel, so oneDNN's is used; KT_GEMM=native fixes the other choice.");
  EXPECT_NE(judge_tiles(exact, 1, "the scalar kernels", 0, 0).text.find("is WRONG"),
            std::string::npos);
}

const GemmKernel* shortened = nullptr;

void multiply_all_but_the_last_tile(const GemmArgs& args) {
  GemmArgs fewer = args;
  fewer.k -= 32;
  shortened->gemm(fewer);
}

// The bench lets the roundings of bf16 pass and nothing else. In a child, for its rows stay.
TEST_F(Tiles, AndNoneLostPassTheBench) {
  const std::string found = in_child([] {
    std::string wrong;
    std::deque<std::string> names;
    for (const char* name : {kInt8ToBf16Row, kFp4ToBf16Row, kFp8ToBf16Row, kBf16Row}) {
      shortened = &kernel_named(name);
      GemmKernel planted = *shortened;
      planted.name = names.emplace_back(std::string("short_") + name).c_str();
      planted.m_from = 0;
      planted.gemm = multiply_all_but_the_last_tile;
      planted.source = GemmSource::kOneDnn;
      register_gemm(planted);
      const int group_size = has_groups(planted.weights) ? 32 : 0;
      for (const int k : {64, 4096}) {
        KernelBench bench(layout_of(planted.weights, group_size), k, 16, int64_t{4} << 20);
        for (const std::string& row : bench.kernels()) {
          for (const int m : {1, 16}) {
            if (bench.matches(row, m) == row.starts_with("short_"))
              wrong += row + " at k " + std::to_string(k) + "; ";
          }
        }
      }
    }
    return wrong;
  });
  EXPECT_EQ(found, "");
}

// oneDNN's row for as many rows as ours was for; made up, for the real one is in the extension.
TEST(JudgeTiles, ASlowerKernelLeavesItsPlaceToOneDnn) {
  const IsaSet isa = cpu_features().chosen;
  register_gemm({"gemm_u8_int8_fp32_32x64x4_test", isa, WeightFormat::kInt8, DType::kUint8, 32, 0,
                 kernel_named(kInt8Row).gemm, nullptr, GemmSource::kOneDnn});
  KernelRequest request{WeightFormat::kInt8, isa, GemmChoice::kAuto};
  EXPECT_STREQ(select_kernels(request).for_rows(5).name, kInt8Row);
  set_tile_verdict(kernel_named(kInt8Row), TileVerdict::kSlower);
  const KernelSet set = select_kernels(request);
  EXPECT_STREQ(set.for_rows(5).name, "gemm_u8_int8_fp32_32x64x4_test");
  EXPECT_STREQ(set.for_rows(4).name, "gemm_u8_int8_fp32_6x64x4_avx512vnni");
  EXPECT_NE(explain_kernels(request).find("m>=5 gemm_u8_int8_fp32_32x64x4_test"),
            std::string::npos);
  set_tile_verdict(kernel_named(kInt8Row), TileVerdict::kUnchecked);
}

TEST(Deterministic, LeavesOutWhatRoundsByTheRowsBesideIt) {
  const IsaSet isa = cpu_features().chosen;
  for (const bool deterministic : {false, true}) {
    KernelRequest request{WeightFormat::kBFloat16, isa, GemmChoice::kNative};
    request.deterministic = deterministic;
    EXPECT_EQ(select_kernels(request).tile_gemm() == nullptr, deterministic);
    request.weights = WeightFormat::kInt4;
    request.group_size = 64;
    EXPECT_EQ(select_kernels(request).tile_gemm() == nullptr, deterministic);
    request.group_size = 128;
    EXPECT_NE(select_kernels(request).tile_gemm(), nullptr);
    request.weights = WeightFormat::kInt8;
    EXPECT_NE(select_kernels(request).tile_gemm(), nullptr);
  }
}

}  // namespace
}  // namespace kt
