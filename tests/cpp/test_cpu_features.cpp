#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "base/check.h"
#include "base/cpu_features.h"

namespace kt {
namespace {

constexpr IsaSet kAvx2Host = kIsaAvx2 | kIsaAvxVnni;
constexpr IsaSet kAvx512Host =
    kIsaAvx2 | kIsaAvx512 | kIsaAvx512Vnni | kIsaAvx512Bf16 | kIsaAvx512Vbmi;
constexpr IsaSet kAmxHost = kAvx512Host | kIsaAvxVnni | kIsaAmxInt8 | kIsaAmxBf16;

std::string error_of(IsaSet found, const char* force) {
  try {
    choose_features(found, force);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(IsaName, ListsBitsInAscendingOrder) {
  EXPECT_EQ(isa_name(kIsaReference), "reference");
  EXPECT_EQ(isa_name(kIsaAvx512Vnni | kIsaAvx2 | kIsaAvx512), "avx2 avx512 avx512vnni");
  EXPECT_EQ(isa_name(kAmxHost),
            "avx2 avx512 avx512vnni avx512bf16 avx512vbmi avxvnni amxint8 amxbf16");
}

TEST(IsaTier, IsTheHighestMark) {
  EXPECT_EQ(isa_tier(kIsaReference), "reference");
  EXPECT_EQ(isa_tier(kAvx2Host), "avx2");
  EXPECT_EQ(isa_tier(kAvx512Host), "avx512");
  EXPECT_EQ(isa_tier(kAvx512Host | kIsaAmxBf16), "amx");
}

TEST(ChooseFeatures, UsesEverythingWhenNotForced) {
  for (const char* force : {static_cast<const char*>(nullptr), ""}) {
    const CpuFeatures features = choose_features(kAvx512Host, force);
    EXPECT_EQ(features.found, kAvx512Host);
    EXPECT_EQ(features.chosen, kAvx512Host);
    EXPECT_EQ(features.tier, "avx512");
    EXPECT_FALSE(features.reason.empty());
  }
}

TEST(ChooseFeatures, TierAllowsWhatIsAtOrBelowIt) {
  EXPECT_EQ(choose_features(kAmxHost, "reference").chosen, kIsaReference);
  EXPECT_EQ(choose_features(kAmxHost, "avx2").chosen, kAvx2Host);
  EXPECT_EQ(choose_features(kAmxHost, "avx512").chosen, kAvx512Host | kIsaAvxVnni);
  EXPECT_EQ(choose_features(kAmxHost, "amx").chosen, kAmxHost);
  EXPECT_EQ(choose_features(kAvx512Host, "avx2").chosen, kIsaAvx2) << "not more than was found";
  EXPECT_EQ(choose_features(kAmxHost, "avx2").found, kAmxHost);
}

TEST(ChooseFeatures, RemovesFeaturesUnderBothNames) {
  const IsaSet plain = kIsaAvx2 | kIsaAvx512 | kIsaAvx512Vbmi;
  EXPECT_EQ(choose_features(kAvx512Host, "avx512,-vnni,-bf16").chosen, plain);
  EXPECT_EQ(choose_features(kAvx512Host, "avx512,-avx512vnni,-avx512bf16").chosen, plain);
  EXPECT_EQ(choose_features(kAmxHost, "amx,-amxint8").chosen, kAmxHost & ~kIsaAmxInt8);
  EXPECT_EQ(choose_features(kAvx2Host, "avx2,-vnni").chosen, kAvx2Host) << "it is not avxvnni";
  const CpuFeatures features = choose_features(kAvx512Host, "avx512,-vnni");
  EXPECT_TRUE(has(features.reason, "avx512,-vnni")) << features.reason;
  EXPECT_TRUE(has(features.reason, "avx2 avx512 avx512bf16 avx512vbmi")) << features.reason;
}

TEST(ChooseFeatures, RemovesWhatDependsOnARemovedFeature) {
  EXPECT_EQ(choose_features(kAmxHost, "amx,-avx2").chosen, kIsaReference);
  EXPECT_EQ(choose_features(kAmxHost, "amx,-avx2").tier, "reference");
  EXPECT_EQ(choose_features(kAmxHost, "amx,-avx512").chosen, kAvx2Host);
  EXPECT_EQ(choose_features(kAmxHost, "amx,-amxint8,-amxbf16").tier, "avx512");
}

TEST(ChooseFeatures, RefusesUnknownWords) {
  for (const char* force : {"avx", "AVX512", "avx512 ", "avx512,vnni", "avx512,-vnn", "avx512,",
                            "avx512,,-vnni", ",-vnni", "-vnni", "avx512,-", "avx512;-vnni"}) {
    const std::string error = error_of(kAvx512Host, force);
    EXPECT_TRUE(has(error, force)) << force << ": " << error;
    EXPECT_TRUE(has(error, "reference, avx2, avx512, amx")) << force << ": " << error;
  }
}

TEST(ChooseFeatures, RefusesATierTheHostLacks) {
  const std::string error = error_of(kAvx512Host, "amx");
  EXPECT_TRUE(has(error, "amx")) << error;
  EXPECT_TRUE(has(error, "avx2 avx512 avx512vnni avx512bf16 avx512vbmi")) << error;
  EXPECT_NE(error_of(kAvx2Host, "avx512"), "");
  EXPECT_NE(error_of(kIsaReference, "avx2"), "");
  EXPECT_EQ(error_of(kIsaReference, "reference"), "");
}

// CPUID against the kernel's own reading of it.
TEST(CpuFeatures, AgreesWithProcCpuinfo) {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::set<std::string> flags;
  std::string name;
  for (std::string line; std::getline(cpuinfo, line) && (flags.empty() || name.empty());) {
    if (line.rfind("model name", 0) == 0) name = line.substr(line.find(':') + 2);
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) flags.insert(word);
  }
  if (flags.empty()) GTEST_SKIP() << "/proc/cpuinfo has no flags";
  const auto all = [&](std::initializer_list<const char*> names) {
    for (const char* flag : names) {
      if (flags.count(flag) == 0) return false;
    }
    return true;
  };
  IsaSet expected = 0;
  if (all({"avx2", "fma", "f16c"})) expected |= kIsaAvx2;
  if (expected != 0 && all({"avx_vnni"})) expected |= kIsaAvxVnni;
  if (expected != 0 && all({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) {
    expected |= kIsaAvx512;
    if (all({"avx512_vnni"})) expected |= kIsaAvx512Vnni;
    if (all({"avx512_bf16"})) expected |= kIsaAvx512Bf16;
    if (all({"avx512vbmi"})) expected |= kIsaAvx512Vbmi;
    if (all({"amx_tile", "amx_int8"})) expected |= kIsaAmxInt8;
    if (all({"amx_tile", "amx_bf16"})) expected |= kIsaAmxBf16;
  }
  const char* force = std::getenv("KT_FORCE_ISA");
  if (!error_of(expected, force).empty()) GTEST_SKIP() << "KT_FORCE_ISA is not for this host";
  const CpuFeatures& features = cpu_features();
  EXPECT_EQ(isa_name(features.found), isa_name(expected));
  EXPECT_EQ(isa_name(features.chosen), isa_name(choose_features(expected, force).chosen));
  EXPECT_EQ(features.tier, isa_tier(features.chosen));
  EXPECT_TRUE(has(name, features.cpu_name)) << features.cpu_name;
  EXPECT_EQ(&features, &cpu_features());
}

// In a process of its own: cpu_features() keeps its first good answer.
TEST(CpuFeaturesDeathTest, ThrowsOnEveryCallForABadValue) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto run = [] {
    setenv("KT_FORCE_ISA", "sse9", 1);
    int thrown = 0;
    for (int i = 0; i < 3; ++i) {
      try {
        cpu_features();
      } catch (const Error& error) {
        thrown += has(error.what(), "sse9");
      }
    }
    std::exit(thrown);
  };
  EXPECT_EXIT(run(), ::testing::ExitedWithCode(3), "");
}

}  // namespace
}  // namespace kt
