#include "runtime/cpu_stream.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/parking_word.h"

namespace kt {
namespace {

// Both sides give their core up quickly: the waiting thread would take it from the worker pool that
// computes the result, the idle stream from the threads that prepare the next job. A sleep and its
// wake-up cost 4 to 15 us, so a few microseconds only catch what is about to happen anyway.
constexpr int kSpinUs = 4;

// Sleeps between two looks at polled work: not shorter than the kernel's timer slack (50 us), and
// 50 wake-ups a second on an idle host.
constexpr int64_t kMinPollSleepUs = 50;
constexpr int64_t kMaxPollSleepUs = 20'000;
// Looks between two readings of the clock (25 ns).
constexpr int kPollsPerClockRead = 32;

using Clock = std::chrono::steady_clock;

// First in, first out, in memory that is kept: it doubles when it is full.
class JobQueue {
 public:
  struct Job {
    uint64_t ticket = 0;
    std::function<void()> body;
  };

  bool empty() const { return size_ == 0; }

  void push(Job job) {
    if (size_ == ring_.size()) grow();
    ring_[(first_ + size_) % ring_.size()] = std::move(job);
    ++size_;
  }

  Job pop() {
    Job job = std::move(ring_[first_]);
    first_ = (first_ + 1) % ring_.size();
    --size_;
    return job;
  }

 private:
  void grow() {
    std::vector<Job> larger(2 * size_);
    for (size_t i = 0; i < size_; ++i) larger[i] = std::move(ring_[(first_ + i) % size_]);
    ring_ = std::move(larger);
    first_ = 0;
  }

  std::vector<Job> ring_ = std::vector<Job>(16);
  size_t first_ = 0;
  size_t size_ = 0;
};

using Job = JobQueue::Job;

}  // namespace

// The queue is under a mutex; the words only tell that something changed. They are advanced outside
// the mutex, or the woken thread would run into it. Who waits reads the word first and the state
// after it: a change behind that look ends the wait at once.
struct CpuStream::State {
  struct Polled {
    PolledWork* work = nullptr;
    std::chrono::microseconds spin{0};
  };

  void run_jobs();
  void run_one(Job job);
  PolledWork* poll(uint32_t seen);
  void run_polled(PolledWork& found, uint32_t seen);

  std::mutex mutex;
  JobQueue jobs;                                  // guarded by mutex
  std::map<uint64_t, std::exception_ptr> errors;  // guarded by mutex
  uint64_t num_submitted = 0;                     // guarded by mutex
  bool stopping = false;                          // guarded by mutex
  std::atomic<bool> caller_runs{false};  // a job of run() is on its way; written under mutex
  ParkingWord started;                   // once: thread_start has returned
  ParkingWord work;                      // a job was queued, or stopping
  ParkingWord done;                      // a job is done
  std::atomic<uint64_t> num_completed{0};
  std::atomic<std::thread::id> runner{};  // the thread a job runs on now
  std::vector<Polled> polled;             // the stream's thread's own
  Clock::time_point last_active{};        // the stream's thread's own: its last job or wake()
  std::atomic<bool> polls{false};         // `polled` is not empty
  std::thread thread;
};

void CpuStream::State::run_one(Job job) {
  std::exception_ptr error;
  runner.store(std::this_thread::get_id(), std::memory_order_relaxed);
  try {
    job.body();
  } catch (...) {
    error = std::current_exception();
  }
  runner.store({}, std::memory_order_relaxed);
  // what the closure holds is released before anybody learns that it is done
  job.body = nullptr;
  if (error) {
    const std::lock_guard<std::mutex> lock(mutex);
    errors.emplace(job.ticket, std::move(error));
  }
  num_completed.store(job.ticket, std::memory_order_release);
  done.advance();
}

// Looks for polled work until there is some, or until `work` is no longer `seen`: null. While a
// caller runs its job no other may begin, and the caller may be pinned to this thread's CPU (see
// WorkerPool::CallerPin), where a poll would take half of it: asleep until run() ends, which
// advances `work`.
PolledWork* CpuStream::State::poll(uint32_t seen) {
  std::chrono::microseconds spin{0};
  for (const Polled& source : polled) spin = std::max(spin, source.spin);
  while (true) {
    for (int i = 0; i < kPollsPerClockRead; ++i) {
      for (const Polled& source : polled) {
        if (source.work->ready()) return source.work;
      }
      if (work.load() != seen) return nullptr;
      if (caller_runs.load(std::memory_order_relaxed)) {
        work.wait_while(seen, 0);
        return nullptr;
      }
      __builtin_ia32_pause();
    }
    const auto idle =
        std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - last_active);
    if (idle < spin) continue;
    const int64_t sleep_us =
        std::clamp<int64_t>(idle.count() / 8, kMinPollSleepUs, kMaxPollSleepUs);
    if (work.wait_while_for(seen, 0, sleep_us) != seen) return nullptr;
  }
}

// The job takes its ticket when it is found; where a caller of run() is at work, its end changes
// `work`, and the job is found again.
void CpuStream::State::run_polled(PolledWork& found, uint32_t seen) {
  uint64_t ticket = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!caller_runs.load(std::memory_order_relaxed)) {
      if (!jobs.empty()) return;
      ticket = ++num_submitted;
    }
  }
  if (ticket != 0) {
    run_one({ticket, [&found] { found.run(); }});
  } else {
    work.wait_while(seen, kSpinUs);
  }
}

