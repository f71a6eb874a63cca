#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <xmmintrin.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "system/worker_pool.h"

namespace kt {
namespace {

using std::chrono::milliseconds;

// Unpinned threads on nodes that exist only in the plan.
PoolPlan plan_of(const std::vector<int>& threads_per_node) {
  PoolPlan plan;
  for (size_t i = 0; i < threads_per_node.size(); ++i) {
    PoolPlan::Node node;
    node.id = static_cast<int>(i);
    node.cpus.assign(threads_per_node[i], -1);
    plan.nodes.push_back(node);
  }
  return plan;
}

// Group sizes around the eight threads that share one counter, and several nodes.
const std::vector<std::vector<int>> kShapes = {{1},    {2},       {3},    {8},    {9},    {17},
                                               {1, 1}, {2, 3, 1}, {9, 1}, {8, 8}, {1, 17}};

bool wait_until_parked(const WorkerPool& pool, int parked) {
  for (int i = 0; i < 5000; ++i) {
    if (pool.num_parked() == parked) return true;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return false;
}

class Shape : public ::testing::TestWithParam<std::vector<int>> {};
INSTANTIATE_TEST_SUITE_P(WorkerPool, Shape, ::testing::ValuesIn(kShapes));

TEST_P(Shape, EveryWorkerRunsEveryPhaseOnce) {
  WorkerPool pool(plan_of(GetParam()));
  const int num_threads = pool.num_threads();
  std::vector<std::vector<int>> runs(3, std::vector<int>(num_threads, 0));
  std::vector<Worker> workers(num_threads);
  for (int repeat = 1; repeat <= 50; ++repeat) {
    pool.run({[&](const Worker& w) {
                workers[w.index] = w;
                ++runs[0][w.index];
              },
              [&](const Worker& w) { ++runs[1][w.index]; },
              [&](const Worker& w) { ++runs[2][w.index]; }});
    for (const std::vector<int>& phase : runs) {
      for (const int count : phase) ASSERT_EQ(count, repeat);
    }
  }
  int index = 0;
  for (size_t node = 0; node < GetParam().size(); ++node) {
    for (int i = 0; i < GetParam()[node]; ++i, ++index) {
      EXPECT_EQ(workers[index].index, index);
      EXPECT_EQ(workers[index].node, static_cast<int>(node));
      EXPECT_EQ(workers[index].index_in_node, i);
      EXPECT_EQ(workers[index].node_threads, GetParam()[node]);
    }
  }
  EXPECT_EQ(pool.num_nodes(), static_cast<int>(GetParam().size()));
}

TEST_P(Shape, PhasesAreSeparatedByBarriers) {
  WorkerPool pool(plan_of(GetParam()));
  const int num_threads = pool.num_threads();
  // plain memory: without the barrier this is a wrong sum, and a race for the sanitizer
  std::vector<int64_t> values(num_threads);
  std::vector<int64_t> sums(num_threads);
  for (int64_t repeat = 0; repeat < 50; ++repeat) {
    const auto sum_all = [&](const Worker& w) {
      sums[w.index] = 0;
      for (const int64_t value : values) sums[w.index] += value;
    };
    const auto write = [&](const Worker& w) { values[w.index] = repeat + w.index; };
    const auto copy = [&](const Worker& w) { values[w.index] = sums[w.index]; };
    pool.run({write, sum_all, copy, sum_all});
    const int64_t once = repeat * num_threads + int64_t{num_threads} * (num_threads - 1) / 2;
    for (const int64_t sum : sums) ASSERT_EQ(sum, once * num_threads);
  }
}

TEST_P(Shape, AnErrorStopsLaterPhasesAndThePoolStaysUsable) {
  WorkerPool pool(plan_of(GetParam()));
  const int num_threads = pool.num_threads();
  for (int bad_phase = 0; bad_phase < 3; ++bad_phase) {
    for (const int bad_worker : {0, num_threads / 2, num_threads - 1}) {
      std::vector<std::atomic<int>> counts(3);
      const auto phase = [&](int number) {
        return [&, number](const Worker& w) {
          counts[number].fetch_add(1);
          // all from bad_worker on throw: the lowest is the one that is reported
          if (number == bad_phase && w.index >= bad_worker) {
            throw std::runtime_error("phase " + std::to_string(number) + " worker " +
                                     std::to_string(w.index));
          }
        };
      };
      try {
        pool.run({phase(0), phase(1), phase(2)});
        ADD_FAILURE() << "no error";
      } catch (const std::runtime_error& error) {
        EXPECT_EQ(std::string(error.what()),
                  "phase " + std::to_string(bad_phase) + " worker " + std::to_string(bad_worker));
      }
      for (int number = 0; number < 3; ++number) {
        EXPECT_EQ(counts[number].load(), number <= bad_phase ? num_threads : 0);
      }
      std::atomic<int> good{0};
      pool.run({[&](const Worker&) { good.fetch_add(1); }});
      EXPECT_EQ(good.load(), num_threads) << "after an error";
    }
  }
}

TEST(WorkerPool, NoPhasesIsNoWork) {
  WorkerPool pool(plan_of({3}));
  pool.run({});
}

TEST(WorkerPool, TheCallerIsWorkerZero) {
  WorkerPool pool(plan_of({4}));
  std::vector<std::thread::id> ids(4);
  pool.run({[&](const Worker& w) { ids[w.index] = std::this_thread::get_id(); }});
  EXPECT_EQ(ids[0], std::this_thread::get_id());
  for (int i = 1; i < 4; ++i) {
    for (int j = 0; j < i; ++j) EXPECT_NE(ids[i], ids[j]);
  }
}

TEST(WorkerPool, DifferentThreadsMayRunOneAfterTheOther) {
  WorkerPool pool(plan_of({3}));
  int total = 0;
  std::vector<int> counts(3);
  for (int i = 0; i < 20; ++i) {
    std::thread([&] { pool.run({[&](const Worker& w) { ++counts[w.index]; }}); }).join();
  }
  for (const int count : counts) total += count;
  EXPECT_EQ(total, 60);
}

TEST(WorkerPool, RunInsideAPhaseIsAnError) {
  WorkerPool pool(plan_of({2}));
  const auto nested = [&](const Worker& w) {
    if (w.index == 1) pool.run({[](const Worker&) {}});
  };
  EXPECT_THROW(pool.run({nested}), Error);
  int calls = 0;
  pool.run({[&](const Worker& w) {
    if (w.index == 0) ++calls;
  }});
  EXPECT_EQ(calls, 1);
}

TEST(WorkerPool, RunFromASecondThreadIsAnError) {
  WorkerPool pool(plan_of({2}));
  std::atomic<bool> inside{false};
  std::atomic<bool> leave{false};
  std::thread first([&] {
    pool.run({[&](const Worker& w) {
      if (w.index != 0) return;
      inside = true;
      while (!leave) std::this_thread::yield();
    }});
  });
  while (!inside) std::this_thread::yield();
  EXPECT_THROW(pool.run({[](const Worker&) {}}), Error);
  leave = true;
  first.join();
  pool.run({[](const Worker&) {}});
}

double cpu_seconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

TEST(WorkerPool, AnIdlePoolParksAndBurnsNoCpuTime) {
  WorkerPool pool(plan_of({2, 2}));
  ASSERT_TRUE(wait_until_parked(pool, 3)) << "a new pool";
  pool.run({[](const Worker&) {}, [](const Worker&) {}});
  ASSERT_TRUE(wait_until_parked(pool, 3)) << "a used pool";
  const double before = cpu_seconds();
  std::this_thread::sleep_for(milliseconds(200));
  // three spinning threads would take 0.2 s or more on any machine; 1 % of it is left for others
  EXPECT_LT(cpu_seconds() - before, 0.02);
}

TEST(WorkerPool, ParkedWorkersAreWoken) {
  WorkerPool pool(plan_of({3, 2}), {.spin_us = 0});
  std::atomic<int> calls{0};
  for (int i = 0; i < 20; ++i) {
    ASSERT_TRUE(wait_until_parked(pool, 4));
    pool.run({[&](const Worker&) { calls.fetch_add(1); }});
  }
  EXPECT_EQ(calls.load(), 100);
}

TEST(WorkerPool, ASlowWorkerParksTheOthersAtTheBarrier) {
  WorkerPool pool(plan_of({4}), {.spin_us = 50});
  const auto slow = [](const Worker& w) {
    if (w.index == 2) std::this_thread::sleep_for(milliseconds(100));
  };
  const double before = cpu_seconds();
  pool.run({slow, slow});
  // 0.2 s of waiting by three threads and the caller; a pool that spins on takes at least 0.2 s
  EXPECT_LT(cpu_seconds() - before, 0.05);
}

TEST(WorkerPool, ThousandsOfFastRuns) {
  for (const int spin_us : {-1, 0, 1}) {
    WorkerPool pool(plan_of({2}), {.spin_us = spin_us});
    std::vector<int> counts(2);
    const auto count = [&](const Worker& w) { ++counts[w.index]; };
    for (int i = 0; i < 3000; ++i) pool.run({count, count});
    EXPECT_EQ(counts, (std::vector<int>{6000, 6000})) << spin_us;
  }
}

TEST(WorkerPool, ManyMoreThreadsThanCores) {
  WorkerPool pool(plan_of({20, 20}));
  std::vector<int> counts(40);
  const auto count = [&](const Worker& w) { ++counts[w.index]; };
  for (int i = 0; i < 50; ++i) pool.run({count, count, count});
  EXPECT_EQ(counts, std::vector<int>(40, 150));
}

TEST(WorkerPool, DestructionWhileParkedSpinningOrUnused) {
  for (int i = 0; i < 30; ++i) {
    WorkerPool unused(plan_of({3}));
    WorkerPool spinning(plan_of({2}), {.spin_us = 100000});
    spinning.run({[](const Worker&) {}});
    WorkerPool parked(plan_of({3}), {.spin_us = 0});
    if (i >= 3) continue;
    ASSERT_TRUE(wait_until_parked(parked, 2));
  }
}

TEST(WorkerPool, NamesItsThreads) {
  WorkerPool pool(plan_of({2, 2}));
  std::vector<std::string> names(4);
  pool.run({[&](const Worker& w) {
    char name[16] = {};
    pthread_getname_np(pthread_self(), name, sizeof name);
    names[w.index] = name;
  }});
  for (int i = 1; i < 4; ++i) EXPECT_EQ(names[i], "kt_w" + std::to_string(i));
}

// Where each worker may run, as it sees it itself.
std::vector<std::vector<int>> masks_of(WorkerPool& pool) {
  std::vector<std::vector<int>> masks(pool.num_threads());
  pool.run({[&](const Worker& w) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    sched_getaffinity(0, sizeof mask, &mask);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &mask)) masks[w.index].push_back(cpu);
    }
  }});
  return masks;
}

