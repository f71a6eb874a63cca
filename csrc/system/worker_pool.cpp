#include "system/worker_pool.h"

#include <pthread.h>
#include <sched.h>
#include <xmmintrin.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/parking_word.h"
#include "system/numa_policy.h"
#include "system/proc_files.h"

namespace kt {
namespace {

// An idle worker on a machine with free CPUs: outlasts the attention between two MoE layers of one
// token (100 to 200 us for the models served), so that a decoding server stays out of the kernel.
constexpr int kIdleSpinUs = 200;

// Where the pool has every CPU, a spinning worker holds the core that torch needs for that very
// attention: no longer than about one wake-up (4 to 15 us) costs anyway.
constexpr int kIdleSpinFullUs = 20;

// Between phases the others are at work and done soon, unless one lost its core to another thread:
// then the core of a waiter is the one to give up.
constexpr int kBarrierSpinUs = 200;

// Threads that count down one cache line; above it their increments queue longer than one more
// level costs.
constexpr int kGroupThreads = 8;

// Node of the tree that counts arrivals at the end of a phase.
struct alignas(64) Arrival {
  std::atomic<int> missing{0};
  int full = 0;
  Arrival* parent = nullptr;
};

struct alignas(64) WorkerSlot {
  Worker worker;
  int cpu = -1;
  int bind_node = -1;  // memory policy, the kernel's node id; -1: none
  Arrival* leaf = nullptr;
  std::exception_ptr error;
};

// Rounding of a new process: to nearest, subnormals kept, no traps. Threads inherit their
// creator's, which -ffast-math libraries and torch.set_flush_denormal() change, and the bits of a
// result must not depend on who computes it.
constexpr unsigned kDefaultRounding = 0x1f80;

// Gives the calling thread the default rounding while it lives, then what it had.
class DefaultRounding {
 public:
  DefaultRounding() : before_(_mm_getcsr()) { _mm_setcsr(kDefaultRounding); }
  ~DefaultRounding() { _mm_setcsr(before_); }
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;

 private:
  const unsigned before_;
};

int read_spin_env() {
  const char* text = std::getenv("KT_SPIN_US");
  if (text == nullptr || *text == '\0') return -1;
  const std::optional<uint64_t> value = parse_number(text);
  KT_CHECK(value && *value <= 1000000,
           "KT_SPIN_US=\"" << text
                           << "\" is no number of microseconds from 0 to 1000000; unset it "
                              "for the default.");
  return static_cast<int>(*value);
}

// CPUs the process may use, as far as the creating thread shows it.
int count_cpus() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) return CPU_COUNT(&mask);
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

// Returns 0 or the error number.
int pin_thread(pthread_t thread, int cpu) {
  if (cpu < 0) return 0;
  cpu_set_t* mask = CPU_ALLOC(cpu + 1);
  if (mask == nullptr) return ENOMEM;
  const size_t bytes = CPU_ALLOC_SIZE(cpu + 1);
  CPU_ZERO_S(bytes, mask);
  CPU_SET_S(cpu, bytes, mask);
  const int error = pthread_setaffinity_np(thread, bytes, mask);
  CPU_FREE(mask);
  return error;
}

}  // namespace

// One step is one phase on every worker. All steps go the same way:
//
//   word      who writes                                    who waits
//   steps     the caller (first phase), then the last       the workers of one node
//             worker to arrive at the end of a phase
//   missing   every worker that ends a phase, up the tree   - (the last one goes on)
//   caller    the last worker to arrive                     the caller, in run()
//
// Ordering  The caller writes the phase to run, then the step words: workers that see a step see
//           the phase (ParkingWord's ordering). Arrivals are acq_rel decrements of one counter per
//           group: its last thread has seen what all of the group wrote and carries it to the
//           parent; the last one at the root has seen everything, so it may write the next phase
//           and release it, through which all others see it too. A counter is refilled by its last
//           thread before that goes up, hence before any thread can be in the next phase. Workers
//           read the plain fields only between the release of a step and their own arrival, and
//           the next write to them comes after all arrivals. The caller is released last, and
//           nothing of State is touched by the releaser after that but the word it wakes.
// Errors    A throwing worker writes its own slot and `failed`, then arrives; the last one at the
//           root sees `failed` and ends the run instead of releasing the next phase. So all errors
//           kept are of one phase, the earliest, and the caller takes the lowest worker's.
struct WorkerPool::State {
  explicit State(const PoolPlan& pool_plan) : plan(pool_plan) {}

  void build_tree();
  void start_threads();
  void stop_threads();
  void worker_loop(WorkerSlot& slot);
  void run_phase(WorkerSlot& slot);
  // Counts the worker in; true for the last one of all.
  bool arrive(WorkerSlot& slot);
  // What the last one does: releases the next phase, or marks the run as finished.
  void advance();
  void release_step();
  void rethrow_error();

