#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "base/check.h"
#include "base/cpu_features.h"

namespace {

// The answer to a request for tiles: 0, an errno, or the kernel's own; and how often it was asked.
constexpr int kAskTheKernel = -1;
std::atomic<int> tile_answer{kAskTheKernel};
std::atomic<int> tile_requests{0};

}  // namespace

// In the place of libc's: what is no request for tiles goes on to it.
extern "C" long syscall(long number, ...) noexcept {
  va_list list;
  va_start(list, number);
  long words[6];
  for (long& word : words) word = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && words[0] == 0x1023 && words[1] == 18) {
    ++tile_requests;
    if (tile_answer != kAskTheKernel) {
      errno = tile_answer;
      return tile_answer == 0 ? 0 : -1;
    }
  }
  using Syscall = long (*)(long, ...);
  static const auto next = reinterpret_cast<Syscall>(dlsym(RTLD_NEXT, "syscall"));
  return next(number, words[0], words[1], words[2], words[3], words[4], words[5]);
}

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

// The recorded machines are in tests/data/cpus (tests/python/test_collect_env.py); here is what no
// such machine says.

CpuReadings avx512_readings() {
  CpuReadings readings;
  readings.brand = "a CPU of a test";
  readings.leaf1_ecx = 1u << 27 | 1u << 28 | 1u << 29 | 1u << 12;  // osxsave, avx, f16c, fma
  readings.leaf7_ebx = 1u << 5 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // avx2, avx512
  readings.xcr0 = 0xe7;
  return readings;
}
constexpr IsaSet kPlainAvx512 = kIsaAvx2 | kIsaAvx512;
constexpr uint32_t kTileBit = 1u << 24;
constexpr uint32_t kTileInt8Bit = 1u << 25;

TEST(DetectFeatures, NeedsWhatIsBelow) {
  CpuReadings readings = avx512_readings();
  EXPECT_EQ(detect_features(readings).found, kPlainAvx512);
  readings.leaf7_1_eax = 1u << 4;
  EXPECT_EQ(detect_features(readings).found, kPlainAvx512 | kIsaAvxVnni);
  readings.xcr0 = 0x67;
  EXPECT_EQ(detect_features(readings).found, kAvx2Host);
  readings.leaf7_ebx &= ~(1u << 5);
  EXPECT_EQ(detect_features(readings).found, kIsaReference);
  EXPECT_EQ(detect_features(CpuReadings{}).found, kIsaReference);
}

TEST(DetectFeatures, TakesTheKernelsWordForTiles) {
  CpuReadings readings = avx512_readings();
  readings.tile_errno = 0;
  EXPECT_EQ(detect_features(readings).found, kPlainAvx512 | kIsaAmxInt8 | kIsaAmxBf16);
  EXPECT_EQ(choose_features(readings, "amx").reason,
            "KT_FORCE_ISA=\"amx\" leaves avx2 avx512 amxint8 amxbf16 of avx2 avx512 amxint8 "
            "amxbf16; amx although CPUID does not report amx_tile, because the kernel grants "
            "tiles.");
  EXPECT_EQ(choose_features(readings, "amx").cpu_name, "a CPU of a test");
  readings.leaf7_edx = kTileBit | kTileInt8Bit;
  EXPECT_EQ(detect_features(readings).found, kPlainAvx512 | kIsaAmxInt8);
  EXPECT_EQ(detect_features(readings).left_out, "");
  readings.leaf7_edx = kTileBit;
  EXPECT_EQ(detect_features(readings).found, kPlainAvx512);
  EXPECT_TRUE(has(detect_features(readings).left_out, "amx_int8, amx_bf16"));
  readings.leaf7_edx = kTileBit | kTileInt8Bit;
  readings.xcr0 = 0x7;
  EXPECT_EQ(detect_features(readings).found, kIsaAvx2) << "tiles need AVX-512 beside them";
}

TEST(DetectFeatures, RefusesAForcedTierThatTheKernelRefuses) {
  CpuReadings readings = avx512_readings();
  readings.tile_errno = EPERM;
  EXPECT_EQ(choose_features(readings, nullptr).tier, "avx512");
  EXPECT_EQ(choose_features(readings, "avx512").tier, "avx512");
  try {
    choose_features(readings, "amx");
    FAIL() << "the kernel refused the tiles";
  } catch (const Error& error) {
    EXPECT_TRUE(has(error.what(), "has only: avx2 avx512; give avx512")) << error.what();
    EXPECT_TRUE(has(error.what(), "errno 1, Operation not permitted), which CPUID does not report"))
        << error.what();
  }
}

TEST(ReadCpu, AsksForTilesWhereTheyAreOrWhenToldTo) {
  tile_requests = 0;
  const CpuReadings plain = read_cpu(false);
  const bool has_tiles = (plain.leaf7_edx & kTileBit) != 0 && (plain.xcr0 >> 17 & 3) == 3;
  EXPECT_EQ(plain.tile_errno.has_value(), has_tiles);
  EXPECT_EQ(tile_requests, has_tiles ? 1 : 0);
  for (const int answer : {EINVAL, ENOSYS, 0}) {
    tile_requests = 0;
    tile_answer = answer;
    EXPECT_EQ(read_cpu(true).tile_errno, answer);
    EXPECT_EQ(tile_requests, 1);
  }
  tile_answer = kAskTheKernel;
}

// In processes of their own: the readings are made once.
TEST(CpuFeaturesDeathTest, AsksForTilesThatAreForced) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto run = [](const char* force, int answer) {
    setenv("KT_FORCE_ISA", force, 1);
    tile_answer = answer;
    std::string tier;
    try {
      tier = cpu_features().tier;
    } catch (const Error& error) {
      tier = has(error.what(), "asks for the tier amx") ? "refused" : error.what();
    }
    std::fprintf(stderr, "tier %s after %d requests\n", tier.c_str(), tile_requests.load());
    std::exit(0);
  };
  const auto exited = ::testing::ExitedWithCode(0);
  const bool has_avx512 = (detect_features(read_cpu(false)).found & kIsaAvx512) != 0;
  EXPECT_EXIT(run("amx,-amxbf16", 0), exited,
              has_avx512 ? "tier amx after 1 requests" : "tier refused after 1 requests");
  EXPECT_EXIT(run("amx", EINVAL), exited, "tier refused after 1 requests");
  if (!read_cpu(false).tile_errno.has_value()) {
    EXPECT_EXIT(run("reference", 0), exited, "tier reference after 0 requests");
  }
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