TEST(WorkerPool, PinsWorkersAndTheAdoptedCaller) {
  const PoolPlan plan = plan_pool(detect_topology(), 0, 0);
  WorkerPool pool(plan);
  EXPECT_EQ(pool.plan().warnings, plan.warnings);
  std::vector<std::vector<int>> masks;
  // a thread of its own: adoption stays with the thread
  std::thread([&] {
    pool.adopt_current_thread();
    masks = masks_of(pool);
  }).join();
  int index = 0;
  for (const PoolPlan::Node& node : plan.nodes) {
    for (const int cpu : node.cpus) {
      if (cpu >= 0) {
        EXPECT_EQ(masks[index], std::vector<int>{cpu});
      }
      ++index;
    }
  }
}

TEST(WorkerPool, ACpuThatIsNotThereIsAWarning) {
  PoolPlan plan = plan_of({2});
  plan.nodes[0].cpus = {-1, 4095};
  WorkerPool pool(plan);
  ASSERT_EQ(pool.plan().warnings.size(), 1u);
  EXPECT_NE(pool.plan().warnings[0].find("1 of 2"), std::string::npos) << pool.plan().warnings[0];
  pool.run({[](const Worker&) {}});
}

// Libraries built with -ffast-math and torch.set_flush_denormal() leave the calling thread, and the
// threads it creates, with a rounding of their own.
TEST(WorkerPool, EveryWorkerRoundsByTheDefaultAndTheCallerGetsItsOwnBack) {
  constexpr unsigned kFlushToZero = 0x8000 | 0x40;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlushToZero);
  std::vector<float> halves(3);
  const volatile float smallest_normal = 0x1p-126f;
  {
    WorkerPool pool(plan_of({3}));
    pool.run({[&](const Worker& w) { halves[w.index] = smallest_normal * 0.5f; }});
    EXPECT_EQ(_mm_getcsr() & kFlushToZero, kFlushToZero);
    EXPECT_THROW(pool.run({[](const Worker&) { throw std::runtime_error("planned"); }}),
                 std::runtime_error);
    EXPECT_EQ(_mm_getcsr() & kFlushToZero, kFlushToZero);
  }
  _mm_setcsr(before);
  EXPECT_EQ(halves, std::vector<float>(3, 0x1p-127f));
}

TEST(WorkerPool, RefusesEmptyPlans) {
  EXPECT_THROW(WorkerPool pool{PoolPlan{}}, Error);
  EXPECT_THROW(WorkerPool pool(plan_of({2, 0})), Error);
}

TEST(WorkerPool, ReadsTheSpinTimeFromTheEnvironment) {
  for (const char* bad : {"x", "-1", "1.5", "20us", "1000001", " 5"}) {
    setenv("KT_SPIN_US", bad, 1);
    try {
      WorkerPool pool(plan_of({1}));
      ADD_FAILURE() << bad;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(bad), std::string::npos) << error.what();
    }
  }
  // long enough to see that it is used: the option would park at once
  setenv("KT_SPIN_US", "1000000", 1);
  {
    WorkerPool pool(plan_of({2}), {.spin_us = 0});
    pool.run({[](const Worker&) {}});
    std::this_thread::sleep_for(milliseconds(30));
    EXPECT_EQ(pool.num_parked(), 0);
  }
  unsetenv("KT_SPIN_US");
}

}  // namespace
}  // namespace kt
