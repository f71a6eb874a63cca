// An in-order queue of closures with a thread of its own. Knows no MoE, no Torch, no CUDA.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "base/fork_guard.h"

namespace kt {

// Jobs that arrive otherwise than by CpuStream::submit(): a device rings for them by writing
// memory.
class PolledWork {
 public:
  virtual ~PolledWork() = default;
  // Whether a job waits. Called by the stream's thread only, in a loop: a few loads.
  virtual bool ready() = 0;
  // Runs the job that ready() saw. Throws nothing.
  virtual void run() = 0;
};

// Protocol
//   state      who writes                                who waits
//   queued     submit()                                  the stream's thread
//   running    the stream's thread, or run()'s caller    the stream's thread, while a caller runs
//   done       whoever ran it                            wait(ticket), by any thread
//
// Ordering  jobs run in the order of submit(); everything a job wrote is visible to a wait() that
//           returned for its ticket or a later one.
// Errors    an exception of a job is kept under its ticket and rethrown by wait(ticket), once;
//           later jobs run.
// Threads   submit() and wait() from any thread.
// Lifetime  the destructor runs what is queued, then joins. In a fork() whatever queues or waits
//           throws and the destructor does nothing (base/fork_guard.h).
class CpuStream {
 public:
  // thread_start runs first on the stream's thread (pinning, naming).
  explicit CpuStream(std::function<void()> thread_start = {});
  ~CpuStream();
  CpuStream(const CpuStream&) = delete;
  CpuStream& operator=(const CpuStream&) = delete;

  // Queues a job and returns its ticket (1, 2, ...). Never waits for jobs.
  uint64_t submit(std::function<void()> job);
  // Returns when job `ticket` is done. A ticket that was never given out throws kt::Error.
  void wait(uint64_t ticket);
  // submit() and wait() in one, without a change of thread where there is no need for one: a job
  // that finds the stream idle runs on the calling thread, in its place of the order. A hand-over
  // and back costs two wake-ups, 10 to 60 us.
  void run(std::function<void()> job);
  // Tickets whose job is done.
  uint64_t completed() const;

  // From now on the stream's thread looks for `work` whenever its queue is empty, and runs it as a
  // job: in one order with those of submit() and run(), never beside them. It spins for `spin_us`
  // after its last job or wake(), then looks after sleeps that grow with the idle time from 50 us
  // to 20 ms (an eighth of it), so that a wake() which never came makes a job late and not lost.
  // Lifetime  `work` stays until detach() has returned.
  void attach(PolledWork& work, int64_t spin_us);
  // Returns when the thread does not look at `work` any more, after what is queued.
  void detach(PolledWork& work);
  // Ends a sleep of the stream's thread and begins its spinning anew. From any thread; no lock, no
  // allocation.
  void wake();

 private:
  struct State;
  std::unique_ptr<State> state_;
  ForkGuard home_;
};

}  // namespace kt