  PoolPlan plan;
  int idle_spin_us = 0;
  int barrier_spin_us = 0;
  std::vector<WorkerSlot> slots;
  std::vector<Arrival> arrivals;
  std::vector<ParkingWord> steps;  // one per node: a release crosses the interconnect once
  ParkingWord caller;

  // Written between steps only.
  alignas(64) const Phase* phases = nullptr;
  int num_phases = 0;
  int phase = 0;
  bool finished = true;
  bool stopping = false;

  // written by the last worker to arrive, one at a time
  std::atomic<uint64_t> num_barriers{0};

  alignas(64) std::atomic<bool> failed{false};
  alignas(64) std::atomic<bool> running{false};
  std::vector<std::thread> threads;
};

void WorkerPool::State::build_tree() {
  const int num_nodes = static_cast<int>(plan.nodes.size());
  slots = std::vector<WorkerSlot>(plan.num_threads());
  steps = std::vector<ParkingWord>(num_nodes);
  size_t num_arrivals = 1 + plan.nodes.size();
  for (const PoolPlan::Node& node : plan.nodes) {
    num_arrivals += ceil_div(static_cast<int64_t>(node.cpus.size()), kGroupThreads);
  }
  arrivals = std::vector<Arrival>(num_arrivals);
  size_t used = 0;
  Arrival* root = num_nodes > 1 ? &arrivals[used++] : nullptr;
  int index = 0;
  for (int position = 0; position < num_nodes; ++position) {
    const PoolPlan::Node& node = plan.nodes[position];
    const int node_threads = static_cast<int>(node.cpus.size());
    Arrival* node_top = root;
    if (node_threads > kGroupThreads) {
      node_top = &arrivals[used++];
      node_top->parent = root;
      if (root != nullptr) ++root->full;
    }
    Arrival* leaf = nullptr;
    for (int i = 0; i < node_threads; ++i, ++index) {
      if (i % kGroupThreads == 0) {
        leaf = &arrivals[used++];
        leaf->parent = node_top;
        if (node_top != nullptr) ++node_top->full;
      }
      ++leaf->full;
      WorkerSlot& slot = slots[index];
      slot.worker = Worker{index, position, i, node_threads};
      slot.cpu = node.cpus[i];
      slot.bind_node = node.bind_memory ? node.id : -1;
      slot.leaf = leaf;
    }
  }
  for (Arrival& arrival : arrivals) arrival.missing.store(arrival.full, std::memory_order_relaxed);
}

void WorkerPool::State::start_threads() {
  int num_unpinned = 0;
  int pin_error = 0;
  threads.reserve(slots.size() - 1);
  try {
    for (size_t i = 1; i < slots.size(); ++i) {
      threads.emplace_back([this, i] { worker_loop(slots[i]); });
      const int error = pin_thread(threads.back().native_handle(), slots[i].cpu);
      if (error != 0) {
        ++num_unpinned;
        pin_error = error;
      }
    }
  } catch (const std::system_error& error) {
    const size_t started = threads.size();
    stop_threads();
    KT_CHECK(false, "Only " << started << " of " << slots.size() - 1
                            << " worker threads could be started (" << error.what()
                            << "); ask for fewer threads or raise the limit of processes.");
  }
  if (num_unpinned > 0) {
    plan.warnings.push_back(std::to_string(num_unpinned) + " of " + std::to_string(slots.size()) +
                            " worker threads could not be pinned (" + std::strerror(pin_error) +
                            "): they run where the scheduler puts them.");
  }
}

void WorkerPool::State::stop_threads() {
  stopping = true;
  release_step();
  for (std::thread& thread : threads) thread.join();
  threads.clear();
}

void WorkerPool::State::release_step() {
  for (ParkingWord& word : steps) word.advance();
}

void WorkerPool::State::worker_loop(WorkerSlot& slot) {
  pthread_setname_np(pthread_self(), ("kt_w" + std::to_string(slot.worker.index)).c_str());
  _mm_setcsr(kDefaultRounding);
  // refused in some containers; detect_topology() has told the user
  if (slot.bind_node >= 0) prefer_node_for_thread(slot.bind_node);
  ParkingWord& word = steps[slot.worker.node];
  uint32_t seen = 0;
  int spin_us = idle_spin_us;
  while (true) {
    seen = word.wait_while(seen, spin_us);
    if (stopping) return;
    run_phase(slot);
    spin_us = phase + 1 < num_phases ? barrier_spin_us : idle_spin_us;
    if (!arrive(slot)) continue;
    advance();
    caller.advance();
  }
}

void WorkerPool::State::run_phase(WorkerSlot& slot) {
  try {
    phases[phase](slot.worker);
  } catch (...) {
    slot.error = std::current_exception();
    failed.store(true, std::memory_order_relaxed);
  }
}

