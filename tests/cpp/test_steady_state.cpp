// A forward that was done before: no heap, no lock, no system call, and the barriers and bytes that
// it must cost.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>

#include "base/cpu_features.h"
#include "child_process.h"
#include "counted_allocations.h"
#include "moe/moe_layer.h"
#include "random_tensors.h"

namespace {

std::atomic<uint64_t> num_locks{0};

}  // namespace

// In place of the C library's, for the whole program.
extern "C" int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  static const auto next =
      reinterpret_cast<int (*)(pthread_mutex_t*)>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
  ++num_locks;
  return next(mutex);
}

namespace kt {
namespace {

constexpr int kHidden = 256;
constexpr int kIntermediate = 128;
constexpr int kExperts = 8;
constexpr int kTopK = 2;
constexpr int kFewTokens = 2;
constexpr int kManyTokens = 100;  // 25,600 values: more than each worker quantizes for itself

// Workers that never sleep: what a barrier takes on a busy machine is not the forward's.
WorkerPoolOptions spinning() {
  WorkerPoolOptions options;
  options.spin_us = 60'000'000;
  return options;
}

PoolPlan two_threads() {
  PoolPlan plan;
  plan.nodes.push_back({0, false, {-1, -1}});
  return plan;
}

MoeConfig config_of(const char* layout) {
  MoeConfig config;
  config.num_experts = kExperts;
  config.top_k = kTopK;
  config.hidden_size = kHidden;
  config.intermediate_size = kIntermediate;
  config.set_layout(PackedLayout::parse(layout));
  for (int e = 0; e < kExperts; ++e) config.expert_ids.push_back(e);
  return config;
}

// A loaded layer and inputs for as many tokens as asked.
class Steady {
 public:
  explicit Steady(const char* layout)
      : pool_(two_threads(), spinning()),
        layer_(config_of(layout), pool_, make_moe_scratch(), cpu_features().chosen) {
    RandomNumbers random(5);
    std::vector<float> matrix(kHidden * kIntermediate);
    for (float& value : matrix) value = random.normal();
    std::vector<ExpertStore::Source> sources;
    for (int e = 0; e < kExperts; ++e)
      sources.push_back({e, matrix.data(), matrix.data(), matrix.data(), DType::kFloat32});
    layer_.store().load(sources);
    for (float& value : hidden_) value = random.normal();
    for (size_t i = 0; i < ids_.size(); ++i) ids_[i] = static_cast<int64_t>(i % kExperts);
  }

  // Tokens t and slots s go to expert (2 t + s) % 8.
  void forward(int num_tokens) {
    MoeInput input;
    input.hidden_states = hidden_.data();
    input.dtype = DType::kFloat32;
    input.topk_ids = ids_.data();
    input.topk_weights = weights_.data();
    input.num_tokens = num_tokens;
    input.top_k = kTopK;
    input.output = output_.data();
    layer_.forward(input);
  }
  WorkerPool& pool() { return pool_; }
  MoeLayer& layer() { return layer_; }

