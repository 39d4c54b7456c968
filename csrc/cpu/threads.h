// The team of threads that shares the work of one call.
#pragma once
#include <cstdint>
#include <type_traits>

namespace multiexit::cpu {

using Job = void (*)(void* argument, int64_t chunk, int rank);

// Most threads that ever work together; ranks are below it.
constexpr int kMaxThreads = 256;

// Runs job(argument, chunk, rank) for each chunk in [0, chunks) on at most `threads` threads, the
// caller among them, and returns when all are done. Each thread begins with a run of neighbouring
// chunks and then takes what others have left, one by one, so a helper that is late delays nobody,
// and the caller never waits for one that has not begun.
void run_chunks(int threads, int64_t chunks, Job job, void* argument);

template <class Function>
void parallel_for(int threads, int64_t chunks, Function&& function) {
  using Plain = std::remove_reference_t<Function>;
  Job job = [](void* argument, int64_t chunk, int rank) {
    (*static_cast<Plain*>(argument))(chunk, rank);
  };
  run_chunks(threads, chunks, job, const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace multiexit::cpu