void CpuStream::State::run_jobs() {
  uint32_t last_seen = 0;
  while (true) {
    const uint32_t seen = work.load();
    if (seen != last_seen) last_active = Clock::now();
    last_seen = seen;
    Job job;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!jobs.empty() && !caller_runs.load(std::memory_order_relaxed)) {
        job = jobs.pop();
      } else if (stopping && jobs.empty()) {
        return;
      }
    }
    if (job.body) {
      run_one(std::move(job));
      if (!polled.empty()) last_active = Clock::now();
    } else if (polled.empty()) {
      work.wait_while(seen, kSpinUs);
    } else if (PolledWork* const found = poll(seen)) {
      run_polled(*found, seen);
      last_active = Clock::now();
    }
  }
}

CpuStream::CpuStream(std::function<void()> thread_start) : state_(std::make_unique<State>()) {
  std::exception_ptr start_error;
  State& state = *state_;
  state.thread = std::thread([&state, &start_error, start = std::move(thread_start)] {
    try {
      if (start) start();
    } catch (...) {
      start_error = std::current_exception();
    }
    const bool failed = start_error != nullptr;
    state.started.advance();
    if (!failed) state.run_jobs();
  });
  state.started.wait_while(0, kSpinUs);
  if (start_error) {
    state.thread.join();
    std::rethrow_exception(start_error);
  }
}

CpuStream::~CpuStream() {
  if (home_.inherited()) {
    state_.release();
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work.advance();
  state_->thread.join();
}

uint64_t CpuStream::submit(std::function<void()> job) {
  home_.check();
  KT_CHECK(job != nullptr, "The job given to CpuStream::submit() is empty; give a callable.");
  uint64_t ticket = 0;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->jobs.push({state_->num_submitted + 1, std::move(job)});
    ticket = ++state_->num_submitted;
  }
  state_->work.advance();
  return ticket;
}

void CpuStream::run(std::function<void()> job) {
  home_.check();
  KT_CHECK(job != nullptr, "The job given to CpuStream::run() is empty; give a callable.");
  State& state = *state_;
  uint64_t ticket = 0;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    // another caller's run() counts as completed before it has cleared caller_runs
    if (!state.caller_runs.load(std::memory_order_relaxed) &&
        state.num_completed.load(std::memory_order_acquire) == state.num_submitted) {
      ticket = ++state.num_submitted;
      state.caller_runs.store(true, std::memory_order_relaxed);
    }
  }
  if (ticket == 0) {
    // before it is queued: it refers to what ends with this call
    KT_CHECK(std::this_thread::get_id() != state.runner.load(std::memory_order_relaxed),
             "A job of the stream calls run(), which waits for its own end: this never ends; call "
             "the inner job directly.");
    wait(submit(std::move(job)));
    return;
  }
  state.run_one({ticket, std::move(job)});
  bool more = false;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    state.caller_runs.store(false, std::memory_order_relaxed);
    more = !state.jobs.empty() || state.stopping || state.polls.load(std::memory_order_relaxed);
  }
  if (more) state.work.advance();
  wait(ticket);
}

void CpuStream::wait(uint64_t ticket) {
  home_.check();
  State& state = *state_;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    KT_CHECK(ticket >= 1 && ticket <= state.num_submitted,
             "Ticket " << ticket << " was never given out by this stream (the last is "
                       << state.num_submitted << "); wait for a ticket that submit() returned.");
  }
  const auto is_done = [&] {
    return state.num_completed.load(std::memory_order_acquire) >= ticket;
  };
  KT_CHECK(is_done() || std::this_thread::get_id() != state.runner.load(std::memory_order_relaxed),
           "A job of the stream waits for ticket " << ticket
                                                   << ", which runs after it: this never ends.");
  while (true) {
    const uint32_t seen = state.done.load();
    if (is_done()) break;
    state.done.wait_while(seen, kSpinUs);
  }
  std::exception_ptr error;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    const auto found = state.errors.find(ticket);
    if (found == state.errors.end()) return;
    error = std::move(found->second);
    state.errors.erase(found);
  }
  std::rethrow_exception(error);
}

// Both as jobs, so that only the stream's thread ever touches the list.
void CpuStream::attach(PolledWork& work, int64_t spin_us) {
  State& state = *state_;
  wait(submit([&state, &work, spin_us] {
    state.polled.push_back({&work, std::chrono::microseconds(spin_us)});
    state.polls.store(true, std::memory_order_relaxed);
  }));
}

void CpuStream::detach(PolledWork& work) {
  State& state = *state_;
  wait(submit([&state, &work] {
    std::erase_if(state.polled,
                  [&work](const State::Polled& source) { return source.work == &work; });
    state.polls.store(!state.polled.empty(), std::memory_order_relaxed);
  }));
}

void CpuStream::wake() { state_->work.advance(); }

uint64_t CpuStream::completed() const {
  return state_->num_completed.load(std::memory_order_acquire);
}

}  // namespace kt
