// Short jobs of different lengths, one upon the other: each chunk runs exactly once. A helper that
// is between two tickets when the next job begins is rare, so it takes many jobs to meet one.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "cpu/threads.h"

using namespace multiexit::cpu;

int main() {
  constexpr int kJobs = 500000, kMost = 40;
  std::atomic<int> runs[kMost];
  for (int threads : {2, 3}) {
    for (int i = 0; i < kJobs; ++i) {
      const int chunks = i % 2 ? 2 : kMost;
      for (auto& run : runs) run.store(0, std::memory_order_relaxed);
      parallel_for(threads, chunks, [&](int64_t chunk, int) {
        runs[chunk].fetch_add(1, std::memory_order_relaxed);
      });
      for (int chunk = 0; chunk < kMost; ++chunk)
        if (runs[chunk].load() != (chunk < chunks)) {
          std::printf("job %d, chunk %d ran %d times\n", i, chunk, runs[chunk].load());
          return EXIT_FAILURE;
        }
    }
  }
  return EXIT_SUCCESS;
}
