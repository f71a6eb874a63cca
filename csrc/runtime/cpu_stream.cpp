#include "runtime/cpu_stream.h"

#include <atomic>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/parking_word.h"

namespace kt {
namespace {

// Both sides give their core up quickly: the waiting thread would take it from the worker pool that
// computes the result, the idle stream from the threads that prepare the next job. A sleep and its
// wake-up cost 4 to 15 us, so a few microseconds only catch what is about to happen anyway.
constexpr int kSpinUs = 4;

}  // namespace

// The queue is under a mutex; the words only tell that something changed. They are advanced outside
// the mutex, or the woken thread would run into it. Who waits reads the word first and the state
// after it: a change behind that look ends the wait at once.
struct CpuStream::State {
  struct Job {
    uint64_t ticket = 0;
    std::function<void()> body;
  };

  void run_jobs();
  void run_one(Job job);

  std::mutex mutex;
  std::deque<Job> jobs;                           // guarded by mutex
  bool caller_runs = false;                       // guarded by mutex: a job of run() is on its way
  std::map<uint64_t, std::exception_ptr> errors;  // guarded by mutex
  uint64_t num_submitted = 0;                     // guarded by mutex
  bool stopping = false;                          // guarded by mutex
  ParkingWord started;                            // once: thread_start has returned
  ParkingWord work;                               // a job was queued, or stopping
  ParkingWord done;                               // a job is done
  std::atomic<uint64_t> num_completed{0};
  std::atomic<std::thread::id> runner{};  // the thread a job runs on now
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

void CpuStream::State::run_jobs() {
  while (true) {
    const uint32_t seen = work.load();
    Job job;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!jobs.empty() && !caller_runs) {
        job = std::move(jobs.front());
        jobs.pop_front();
      } else if (stopping && jobs.empty()) {
        return;
      }
    }
    if (job.body) {
      run_one(std::move(job));
    } else {
      work.wait_while(seen, kSpinUs);
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
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work.advance();
  state_->thread.join();
}

uint64_t CpuStream::submit(std::function<void()> job) {
  KT_CHECK(job != nullptr, "The job given to CpuStream::submit() is empty; give a callable.");
  uint64_t ticket = 0;
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    ticket = ++state_->num_submitted;
    state_->jobs.push_back({ticket, std::move(job)});
  }
  state_->work.advance();
  return ticket;
}

void CpuStream::run(std::function<void()> job) {
  KT_CHECK(job != nullptr, "The job given to CpuStream::run() is empty; give a callable.");
  State& state = *state_;
  uint64_t ticket = 0;
  {
    const std::lock_guard<std::mutex> lock(state.mutex);
    // another caller's run() counts as completed before it has cleared caller_runs
    if (!state.caller_runs &&
        state.num_completed.load(std::memory_order_acquire) == state.num_submitted) {
      ticket = ++state.num_submitted;
      state.caller_runs = true;
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
    state.caller_runs = false;
    more = !state.jobs.empty() || state.stopping;
  }
  if (more) state.work.advance();
  wait(ticket);
}

void CpuStream::wait(uint64_t ticket) {
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

uint64_t CpuStream::completed() const {
  return state_->num_completed.load(std::memory_order_acquire);
}

}  // namespace kt