bool WorkerPool::State::arrive(WorkerSlot& slot) {
  for (Arrival* at = slot.leaf; at != nullptr; at = at->parent) {
    if (at->missing.fetch_sub(1, std::memory_order_acq_rel) != 1) return false;
    at->missing.store(at->full, std::memory_order_relaxed);
  }
  return true;
}

void WorkerPool::State::advance() {
  num_barriers.store(num_barriers.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  ++phase;
  finished = phase == num_phases || failed.load(std::memory_order_relaxed);
  if (!finished) release_step();
}

void WorkerPool::State::rethrow_error() {
  failed.store(false, std::memory_order_relaxed);
  std::exception_ptr first;
  for (WorkerSlot& slot : slots) {
    if (!first) first = slot.error;
    slot.error = nullptr;
  }
  std::rethrow_exception(first);
}

WorkerPool::WorkerPool(const PoolPlan& plan, const WorkerPoolOptions& options)
    : state_(std::make_unique<State>(plan)) {
  for (const PoolPlan::Node& node : plan.nodes) {
    KT_CHECK(!node.cpus.empty(), "NUMA node " << node.id
                                              << " of the pool has no thread; leave it "
                                                 "out of the plan.");
  }
  KT_CHECK(!plan.nodes.empty(), "The pool has no thread; plan at least one.");
  const int forced = read_spin_env();
  const int asked = forced >= 0 ? forced : options.spin_us;
  const int num_cpus = count_cpus();
  const bool full = plan.num_threads() >= num_cpus;
  const bool overfull = plan.num_threads() > num_cpus;
  state_->idle_spin_us = asked >= 0 ? asked : (full ? kIdleSpinFullUs : kIdleSpinUs);
  // with more threads than CPUs the awaited thread may need the waiter's core
  state_->barrier_spin_us = asked >= 0 ? asked : (overfull ? kIdleSpinFullUs : kBarrierSpinUs);
  state_->build_tree();
  state_->start_threads();
}

WorkerPool::~WorkerPool() {
  if (home_.inherited()) {
    state_.release();
  } else {
    state_->stop_threads();
  }
}

int WorkerPool::num_threads() const { return static_cast<int>(state_->slots.size()); }
int WorkerPool::num_nodes() const { return static_cast<int>(state_->steps.size()); }
const PoolPlan& WorkerPool::plan() const { return state_->plan; }

void WorkerPool::run(std::initializer_list<Phase> phases) {
  home_.check();
  State& state = *state_;
  KT_CHECK(!state.running.exchange(true, std::memory_order_acquire),
           "WorkerPool::run() was called while a run is going on; call it from one thread, and not "
           "from a phase.");
  struct Leave {
    std::atomic<bool>& running;
    ~Leave() { running.store(false, std::memory_order_release); }
  } leave{state.running};
  if (phases.size() == 0) return;
  const DefaultRounding rounding;

  state.phases = phases.begin();
  state.num_phases = static_cast<int>(phases.size());
  state.phase = 0;
  state.finished = false;
  state.release_step();
  while (!state.finished) {
    WorkerSlot& slot = state.slots[0];
    state.run_phase(slot);
    // nobody writes the word before all have arrived
    const uint32_t seen = state.caller.load();
    if (state.arrive(slot)) {
      state.advance();
    } else {
      state.caller.wait_while(seen, state.barrier_spin_us);
    }
  }
  if (state.failed.load(std::memory_order_relaxed)) state.rethrow_error();
}

void WorkerPool::adopt_current_thread() const {
  const WorkerSlot& slot = state_->slots[0];
  pthread_setname_np(pthread_self(), "kt_w0");
  // refused where the workers are refused too, which plan().warnings tells: costs speed only
  pin_thread(pthread_self(), slot.cpu);
  if (slot.bind_node >= 0) prefer_node_for_thread(slot.bind_node);
}

struct WorkerPool::CallerPin::Affinity {
  cpu_set_t cpus;
};

WorkerPool::CallerPin::CallerPin(const WorkerPool& pool) {
  const int cpu = pool.state_->slots[0].cpu;
  // CPUs past the fixed set (1024): left to the scheduler
  if (cpu < 0 || cpu >= CPU_SETSIZE) return;
  auto before = std::make_unique<Affinity>();
  if (sched_getaffinity(0, sizeof before->cpus, &before->cpus) != 0) return;
  if (CPU_COUNT(&before->cpus) == 1 && CPU_ISSET(cpu, &before->cpus)) return;
  if (pin_thread(pthread_self(), cpu) == 0) before_ = std::move(before);
}

WorkerPool::CallerPin::~CallerPin() {
  if (before_ != nullptr) sched_setaffinity(0, sizeof before_->cpus, &before_->cpus);
}

uint64_t WorkerPool::num_barriers() const {
  return state_->num_barriers.load(std::memory_order_relaxed);
}

int WorkerPool::num_parked() const {
  int parked = 0;
  for (const ParkingWord& word : state_->steps) parked += word.num_parked();
  return parked;
}

}  // namespace kt
