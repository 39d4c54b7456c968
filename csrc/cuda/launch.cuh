// What the host asks CUDA for. host/launch.h models it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace multiexit::cuda {

struct Device {
  int index = 0, multiprocessors = 0, shared_bytes = 0, capability = 0;
};

// Of the current device: 0, or CUDA's error.
inline int find_device(Device& device) {
  int major = 0, minor = 0;
  const auto ask = [&](cudaDeviceAttr what, int& answer) {
    return cudaDeviceGetAttribute(&answer, what, device.index);
  };
  cudaError_t error = cudaGetDevice(&device.index);
  if (!error) error = ask(cudaDevAttrMultiProcessorCount, device.multiprocessors);
  if (!error) error = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes);
  if (!error) error = ask(cudaDevAttrComputeCapabilityMajor, major);
  if (!error) error = ask(cudaDevAttrComputeCapabilityMinor, minor);
  device.capability = 10 * major + minor;
  return error;
}

// One stream's next kernel, with an attribute or none.
template <class Task>
int launch_with(const cudaLaunchAttribute* attribute, void (*kernel)(Task), int64_t blocks,
                int threads, int64_t shared_bytes, uint64_t stream, const Task& task) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
  if (error) return error;
  cudaLaunchAttribute own = attribute ? *attribute : cudaLaunchAttribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &own;
  config.numAttrs = attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, task);
}

// On sm_90 and later it may start before the one in front has ended.
template <class Task>
int launch(void (*kernel)(Task), const Device& device, int64_t blocks, int threads,
           int64_t shared_bytes, uint64_t stream, const Task& task) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(device.capability >= 90 ? &overlap : nullptr, kernel, blocks, threads,
                     shared_bytes, stream, task);
}

// All its blocks are on the device at once, or CUDA refuses it.
template <class Task>
int launch_together(void (*kernel)(Task), const Device&, int64_t blocks, int threads,
                    int64_t shared_bytes, uint64_t stream, const Task& task) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  return launch_with(&together, kernel, blocks, threads, shared_bytes, stream, task);
}

inline const char* cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace multiexit::cuda