 private:
  std::vector<float> hidden_ = std::vector<float>(kManyTokens * kHidden);
  std::vector<int64_t> ids_ = std::vector<int64_t>(kManyTokens * kTopK);
  std::vector<float> weights_ = std::vector<float>(kManyTokens * kTopK, 0.5f);
  std::vector<float> output_ = std::vector<float>(kManyTokens * kHidden);
  WorkerPool pool_;
  MoeLayer layer_;
};

class SteadyState : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Forward, SteadyState,
                         testing::Values("bf16_n64k2_v1", "int8_n64k4_r512_v1",
                                         "int4g32_n64k8_r512_v1"));

TEST_P(SteadyState, TakesNothingFromTheHeapAndNoLock) {
  Steady steady(GetParam());
  for (const int num_tokens : {kManyTokens, kFewTokens}) steady.forward(num_tokens);
  const uint64_t allocations = num_allocations;
  const uint64_t locks = num_locks;
  for (int i = 0; i < 20; ++i) {
    for (const int num_tokens : {kManyTokens, kFewTokens, 1}) steady.forward(num_tokens);
  }
  const uint64_t allocations_after = num_allocations;  // EXPECT_EQ takes locks itself
  const uint64_t locks_after = num_locks;
  EXPECT_EQ(allocations_after - allocations, 0u);
  EXPECT_EQ(locks_after - locks, 0u);
}

TEST_P(SteadyState, WaitsTwiceForFewRowsAndFourTimesForMany) {
  Steady steady(GetParam());
  uint64_t before = 0;
  for (const auto& [num_tokens, barriers] : {std::pair{1, 2}, {kFewTokens, 2}, {kManyTokens, 4}}) {
    steady.forward(num_tokens);
    const uint64_t after = steady.layer().counters().barriers;
    EXPECT_EQ(after - before, static_cast<uint64_t>(barriers)) << num_tokens << " tokens";
    before = after;
  }
}

TEST_P(SteadyState, ReadsThePanelsOfEachExpertOnce) {
  Steady steady(GetParam());
  const PackedLayout layout = PackedLayout::parse(GetParam());
  const uint64_t expert_bytes =
      layout.matrix_bytes(2 * kIntermediate, kHidden) + layout.matrix_bytes(kHidden, kIntermediate);
  uint64_t before = 0;
  for (const auto& [num_tokens, experts] : {std::pair{1, 2}, {kFewTokens, 4}, {kManyTokens, 8}}) {
    steady.forward(num_tokens);
    const MoeCounters counters = steady.layer().counters();
    EXPECT_EQ(counters.read_bytes - before, experts * expert_bytes) << num_tokens << " tokens";
    EXPECT_EQ(counters.read_bytes, counters.weight_bytes);
    before = counters.read_bytes;
  }
}

// From now on any system call of any thread ends the process, but the end itself and a clock that
// is not read in user space.
void forbid_system_calls() {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clock_gettime, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter = {sizeof code / sizeof code[0], code};
  if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter) != 0) {
    throw std::runtime_error("this system allows no seccomp filter");
  }
}

std::string forwards_without_system_calls(const char* layout, bool plant_one) {
  return in_child([=]() -> std::string {
    Steady steady(layout);
    for (const int num_tokens : {kManyTokens, kFewTokens}) steady.forward(num_tokens);
    forbid_system_calls();
    for (int i = 0; i < 20; ++i) {
      for (const int num_tokens : {kManyTokens, kFewTokens, 1}) steady.forward(num_tokens);
      if (plant_one) {
        const auto phase = [](const Worker& worker) {
          if (worker.index == 1) syscall(SYS_getppid);
        };
        steady.pool().run({phase});
      }
    }
    syscall(SYS_exit_group, 0);  // destructors, and what a sanitizer does in _exit(), make others
    return "not ended";
  });
}

TEST_P(SteadyState, MakesNoSystemCall) {
  EXPECT_EQ(forwards_without_system_calls(GetParam(), /*plant_one=*/false), "");
}

TEST(SteadyStatePlanted, ASystemCallIsFound) {
  EXPECT_EQ(forwards_without_system_calls("int8_n64k4_r512_v1", /*plant_one=*/true),
            "the child ended with status 31");
}

TEST(SteadyStatePlanted, AnExtraBarrierAndASecondReadAreCounted) {
  Steady steady("int8_n64k4_r512_v1");
  const uint64_t barriers = steady.pool().num_barriers();
  steady.forward(1);
  const auto nothing = [](const Worker&) {};
  steady.pool().run({nothing});
  EXPECT_EQ(steady.pool().num_barriers() - barriers, 3u);
  const MoeCounters once = steady.layer().counters();
  steady.forward(1);
  EXPECT_EQ(steady.layer().counters().read_bytes, 2 * once.read_bytes);
}

}  // namespace
}  // namespace kt
