#include <errno.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "system/numa_arena.h"
#include "system/topology.h"

namespace kt {
namespace {

constexpr size_t kHuge = size_t{2} << 20;

int first_node() { return detect_topology().nodes.front().id; }

bool all_zero(const uint8_t* data, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    if (data[i] != 0) return false;
  }
  return true;
}

TEST(NumaArena, EmptyArenasHaveNoMapping) {
  for (const NumaArena& arena : {NumaArena(), NumaArena(0, 0)}) {
    EXPECT_EQ(arena.data(), nullptr);
    EXPECT_EQ(arena.size(), 0u);
    EXPECT_EQ(arena.report().bytes, 0u);
  }
}

TEST(NumaArena, IsZeroWritableAndAligned) {
  for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{5000}, kHuge - 1, kHuge, kHuge + 1}) {
    NumaArena arena(bytes, -1);
    EXPECT_EQ(arena.size(), bytes);
    EXPECT_EQ(arena.node_id(), -1);
    EXPECT_FALSE(arena.bound());
    const uintptr_t address = reinterpret_cast<uintptr_t>(arena.data());
    EXPECT_EQ(address % (bytes >= kHuge ? kHuge : size_t{4096}), 0u) << bytes;
    EXPECT_TRUE(all_zero(arena.data(), bytes));
    std::memset(arena.data(), 0x5a, bytes);
  }
}

TEST(NumaArena, ReportsNothingResidentBeforeTheFirstTouch) {
  const NumaArena arena(8 * kHuge, -1);
  EXPECT_EQ(arena.report().bytes, 8 * kHuge);
  EXPECT_EQ(arena.report().resident_bytes, 0u);
  EXPECT_EQ(arena.report().local_bytes, 0u);
}

TEST(NumaArena, ReportsOnlyItsOwnPages) {
  // made one after the other they are likely neighbours in the address space
  std::vector<NumaArena> arenas;
  for (int i = 0; i < 4; ++i) arenas.emplace_back(3 * 4096, -1);
  for (size_t i = 0; i < arenas.size(); ++i) std::memset(arenas[i].data(), 1, 4096 * i);
  for (size_t i = 0; i < arenas.size(); ++i) {
    EXPECT_EQ(arenas[i].report().resident_bytes, 4096 * i);
    EXPECT_EQ(arenas[i].report().local_bytes, 4096 * i);
  }
}

TEST(NumaArena, BindsToANodeAndUsesHugePages) {
  const Topology topology = detect_topology();
  if (!topology.can_bind) GTEST_SKIP() << "the kernel refuses mbind";
  NumaArena arena(4 * kHuge, topology.nodes.front().id);
  EXPECT_TRUE(arena.bound()) << arena.warning();
  std::memset(arena.data(), 1, arena.size());
  const PageReport report = arena.report();
  EXPECT_EQ(report.resident_bytes, 4 * kHuge);
  EXPECT_EQ(report.local_bytes, report.resident_bytes);
  std::string setting;
  std::getline(std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled"), setting);
  if (setting.empty() || setting.find("[never]") != std::string::npos) {
    EXPECT_EQ(report.huge_bytes, 0u);
  } else {
    // the kernel may lack free huge pages for some, hardly for all four
    EXPECT_GT(report.huge_bytes, 0u);
    EXPECT_LE(report.huge_bytes, report.resident_bytes);
  }
}

TEST(NumaArena, MovingLeavesTheSourceEmpty) {
  NumaArena first(5000, -1);
  uint8_t* data = first.data();
  data[4999] = 7;
  NumaArena second(std::move(first));
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(second.data()[4999], 7);
  EXPECT_EQ(first.data(), nullptr);  // NOLINT(bugprone-use-after-move): what is tested
  NumaArena third(100, -1);
  third = std::move(second);
  EXPECT_EQ(third.data(), data);
  EXPECT_EQ(third.size(), 5000u);
  third = NumaArena();
  EXPECT_EQ(third.data(), nullptr);
}

TEST(NumaArena, ANodeThatIsNotThereIsAWarning) {
  for (const int node : {1023, 5000}) {
    NumaArena arena(10000, node);
    EXPECT_FALSE(arena.bound());
    EXPECT_NE(arena.warning().find("NUMA node " + std::to_string(node)), std::string::npos);
    std::memset(arena.data(), 1, arena.size());
    EXPECT_EQ(arena.report().resident_bytes, 12288u);
  }
}

TEST(NumaArena, AnImpossibleSizeIsAnErrorThatNamesIt) {
  for (const size_t bytes : {size_t{1} << 60, SIZE_MAX}) {
    try {
      NumaArena arena(bytes, 0);
      ADD_FAILURE() << bytes;
    } catch (const Error& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find(std::to_string(bytes)), std::string::npos) << text;
      EXPECT_NE(text.find("NUMA node 0"), std::string::npos) << text;
    }
  }
}

// Answers EPERM to the NUMA system calls, as Docker's default profile does without CAP_SYS_NICE.
bool forbid_numa_calls() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mbind, 3, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_set_mempolicy, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_move_pages, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
  };
  const sock_fprog program = {std::size(filter), filter};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST(NumaArenaDeathTest, RefusedSystemCallsAreWarnings) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const int node = first_node();
  const auto run = [node] {
    if (!forbid_numa_calls()) _exit(0);
    const Topology topology = detect_topology();
    if (topology.can_bind) _exit(1);
    if (topology.warnings.size() != 1) _exit(2);
    if (topology.warnings[0].find("Operation not permitted") == std::string::npos) _exit(3);
    if (plan_pool(topology, 0, 0).nodes[0].bind_memory) _exit(4);
    NumaArena arena(2 * kHuge, node);
    if (arena.bound() || arena.warning().empty()) _exit(5);
    std::memset(arena.data(), 1, arena.size());
    // it cannot be told where the pages are: all count as local
    if (arena.report().local_bytes != 2 * kHuge) _exit(6);
    _exit(0);
  };
  EXPECT_EXIT(run(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace kt
