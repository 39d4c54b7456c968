// PTX that CUDA C++ has no words for: copies to shared memory behind the threads' back, and what
// waits for them. host/copies.h models each of these functions.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

// The capability that code is compiled for; the host's pass over a kernel compiles none of it.
#ifdef __CUDA_ARCH__
#define MULTIEXIT_CAPABILITY (__CUDA_ARCH__ / 10)
#else
#define MULTIEXIT_CAPABILITY 0
#endif

namespace multiexit::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

#if MULTIEXIT_CAPABILITY >= 90

using Transfers = uint64_t;  // an mbarrier

// To be called by one thread; `arrivals` calls of `expect` and their bytes complete a phase.
__device__ __forceinline__ void prepare(Transfers* transfers, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(transfers)),
               "r"(arrivals)
               : "memory");
}

// After it, copies see the barriers that this thread has prepared.
__device__ __forceinline__ void publish_prepared() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect(Transfers* transfers, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(transfers)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool has_completed(Transfers* transfers, uint32_t parity) {
  uint32_t completed;
  asm volatile(
      "{\n"
      ".reg .pred completed;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 completed, [%1], %2;\n"
      "selp.u32 %0, 1, 0, completed;\n"
      "}"
      : "=r"(completed)
      : "r"(shared_address(transfers)), "r"(parity)
      : "memory");
  return completed;
}

// Addresses and bytes are multiples of 16. The bytes are not kept in the L2 cache: nobody reads
// them again before the next step.
__device__ __forceinline__ void copy_bulk(void* target, const void* source, int bytes,
                                          Transfers* transfers) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(transfers)), "l"(policy)
      : "memory");
}

// L2 fetches bytes, in multiples of 16, that will be read soon.
__device__ __forceinline__ void ask_for_bytes(const void* source, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// What comes before it may run while the kernel launched before this one still does.
__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// From here on the next kernel may start, as far as there is room beside this one.
__device__ __forceinline__ void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

#else

__device__ __forceinline__ void ask_for_bytes(const void*, int) {}
__device__ __forceinline__ void wait_for_previous_kernel() {}
__device__ __forceinline__ void let_next_kernel_start() {}

#endif

__device__ __forceinline__ void copy_16_bytes(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)),
               "l"(source)
               : "memory");
}

// Closes the group of this thread's copies since the last call.
__device__ __forceinline__ void close_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all of this thread's groups but the last `OPEN` have landed.
template <int OPEN>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

}  // namespace multiexit::cuda
