#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "runtime/cpu_stream.h"

namespace kt {
namespace {

using std::chrono::milliseconds;

// Holds the stream's thread until it is opened.
class Gate {
 public:
  void open() { open_ = true; }
  void pass() const {
    while (!open_) std::this_thread::sleep_for(milliseconds(1));
  }

 private:
  std::atomic<bool> open_{false};
};

std::string error_of(CpuStream& stream, uint64_t ticket) {
  try {
    stream.wait(ticket);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

TEST(CpuStream, RunsJobsInOrderOnOneThread) {
  CpuStream stream;
  std::vector<int> order;  // plain memory: only the stream's thread writes, wait() publishes
  std::vector<std::thread::id> threads;
  uint64_t last = 0;
  for (int i = 0; i < 1000; ++i) {
    last = stream.submit([&order, &threads, i] {
      order.push_back(i);
      threads.push_back(std::this_thread::get_id());
    });
    ASSERT_EQ(last, static_cast<uint64_t>(i + 1));
  }
  stream.wait(last);
  EXPECT_EQ(stream.completed(), 1000u);
  ASSERT_EQ(order.size(), 1000u);
  for (int i = 0; i < 1000; ++i) {
    EXPECT_EQ(order[i], i);
    EXPECT_EQ(threads[i], threads[0]);
  }
  EXPECT_NE(threads[0], std::this_thread::get_id());
}

TEST(CpuStream, SubmitReturnsBeforeTheJobRuns) {
  CpuStream stream;
  Gate gate;
  std::atomic<bool> ran{false};
  const uint64_t ticket = stream.submit([&] {
    gate.pass();
    ran = true;
  });
  const uint64_t second = stream.submit([] {});
  EXPECT_FALSE(ran);
  EXPECT_EQ(stream.completed(), 0u);
  gate.open();
  stream.wait(ticket);
  EXPECT_TRUE(ran);
  stream.wait(second);
  EXPECT_EQ(stream.completed(), 2u);
}

TEST(CpuStream, WaitForOneJobDoesNotWaitForLaterOnes) {
  CpuStream stream;
  Gate gate;
  const uint64_t first = stream.submit([] {});
  const uint64_t second = stream.submit([&] { gate.pass(); });
  stream.wait(first);
  EXPECT_EQ(stream.completed(), 1u);
  gate.open();
  stream.wait(second);
  stream.wait(first);
}

TEST(CpuStream, AnErrorIsRethrownOnceAndLaterJobsRun) {
  CpuStream stream;
  const uint64_t bad = stream.submit([] { throw std::runtime_error("first"); });
  const uint64_t worse = stream.submit([] { throw std::runtime_error("second"); });
  int value = 0;
  const uint64_t good = stream.submit([&] { value = 5; });
  EXPECT_EQ(error_of(stream, good), "") << "errors stay with their tickets";
  EXPECT_EQ(value, 5);
  EXPECT_EQ(error_of(stream, worse), "second");
  EXPECT_EQ(error_of(stream, bad), "first");
  EXPECT_EQ(error_of(stream, bad), "");
  EXPECT_EQ(stream.completed(), 3u);
}

TEST(CpuStream, ATicketThatWasNeverGivenOutIsAnError) {
  CpuStream stream;
  EXPECT_THROW(stream.wait(0), Error);
  EXPECT_THROW(stream.wait(1), Error);
  stream.wait(stream.submit([] {}));
  EXPECT_THROW(stream.wait(2), Error);
  EXPECT_THROW(stream.submit({}), Error);
}

TEST(CpuStream, AJobThatWaitsForItselfIsAnError) {
  CpuStream stream;
  const uint64_t earlier = stream.submit([] {});
  std::atomic<uint64_t> own{0};
  const uint64_t ticket = stream.submit([&] {
    while (own == 0) std::this_thread::yield();
    stream.wait(earlier);
    stream.wait(own);
  });
  own = ticket;
  EXPECT_NE(error_of(stream, ticket).find("never ends"), std::string::npos);
}

TEST(CpuStream, JobsMaySubmitJobs) {
  CpuStream stream;
  std::atomic<uint64_t> inner{0};
  int value = 0;
  stream.wait(stream.submit([&] { inner = stream.submit([&] { value = 3; }); }));
  stream.wait(inner);
  EXPECT_EQ(value, 3);
}

TEST(CpuStream, TheDestructorRunsWhatIsQueued) {
  Gate gate;
  int ran = 0;
  {
    CpuStream stream;
    stream.submit([&] { gate.pass(); });
    for (int i = 0; i < 100; ++i) stream.submit([&] { ++ran; });
    stream.submit([] { throw std::runtime_error("nobody waits for it"); });
    gate.open();
  }
  EXPECT_EQ(ran, 100);
}

TEST(CpuStream, UnusedStreamsEnd) {
  for (int i = 0; i < 50; ++i) CpuStream stream;
}

TEST(CpuStream, SeveralThreadsSubmitAndWait) {
  CpuStream stream;
  std::vector<int> values(400, 0);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 100; ++i) {
        const int slot = t * 100 + i;
        stream.wait(stream.submit([&values, slot] { values[slot] = slot; }));
        EXPECT_EQ(values[slot], slot);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(stream.completed(), 400u);
}

TEST(CpuStream, SeveralThreadsWaitForOneJob) {
  CpuStream stream;
  Gate gate;
  int value = 0;
  std::atomic<int> errors{0};
  const uint64_t ticket = stream.submit([&] {
    gate.pass();
    value = 9;
    throw std::runtime_error("for one of them");
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      errors += error_of(stream, ticket) != "";
      EXPECT_EQ(value, 9);
    });
  }
  std::this_thread::sleep_for(milliseconds(5));
  gate.open();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(errors.load(), 1);
}

TEST(CpuStream, WhatAJobHoldsIsReleasedBeforeWaitReturns) {
  CpuStream stream;
  auto held = std::make_shared<int>(1);
  const std::weak_ptr<int> watch = held;
  const uint64_t ticket = stream.submit([held = std::move(held)] {});
  stream.wait(ticket);
  EXPECT_TRUE(watch.expired());
}

TEST(CpuStream, ThreadStartRunsFirstOnTheStreamsThread) {
  std::thread::id start_thread;
  CpuStream stream([&] { start_thread = std::this_thread::get_id(); });
  std::thread::id job_thread;
  stream.wait(stream.submit([&] { job_thread = std::this_thread::get_id(); }));
  EXPECT_EQ(start_thread, job_thread);
}

TEST(CpuStream, AnErrorOfThreadStartIsThrownByTheConstructor) {
  EXPECT_THROW(CpuStream stream([] { throw std::runtime_error("no"); }), std::runtime_error);
}

TEST(CpuStream, RunUsesTheCallingThreadOfAnIdleStream) {
  CpuStream stream;
  std::thread::id ran_on;
  stream.run([&] { ran_on = std::this_thread::get_id(); });
  EXPECT_EQ(ran_on, std::this_thread::get_id());
  EXPECT_EQ(stream.completed(), 1u);
  EXPECT_EQ(stream.submit([] {}), 2u);
  EXPECT_THROW(stream.run([] { throw std::runtime_error("planned"); }), std::runtime_error);
  EXPECT_NO_THROW(stream.run([] {}));
}

TEST(CpuStream, RunWaitsItsTurnBehindQueuedJobs) {
  CpuStream stream;
  std::vector<int> order;
  stream.submit([&] {
    std::this_thread::sleep_for(milliseconds(20));
    order.push_back(1);
  });
  stream.run([&] { order.push_back(2); });
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
}

TEST(CpuStream, WhatIsSubmittedDuringARunComesAfterIt) {
  CpuStream stream;
  std::vector<int> order;
  uint64_t later = 0;
  stream.run([&] {
    std::thread([&] { later = stream.submit([&] { order.push_back(2); }); }).join();
    std::this_thread::sleep_for(milliseconds(20));
    order.push_back(1);
  });
  stream.wait(later);
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
}

TEST(CpuStream, ARunInsideARunIsAnError) {
  CpuStream stream;
  stream.run([&] { EXPECT_THROW(stream.run([] {}), Error); });
}

TEST(CpuStream, SeveralThreadsRunAndSubmitOneAtATime) {
  CpuStream stream;
  int inside = 0;
  int total = 0;
  const auto body = [&] {
    EXPECT_EQ(++inside, 1);
    ++total;
    --inside;
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        if ((i + t) % 3 == 0) {
          stream.wait(stream.submit(body));
        } else {
          stream.run(body);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(total, 600);
}

// A run() that ends while another begins must not open the stream's thread to the queue. Many
// waiters: while the first run() wakes them all, one that is awake already begins the next.
TEST(CpuStream, RunsAndSubmittedJobsNeverOverlap) {
  std::atomic<int> inside{0};
  std::atomic<int> overlaps{0};
  const auto body = [&] {
    if (inside.fetch_add(1) != 0) ++overlaps;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    inside.fetch_sub(1);
  };
  for (int round = 0; round < 20; ++round) {
    CpuStream stream;
    std::vector<std::thread> threads;
    stream.run([&] {
      for (int t = 0; t < 16; ++t) {
        threads.emplace_back([&] {
          stream.wait(1);
          stream.run(body);
          stream.wait(stream.submit(body));
        });
      }
      std::this_thread::sleep_for(milliseconds(10));
    });
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(stream.completed(), 33u);
  }
  EXPECT_EQ(overlaps.load(), 0);
}

// The closure that run() was given ends with the call: nothing of it may stay in the queue.
TEST(CpuStream, ARefusedRunLeavesNothingBehind) {
  CpuStream stream;
  bool ran = false;
  stream.run([&] { EXPECT_THROW(stream.run([&] { ran = true; }), Error); });
  EXPECT_THROW(stream.wait(stream.submit([&] { stream.run([&] { ran = true; }); })), Error);
  EXPECT_EQ(stream.completed(), 2u);
  stream.wait(stream.submit([] {}));
  EXPECT_FALSE(ran);
}

// Rung for by a flag, as a device does.
class Bell : public PolledWork {
 public:
  explicit Bell(std::function<void()> job) : job_(std::move(job)) {}
  bool ready() override { return rung.load(std::memory_order_acquire); }
  void run() override {
    rung.store(false);
    job_();
    ++runs;
  }
  std::atomic<bool> rung{false};
  std::atomic<int> runs{0};

 private:
  const std::function<void()> job_;
};

TEST(CpuStream, PolledWorkRunsOnTheStreamsThread) {
  CpuStream stream;
  std::thread::id own;
  stream.wait(stream.submit([&] { own = std::this_thread::get_id(); }));
  std::thread::id ran_on;
  Bell bell([&] { ran_on = std::this_thread::get_id(); });
  for (const int64_t spin_us : {0, 1'000'000}) {
    stream.attach(bell, spin_us);
    const int before = bell.runs;
    bell.rung = true;
    while (bell.runs == before) std::this_thread::yield();
    stream.detach(bell);
    EXPECT_EQ(ran_on, own);
  }
  bell.rung = true;
  std::this_thread::sleep_for(milliseconds(30));
  EXPECT_EQ(bell.runs, 2) << "detached";
}

TEST(CpuStream, PolledWorkNeverRunsBesideOtherJobs) {
  CpuStream stream;
  std::atomic<int> inside{0};
  std::atomic<int> overlaps{0};
  const auto body = [&] {
    if (inside.fetch_add(1) != 0) ++overlaps;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    inside.fetch_sub(1);
  };
  Bell bell(body);
  stream.attach(bell, 1000);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        bell.rung = true;
        if ((i + t) % 2 == 0) {
          stream.run(body);
        } else {
          stream.wait(stream.submit(body));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  while (bell.rung) std::this_thread::yield();
  stream.detach(bell);
  EXPECT_EQ(overlaps, 0);
  EXPECT_GT(bell.runs, 0);
  // attach() and detach() are jobs, too
  EXPECT_EQ(stream.completed(), 602u + static_cast<uint64_t>(bell.runs));
}

TEST(CpuStream, AnIdlePollerSleepsAndAWakeEndsIt) {
  CpuStream stream;
  Bell bell([] {});
  stream.attach(bell, 500);
  std::this_thread::sleep_for(milliseconds(200));  // sleeps are 20 ms by now
  std::vector<double> late_ms;
  for (int i = 0; i < 5; ++i) {
    bell.rung = true;
    const auto start = std::chrono::steady_clock::now();
    stream.wake();
    while (bell.runs == i) std::this_thread::yield();
    const auto late = std::chrono::steady_clock::now() - start;
    late_ms.push_back(std::chrono::duration<double, std::milli>(late).count());
    std::this_thread::sleep_for(milliseconds(170));
  }
  // the machine may be busy: one of five
  EXPECT_LT(*std::min_element(late_ms.begin(), late_ms.end()), 5.0);
  stream.detach(bell);
}

double cpu_seconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
         static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

// What it looks for cannot run before, and the caller may be pinned to the poller's CPU.
TEST(CpuStream, APollerSleepsWhileACallerRuns) {
  CpuStream stream;
  Bell bell([] {});
  stream.attach(bell, 10'000'000);
  for (const bool ring : {false, true}) {
    const int runs = bell.runs;
    const double before = cpu_seconds();
    stream.run([&] {
      bell.rung = ring;
      std::this_thread::sleep_for(milliseconds(300));
      EXPECT_EQ(bell.runs, runs);
    });
    EXPECT_LT(cpu_seconds() - before, 0.1) << "of 0.3 s";
    while (bell.rung) std::this_thread::yield();
  }
  stream.detach(bell);
}

TEST(CpuStream, WaitingAndIdlingBurnNoCpuTime) {
  CpuStream stream;
  const double before = cpu_seconds();
  stream.wait(stream.submit([] { std::this_thread::sleep_for(milliseconds(200)); }));
  std::this_thread::sleep_for(milliseconds(200));
  // a spinning waiter would take 0.2 s
  EXPECT_LT(cpu_seconds() - before, 0.02);
  Bell bell([] {});
  stream.attach(bell, 100);
  std::this_thread::sleep_for(milliseconds(100));
  const double polling = cpu_seconds();
  std::this_thread::sleep_for(milliseconds(400));
  EXPECT_LT(cpu_seconds() - polling, 0.02) << "of 0.4 s";
  stream.detach(bell);
}

}  // namespace
}  // namespace kt
