#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace multiexit::cpu {

#if defined(__x86_64__)
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static bool can_run(const Kernels& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx512bf16"))
    return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
  if (!std::strcmp(kernels.name, "avx512")) return has_avx512();
  if (!std::strcmp(kernels.name, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#endif
  return !std::strcmp(kernels.name, "scalar");
}

static const Kernels* find(const char* name) {
  const Kernels* const best_first[] = {
#if defined(__x86_64__)
      &avx512bf16_kernels(), &avx512_kernels(), &avx2_kernels(),
#endif
      &scalar_kernels()};
  for (const Kernels* each : best_first)
    if (can_run(*each) && (!name || !std::strcmp(name, each->name))) return each;
  return nullptr;
}

static const Kernels* detect() {
  const Kernels* forced = find(std::getenv("MULTIEXIT_CPU_ISA"));
  return forced ? forced : find(nullptr);
}

static std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{detect()};
  return chosen;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool choose_isa(const char* name) {
  const Kernels* found = find(name);
  if (found) current().store(found, std::memory_order_relaxed);
  return found;
}

}  // namespace multiexit::cpu
