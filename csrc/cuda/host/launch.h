// Models launch.cuh: a device with few multiprocessors, whose order of threads a seed decides.
#pragma once
#include "cuda/host/builtins.h"

extern "C" {

// What the model is like; tests change it between launches.
__attribute__((visibility("default"))) inline unsigned multiexit_host_seed = 0;
__attribute__((visibility("default"))) inline int multiexit_host_multiprocessors = 3;
__attribute__((visibility("default"))) inline int multiexit_host_shared_bytes = 227 * 1024;
// Of a grid that waits for itself, blocks one after the other all the same.
__attribute__((visibility("default"))) inline int multiexit_host_apart = 0;
// What the last kernel did.
__attribute__((visibility("default"))) inline int multiexit_host_copied_bytes = 0;
__attribute__((visibility("default"))) inline int multiexit_host_asked_bytes = 0;
}

namespace multiexit::cuda {

struct Device {
  int index = 0, multiprocessors = 0, shared_bytes = 0, capability = 0;
};

inline int find_device(Device& device) {
  device = {0, multiexit_host_multiprocessors, multiexit_host_shared_bytes, MULTIEXIT_CAPABILITY};
  return 0;
}

constexpr int kLaunchFailed = 719;

template <class Task>
int launch_in(host::Order order, void (*kernel)(Task), int64_t blocks, int threads,
              int64_t shared_bytes, const Task& task) {
  const bool ended = host::Machine::get().run(static_cast<unsigned>(blocks), threads, shared_bytes,
                                              multiexit_host_seed, order, [&] { kernel(task); });
  multiexit_host_copied_bytes = static_cast<int>(host::Machine::get().copied_bytes);
  multiexit_host_asked_bytes = static_cast<int>(host::Machine::get().asked_bytes);
  return ended ? 0 : kLaunchFailed;
}

template <class Task>
int launch(void (*kernel)(Task), const Device&, int64_t blocks, int threads, int64_t shared_bytes,
           uint64_t, const Task& task) {
  const auto order = multiexit_host_seed % 2 ? host::Order::kTogether : host::Order::kOneByOne;
  return launch_in(order, kernel, blocks, threads, shared_bytes, task);
}

template <class Task>
int launch_together(void (*kernel)(Task), const Device&, int64_t blocks, int threads,
                    int64_t shared_bytes, uint64_t, const Task& task) {
  const auto order = multiexit_host_apart ? host::Order::kOneByOne : host::Order::kTogether;
  return launch_in(order, kernel, blocks, threads, shared_bytes, task);
}

inline const char* cuda_error_text(int) { return host::Machine::get().failure.c_str(); }

}  // namespace multiexit::cuda
