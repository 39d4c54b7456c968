// Models copies.cuh: bytes are NaN from the moment that they are asked for until they have landed,
// some rounds later or, of 16-byte copies, when somebody waits for them and no sooner.
#pragma once
#include "cuda/host/fibers.h"

// The capability whose kernels are modelled; tests build one library for each kind of ring.
#ifndef MULTIEXIT_CAPABILITY
#define MULTIEXIT_CAPABILITY 90
#endif

namespace multiexit::cuda {

using Transfers = uint64_t;

inline host::Phases& phases_of(Transfers* transfers) {
  auto& barriers = host::Machine::get().current->block->barriers;
  const auto found = barriers.find(transfers);
  if (found != barriers.end()) return found->second;
  host::Machine::get().fail("a barrier is used that was not prepared");
  return barriers[transfers];
}

inline void prepare(Transfers* transfers, int arrivals) {
  host::Phases& phases = host::Machine::get().current->block->barriers[transfers];
  phases = {};
  phases.arrivals = phases.missing = arrivals;
}

inline void publish_prepared() {}

inline void expect(Transfers* transfers, int bytes) {
  host::Phases& phases = phases_of(transfers);
  phases.bytes += bytes;
  --phases.missing;
  host::Machine::get().progress();
  host::Machine::get().check(phases);
}

inline bool has_completed(Transfers* transfers, uint32_t parity) {
  if ((phases_of(transfers).completed & 1) != parity) {
    host::Machine::get().progress();
    return true;
  }
  host::Machine::get().yield();
  return false;
}

inline void check_alignment(const void* target, const void* source, int bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source);
  if ((bits | bytes) % 16) host::Machine::get().fail("a copy is not aligned to 16 bytes");
}

inline void copy_bulk(void* target, const void* source, int bytes, Transfers* transfers) {
  auto& machine = host::Machine::get();
  check_alignment(target, source, bytes);
  machine.copied_bytes += bytes;
  const char* from = static_cast<const char*>(source);
  machine.current->block->transfers.push_back({static_cast<char*>(target),
                                               {from, from + bytes},
                                               transfers,
                                               1 + static_cast<int>(machine.random() % 5)});
  memset(target, 0xff, bytes);
}

inline void ask_for_bytes(const void* source, int bytes) {
  check_alignment(source, source, bytes);
  host::Machine::get().asked_bytes += bytes;
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

inline void copy_16_bytes(void* target, const void* source) {
  check_alignment(target, source, 16);
  host::Machine::get().copied_bytes += 16;
  memset(target, 0xff, 16);
  host::Machine::get().current->groups.back().push_back(
      {static_cast<char*>(target), static_cast<const char*>(source)});
}

inline void close_group() { host::Machine::get().current->groups.emplace_back(); }

template <int OPEN>
void wait_for_groups() {
  auto& groups = host::Machine::get().current->groups;
  for (; groups.size() > OPEN + 1; groups.pop_front())
    for (const host::Copy& copy : groups.front()) memcpy(copy.target, copy.source, 16);
}

}  // namespace multiexit::cuda
