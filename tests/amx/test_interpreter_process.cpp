// The interpreter as a part of a process: threads, signals, fork, faults, and the permission.
#include <gtest/gtest.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>

#include <atomic>
#include <barrier>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "amx/interpreter.h"
#include "amx/tile_instructions.h"

namespace kt_amx {
namespace {

bool is_configured() {
  const TileConfig none;
  const TileConfig stored = stored_config();
  return std::memcmp(&stored, &none, sizeof stored) != 0;
}

class Process : public testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(request_tiles(), 0); }
  void TearDown() override { _tile_release(); }
};

// One product, its operands and its sums.
struct Task {
  explicit Task(int seed) : random(seed) {
    const auto side = [&] { return static_cast<int>(1 + random() % 16); };
    config = config_of_product(side(), side(), side());
    a = random_bytes(random);
    b = random_bytes(random);
    c = random_bytes(random);
    expected = reference_product(Product::kUnsignedSigned, config, c, a, b);
  }
  std::mt19937 random;
  TileConfig config;
  TileBytes a, b, c, expected;
};

TEST_F(Process, EveryThreadHasTilesOfItsOwn) {
  constexpr int kThreads = 8;
  load_config(config_of_product(16, 16, 16));
  std::barrier all(kThreads);
  std::atomic<int> num_right{0};
  std::vector<std::thread> threads;
  for (int index = 0; index < kThreads; ++index) {
    threads.emplace_back([&, index] {
      const bool unconfigured = !is_configured();
      const Task task(index);
      // all threads stand between the same two instructions
      load_config(task.config);
      all.arrive_and_wait();
      load_operands(task.c, task.a, task.b);
      all.arrive_and_wait();
      multiply(Product::kUnsignedSigned);
      all.arrive_and_wait();
      num_right += unconfigured && stored_sums() == task.expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_right, kThreads);
  EXPECT_TRUE(is_configured());
}

std::atomic<int> num_ticks{0};

// Leaves no vector register and no flag as it was.
void on_tick(int) {
  __asm__ volatile(
      "vpcmpeqd %%ymm0, %%ymm0, %%ymm0\n vmovdqa %%ymm0, %%ymm1\n vmovdqa %%ymm0, %%ymm2\n"
      "vmovdqa %%ymm0, %%ymm3\n vmovdqa %%ymm0, %%ymm15\n stc"
      :
      :
      : "xmm0", "xmm1", "xmm2", "xmm3", "xmm15", "cc");
  ++num_ticks;
}

TEST_F(Process, SignalsBetweenInstructionsChangeNothing) {
  struct sigaction action = {};
  struct sigaction before = {};
  action.sa_handler = on_tick;
  ASSERT_EQ(sigaction(SIGALRM, &action, &before), 0);
  num_ticks = 0;
  const itimerval often = {{0, 100}, {0, 100}};
  const itimerval never = {};
  setitimer(ITIMER_REAL, &often, nullptr);
  int num_wrong = 0;
  // until enough ticks fell among the products, whatever the machine's timer makes of 100 us
  for (int seed = 0; num_ticks < 500 && seed < 100000; ++seed) {
    const Task task(seed);
    const TileBytes found =
        executed_product(Product::kUnsignedSigned, task.config, task.c, task.a, task.b);
    num_wrong += !(found == task.expected);
  }
  setitimer(ITIMER_REAL, &never, nullptr);
  sigaction(SIGALRM, &before, nullptr);
  EXPECT_EQ(num_wrong, 0);
  EXPECT_GE(num_ticks, 500);
}

// The exit code of a child that returns from `body`, or minus the signal that ended it.
int fork_and_run(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

TEST_F(Process, AForksChildConfiguresAnewAndTheParentGoesOn) {
  const Task task(1);
  load_config(task.config);
  load_operands(task.c, task.a, task.b);
  if (kt_amx_is_emulating()) {
    EXPECT_EQ(fork_and_run([] { return is_configured() ? 1 : 0; }), 0);
    const auto multiply_at_once = [] {
      multiply(Product::kUnsignedSigned);
      return 0;
    };
    EXPECT_EQ(fork_and_run(multiply_at_once), -SIGILL);
  }
  const auto with_own_tiles = [] {
    const Task own(2);
    return executed_product(Product::kUnsignedSigned, own.config, own.c, own.a, own.b) ==
                   own.expected
               ? 0
               : 1;
  };
  EXPECT_EQ(fork_and_run(with_own_tiles), 0);
  multiply(Product::kUnsignedSigned);
  EXPECT_EQ(stored_sums(), task.expected);
}

// Faults. What kills the process is the kernel, not a report of a sanitizer.
void die_by_default() {
  for (const int signal_number : {SIGILL, SIGSEGV, SIGBUS}) signal(signal_number, SIG_DFL);
}

void expect_death(int signal_number, const std::function<void()>& body, const char* what) {
  EXPECT_EXIT(
      {
        die_by_default();
        body();
        _exit(0);
      },
      testing::KilledBySignal(signal_number), "")
      << what;
}

using Faults = Process;

TEST_F(Faults, MalformedConfigurations) {
  std::vector<TileConfig> malformed(9, config_of_product(2, 3, 4));
  malformed[0].palette = 2;
  malformed[1].reserved[5] = 1;
  malformed[2].colsb[0] = 65;
  malformed[3].rows[1] = 17;
  malformed[4].colsb[9] = malformed[4].rows[9] = 4;
  malformed[5].rows[0] = 0;
  malformed[6].colsb[0] = 0;
  malformed[7].rows[15] = 1;
  malformed[8].colsb[3] = 4;
  for (const TileConfig& config : malformed) {
    expect_death(SIGSEGV, [&] { load_config(config); }, "configuration");
  }
}

// In a child, which starts without tiles: with that configuration, the instruction is undefined.
void expect_undefined(const TileConfig& config, const std::function<void()>& instruction,
                      const char* what) {
  const auto body = [&] {
    load_config(config);
    if (!is_configured()) _exit(1);
    instruction();
  };
  expect_death(SIGILL, body, what);
}

TEST_F(Faults, UndefinedInstructions) {
  TileBytes memory;
  expect_death(SIGILL, [] { _tile_zero(0); }, "zero");
  expect_death(SIGILL, [&] { _tile_loadd(0, memory.bytes.data(), 64); }, "load");
  expect_death(SIGILL, [&] { _tile_stream_loadd(0, memory.bytes.data(), 64); }, "streaming load");
  expect_death(SIGILL, [&] { _tile_stored(0, memory.bytes.data(), 64); }, "store");
  const TileConfig small = config_of_product(2, 3, 4);
  const TileConfig full = config_of_product(16, 16, 16);
  expect_undefined(small, [] { _tile_zero(3); }, "a tile that is not configured");
  expect_undefined(small, [] { _tile_dpbssd(1, 0, 2); }, "shapes that do not fit");
  // TDPBSSD tmm0, tmm1, tmm1, which no assembler writes
  expect_undefined(full, [] { __asm__ volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1"); }, "twice");
  if (kt_amx_is_emulating()) {
    // TDPFP16PS tmm0, tmm1, tmm2, which is not ours
    expect_undefined(full, [] { __asm__ volatile(".byte 0xc4, 0xe2, 0x6b, 0x5c, 0xc1"); }, "fp16");
  }
}

TEST_F(Faults, InstructionsBeforeTheOneThatFaultsHaveHappened) {
  const TileConfig config = config_of_product(1, 1, 1);
  static volatile uint8_t* shared;
  shared = static_cast<volatile uint8_t*>(
      mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  shared[0] = 7;
  const auto body = [&] {
    load_config(config);
    __asm__ volatile("tilezero %%tmm0\n tilestored %%tmm0, (%0, %1, 1)\n tilezero %%tmm5"
                     :
                     : "r"(shared), "r"(int64_t{64})
                     : "memory");
  };
  expect_death(SIGILL, body, "a third instruction that faults");
  EXPECT_EQ(shared[0], 0);
  munmap(const_cast<uint8_t*>(shared), 4096);
}

TEST_F(Faults, BadMemory) {
  const TileConfig config = config_of_product(2, 3, 4);
  char* const nowhere =
      static_cast<char*>(mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  const auto load = [&] {
    load_config(config);
    _tile_loadd(0, nowhere, 64);
  };
  const auto store = [&] {
    load_config(config);
    _tile_stored(0, nowhere, 64);
  };
  expect_death(SIGSEGV, load, "load");
  expect_death(SIGSEGV, store, "store");
  expect_death(SIGSEGV, [&] { _tile_loadconfig(nowhere); }, "configuration");
  munmap(nowhere, 4096);
}

TEST_F(Faults, OfOthersStayTheirs) {
  expect_death(SIGILL, [] { __asm__ volatile("ud2"); }, "ud2");
  expect_death(SIGILL, [] { raise(SIGILL); }, "raise");
  signal(SIGILL, SIG_IGN);
  raise(SIGILL);  // ignored, and the tiles still work
  load_config(config_of_product(1, 1, 1));
  EXPECT_TRUE(is_configured());
  EXPECT_EXIT(__asm__ volatile("ud2"), testing::KilledBySignal(SIGILL), "") << "cannot be ignored";
  EXPECT_EQ(signal(SIGILL, SIG_DFL), SIG_IGN);
}

sigjmp_buf after_fault;
std::atomic<int> num_caught{0};

void on_illegal(int, siginfo_t* info, void*) {
  num_caught += info->si_signo == SIGILL;
  siglongjmp(after_fault, 1);
}

TEST_F(Faults, AProgramsHandlerGetsWhatIsNotOurs) {
  struct sigaction action = {};
  struct sigaction old = {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO;
  ASSERT_EQ(sigaction(SIGILL, &action, &old), 0);
  EXPECT_EQ(old.sa_handler, SIG_DFL);
  ASSERT_EQ(sigaction(SIGILL, nullptr, &old), 0);
  EXPECT_EQ(old.sa_sigaction, &on_illegal);
  num_caught = 0;
  _tile_release();
  if (sigsetjmp(after_fault, 1) == 0) __asm__ volatile("ud2");
  EXPECT_EQ(num_caught, 1);
  if (sigsetjmp(after_fault, 1) == 0) _tile_zero(0);
  EXPECT_EQ(num_caught, 2);
  load_config(config_of_product(1, 1, 1));
  EXPECT_TRUE(is_configured());
  EXPECT_EQ(num_caught, 2);
  action.sa_handler = SIG_DFL;
  EXPECT_EQ(sigaction(SIGILL, &action, nullptr), 0);
}

TEST_F(Faults, AHandlerForOneSignalIsCalledOnce) {
  const auto body = [] {
    struct sigaction action = {};
    action.sa_handler = [](int) { ++num_caught; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    num_caught = 0;
    sigaction(SIGILL, &action, nullptr);
    __asm__ volatile("ud2");
  };
  EXPECT_EXIT(body(), testing::KilledBySignal(SIGILL), "");
}

// Each in a process that has not asked yet: a "threadsafe" death test starts the program anew.
class Permission : public testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  void TearDown() override { GTEST_FLAG_SET(death_test_style, "fast"); }
};

int exit_code(bool good) { return good ? 0 : 1; }

TEST_F(Permission, WithoutItTilesAreIllegal) {
  EXPECT_EXIT(_tile_release(), testing::KilledBySignal(SIGILL), "");
  EXPECT_EXIT(load_config(config_of_product(1, 1, 1)), testing::KilledBySignal(SIGILL), "");
}

TEST_F(Permission, OnceGrantedItIsForAllThreadsAndChildren) {
  const auto use_tiles = [] {
    if (request_tiles() != 0) return 1;
    bool configured = false;
    std::thread([&] {
      load_config(config_of_product(1, 1, 1));
      configured = is_configured();
    }).join();
    const int child = fork_and_run([] {
      load_config(config_of_product(1, 1, 1));
      return exit_code(is_configured());
    });
    return exit_code(configured && child == 0);
  };
  EXPECT_EXIT(_exit(use_tiles()), testing::ExitedWithCode(0), "");
}

TEST_F(Permission, RefusedOnDemand) {
  if (!kt_amx_is_emulating()) return;  // a real kernel cannot be told to
  const auto ask = [] {
    setenv("KT_TEST_AMX_PERMISSION", "refused", 1);
    errno = 0;
    const bool refused = request_tiles() == -1 && errno == EINVAL;
    const bool illegal = fork_and_run([] {
                           _tile_release();
                           return 0;
                         }) == -SIGILL;
    unsetenv("KT_TEST_AMX_PERMISSION");
    return exit_code(refused && illegal && request_tiles() == 0);
  };
  EXPECT_EXIT(_exit(ask()), testing::ExitedWithCode(0), "");
}

TEST_F(Permission, IsToldToWhoAsksForTheMask) {
  const auto ask = [] {
    constexpr uint64_t kTileData = uint64_t{1} << 18;
    uint64_t before = 0;
    uint64_t after = 0;
    const long first = syscall(SYS_arch_prctl, 0x1022, &before);
    request_tiles();
    const long second = syscall(SYS_arch_prctl, 0x1022, &after);
    return exit_code(first == 0 && second == 0 && !(before & kTileData) && (after & kTileData));
  };
  EXPECT_EXIT(_exit(ask()), testing::ExitedWithCode(0), "");
}

TEST(SystemCalls, OfOthersAreForwarded) {
  EXPECT_EQ(syscall(SYS_getpid), getpid());
  errno = 0;
  EXPECT_EQ(syscall(SYS_close, -1), -1);
  EXPECT_EQ(errno, EBADF);
  errno = 0;
  EXPECT_EQ(syscall(SYS_arch_prctl, 0x7777, 18), -1);
  EXPECT_EQ(errno, EINVAL);
  // all six arguments: the second page of a file of two
  char name[] = "/tmp/kt_amx_XXXXXX";
  const int file = mkstemp(name);
  ASSERT_GE(file, 0);
  unlink(name);
  ASSERT_EQ(ftruncate(file, 8192), 0);
  ASSERT_EQ(pwrite(file, "x", 1, 4096), 1);
  const long page = syscall(SYS_mmap, nullptr, 4096, PROT_READ, MAP_PRIVATE, file, 4096);
  ASSERT_NE(page, -1);
  EXPECT_EQ(*reinterpret_cast<const char*>(page), 'x');
  munmap(reinterpret_cast<void*>(page), 4096);
  close(file);
}

}  // namespace
}  // namespace kt_amx
