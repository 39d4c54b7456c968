#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace multiexit::cpu {

namespace {

// About 50 us: longer than the gaps between the products of a layer, shorter than a step of Python.
constexpr int kSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Team {
 public:
  void run(int threads, int64_t chunks, Job job, void* argument) {
    grow(threads - 1);
    const uint64_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
    job_.store(job, std::memory_order_relaxed);
    argument_.store(argument, std::memory_order_relaxed);
    threads_.store(threads, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    for (int rank = 0; rank < threads; ++rank)
      ranges_[rank].open(epoch, chunks * rank / threads, chunks * (rank + 1) / threads);
    epoch_.store(epoch, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    help(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < chunks; ++spins)
      spins < kSpins ? pause() : static_cast<void>(sched_yield());
  }

  std::atomic_flag busy = ATOMIC_FLAG_INIT;

 private:
  // Chunks that follow each other, so that one thread reads memory in the order of its addresses.
  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};  // epoch << 32 | next chunk
    std::atomic<int64_t> stop{0};

    // No chunk can be taken between two jobs: who still holds the old ticket fails to change it
    // once it is closed, and who sees the new end sees a closed or a new ticket.
    void open(uint64_t epoch, int64_t first, int64_t end) {
      ticket.store(epoch << 32 | UINT32_MAX, std::memory_order_relaxed);
      stop.store(end, std::memory_order_release);
      ticket.store(epoch << 32 | static_cast<uint64_t>(first), std::memory_order_release);
    }
  };

  // Its own range first, then what others have left.
  void help(int rank) {
    const int threads = threads_.load(std::memory_order_relaxed);
    int64_t ran = 0;
    for (int i = 0; i < threads; ++i)
      while (take(ranges_[(rank + i) % threads], rank)) ++ran;
    if (ran) done_.fetch_add(ran, std::memory_order_release);
  }

  // Runs one chunk; false when there is none. The job is read before its ticket is taken: taking
  // fails where another job began meanwhile, and a job's chunks end before the next job begins.
  bool take(Range& range, int rank) {
    uint64_t ticket = range.ticket.load(std::memory_order_acquire);
    for (;;) {
      const int64_t chunk = static_cast<uint32_t>(ticket);
      if (chunk >= range.stop.load(std::memory_order_acquire)) return false;
      const Job job = job_.load(std::memory_order_relaxed);
      void* argument = argument_.load(std::memory_order_relaxed);
      if (rank >= threads_.load(std::memory_order_relaxed)) return false;
      if (range.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
        job(argument, chunk, rank);
        return true;
      }
    }
  }

  void work(int rank) {
    for (;;) {
      const uint64_t epoch = epoch_.load(std::memory_order_acquire);
      help(rank);
      int spins = 0;
      while (epoch_.load(std::memory_order_acquire) == epoch && ++spins < kSpins) pause();
      if (spins < kSpins) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != epoch; });
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }
  }

  // Helpers live as long as the process: they hold nothing and sleep when there is no work.
  void grow(int helpers) {
    for (; helpers_ < helpers; ++helpers_)
      std::thread([this, rank = helpers_ + 1] { work(rank); }).detach();
  }

  std::atomic<uint64_t> epoch_{0};
  std::atomic<Job> job_{nullptr};
  std::atomic<void*> argument_{nullptr};
  std::atomic<int> threads_{0};
  Range ranges_[kMaxThreads];
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  int helpers_ = 0;
};

std::atomic<Team*> current_team{nullptr};

// A child process has none of its parent's threads; the old team is left alone, since its locks
// may be held by threads that are gone.
void forget_team() { current_team.store(nullptr); }

Team& team() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_team); });
  Team* found = current_team.load();
  if (!found) {
    Team* made = new Team;
    if (current_team.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

void run_chunks(int threads, int64_t chunks, Job job, void* argument) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads > 1 && chunks > 1) {
    Team& shared = team();
    // A second caller at the same time works alone rather than waiting.
    if (!shared.busy.test_and_set(std::memory_order_acquire)) {
      shared.run(threads, chunks, job, argument);
      shared.busy.clear(std::memory_order_release);
      return;
    }
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) job(argument, chunk, 0);
}

}  // namespace multiexit::cpu
