// An in-order queue of closures with a thread of its own. Knows no MoE, no Torch, no CUDA.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace kt {

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
// Lifetime  the destructor runs what is queued, then joins.
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

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kt
