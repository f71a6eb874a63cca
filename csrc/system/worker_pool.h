// Pinned threads, one group per NUMA node, that run phases separated by barriers. Knows no MoE.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>

#include "base/fork_guard.h"
#include "base/span.h"
#include "system/topology.h"

namespace kt {

// Who is running: passed to every phase.
struct Worker {
  int index = 0;  // 0 .. num_threads - 1 over all nodes
  int node = 0;   // position of its node in the plan (not the kernel's id)
  int index_in_node = 0;
  int node_threads = 1;  // threads of this node
};

using Phase = FunctionRef<void(const Worker&)>;

struct WorkerPoolOptions {
  // How long an idle worker spins before it parks on a futex, in microseconds. -1: chosen from the
  // plan (short where the pool uses every core, so that torch's threads are not fought). KT_SPIN_US
  // overrides.
  int spin_us = -1;
};

// SPMD pool. run() is called by one thread at a time (the CPU stream's); that caller is worker 0.
//
// Threads   run() from a second thread while one is running throws kt::Error. Construction pins the
//           created threads only; the caller of run() is pinned by adopt_current_thread().
// Errors    an exception in a phase stops the later phases; the one of the earliest phase, lowest
//           worker index is rethrown by run(). The pool stays usable.
// Lifetime  the destructor joins all threads; phases live only for the call. In a fork() run()
//           throws and the destructor does nothing (base/fork_guard.h).
// Cost      dispatch + join of two spinning threads: target below 0.5 us; no allocation, no lock,
//           no system call while workers spin.
class WorkerPool {
 public:
  explicit WorkerPool(const PoolPlan& plan, const WorkerPoolOptions& options = {});
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int num_threads() const;
  int num_nodes() const;
  const PoolPlan& plan() const;

  // Runs phases[0] on every worker, a barrier, phases[1], ... and returns when all are done. Phases
  // round to nearest and keep subnormals, whatever the caller's thread is set to.
  void run(std::initializer_list<Phase> phases);

  // Pins the calling thread as worker 0 (affinity and memory policy), if the plan pins.
  void adopt_current_thread() const;

  // Pins the calling thread as worker 0 while it lives, then gives its affinity back: for a caller
  // of run() that is not the pool's own thread. Two or three system calls, about 1 us; none where
  // the plan does not pin.
  class CallerPin {
   public:
    explicit CallerPin(const WorkerPool& pool);
    ~CallerPin();
    CallerPin(const CallerPin&) = delete;
    CallerPin& operator=(const CallerPin&) = delete;

   private:
    struct Affinity;
    std::unique_ptr<Affinity> before_;  // null: nothing to give back
  };

  // Barriers since construction: one behind each phase, the join of a run among them. From any
  // thread.
  uint64_t num_barriers() const;

  // Threads now parked (for tests: an idle pool has num_threads() - 1).
  int num_parked() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
  ForkGuard home_;
};

}  // namespace kt
