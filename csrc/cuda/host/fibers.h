// Runs a CUDA kernel on one CPU thread: every CUDA thread is a fiber with a stack of its own.
//
// Fibers change at barriers, waits and shuffles only, in an order that a seed shuffles; now and
// then a warp falls behind the others; blocks run side by side or one after the other. Finds wrong
// results, lost arrivals, missing barriers and reads of memory that nothing has arrived in; knows
// neither time nor the memory model of a GPU.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace multiexit::host {

constexpr int kWarpSize = 32;

struct Rendezvous {
  int arrived = 0;
  unsigned turn = 0;
};

struct Warp {
  Rendezvous all;
  uint64_t exchanged[kWarpSize];
  int alive = 0;
  int asleep = 0;  // rounds
};

// An mbarrier: a phase ends when nobody and no byte is missing.
struct Phases {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;
  unsigned completed = 0;
};

struct Transfer {
  char* target;
  std::vector<char> data;
  const void* barrier;
  int rounds;  // until it lands
};

struct Block {
  unsigned index = 0;
  std::vector<char> memory;
  char* shared = nullptr;
  Rendezvous all;
  std::vector<Warp> warps;
  int alive = 0;
  std::map<const void*, Phases> barriers;
  std::vector<Transfer> transfers;
};

struct Copy {
  char* target;
  const char* source;
};

struct Fiber {
  static constexpr size_t kStack = 64 * 1024;

  Block* block = nullptr;
  unsigned thread = 0;
  bool has_started = false, is_done = false;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  jmp_buf where;
  std::deque<std::vector<Copy>> groups{1};  // of 16-byte copies; the last one is open
};

// Whether blocks run side by side: those of a grid that waits for itself must.
enum class Order { kOneByOne, kTogether };

class Machine {
 public:
  std::string failure;
  int64_t copied_bytes = 0;  // to shared memory, by the last kernel
  int64_t asked_bytes = 0;   // to L2
  unsigned num_blocks = 0, block_threads = 0;
  std::mt19937 random;
  Fiber* current = nullptr;

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void progress() { moved_ = true; }

  void fail(const std::string& what) {
    if (failure.empty()) failure = what;
  }

  // Back to the scheduler until it is this fiber's turn again.
  void yield() {
    Fiber* self = current;
    if (!_setjmp(self->where)) _longjmp(scheduler_, 1);
  }

  // Until `alive` threads, of which there may become fewer, have come.
  void meet(Rendezvous& place, const int& alive) {
    const unsigned turn = place.turn;
    ++place.arrived;
    progress();
    while (place.turn == turn) {
      if (place.arrived >= alive) {
        place.arrived = 0;
        ++place.turn;
        return;
      }
      yield();
    }
  }

  void check(Phases& phases) {
    if (phases.missing != 0 || phases.bytes != 0) return;
    ++phases.completed;
    phases.missing = phases.arrivals;
    progress();
  }

  // Whether the kernel ran to its end; `failure` says why not.
  bool run(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned seed,
           Order block_order, std::function<void()> kernel) {
    failure.clear();
    copied_bytes = asked_bytes = 0;
    num_blocks = blocks;
    block_threads = threads;
    random.seed(seed);
    kernel_ = std::move(kernel);
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    const size_t together = block_order == Order::kTogether ? blocks : 1;
    for (size_t first = 0; first < blocks && failure.empty(); first += together)
      run_together({order.begin() + first, order.begin() + first + together}, shared_bytes);
    return failure.empty();
  }

 private:
  void run_together(const std::vector<unsigned>& indices, size_t shared_bytes) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (const unsigned index : indices) {
      blocks.push_back(std::make_unique<Block>());
      prepare(*blocks.back(), index, shared_bytes);
      for (unsigned thread = 0; thread < block_threads; ++thread) {
        fibers.push_back(std::make_unique<Fiber>());
        prepare(*fibers.back(), *blocks.back(), thread);
      }
    }
    size_t alive = fibers.size();
    while (alive && failure.empty()) {
      moved_ = false;
      for (auto& block : blocks)
        for (Warp& warp : block->warps) sleep(warp);
      std::rotate(fibers.begin(), fibers.begin() + random() % fibers.size(), fibers.end());
      for (auto& fiber : fibers)
        if (!fiber->is_done && !fiber->block->warps[fiber->thread / kWarpSize].asleep) {
          resume(*fiber);
          alive -= fiber->is_done;
        }
      bool under_way = false;
      for (auto& block : blocks) under_way |= land(*block);
      if (!moved_ && !under_way) fail("deadlock: no thread can go on");
    }
    for (auto& block : blocks)
      if (!block->transfers.empty()) fail("a block ended with copies under way");
  }

  // As long as one sleeps, others may be waiting for it in vain.
  void sleep(Warp& warp) {
    if (warp.asleep)
      --warp.asleep;
    else if (random() % 16 == 0)
      warp.asleep = 1 + static_cast<int>(random() % 30);
    if (warp.asleep) moved_ = true;
  }

  void prepare(Block& block, unsigned index, size_t shared_bytes) {
    block.index = index;
    block.memory.assign(shared_bytes + 128, '\xff');
    const auto start = reinterpret_cast<uintptr_t>(block.memory.data());
    block.shared = block.memory.data() + (128 - start % 128);
    block.alive = static_cast<int>(block_threads);
    block.warps.resize((block_threads + kWarpSize - 1) / kWarpSize);
    for (unsigned thread = 0; thread < block_threads; ++thread)
      ++block.warps[thread / kWarpSize].alive;
  }

  void prepare(Fiber& fiber, Block& block, unsigned thread) {
    fiber.block = &block;
    fiber.thread = thread;
    fiber.stack.reset(new char[Fiber::kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::enter, 0);
  }

  // Jumps, other than swapcontext, ask the kernel for nothing.
  void resume(Fiber& fiber) {
    current = &fiber;
    if (_setjmp(scheduler_)) return;
    if (fiber.has_started) _longjmp(fiber.where, 1);
    fiber.has_started = true;
    setcontext(&fiber.context);
  }

  static void enter() {
    Machine& machine = get();
    machine.kernel_();
    Fiber& self = *machine.current;
    self.is_done = true;
    --self.block->alive;
    --self.block->warps[self.thread / kWarpSize].alive;
    machine.progress();
    _longjmp(machine.scheduler_, 1);
  }

  // Whether bytes are still on their way.
  bool land(Block& block) {
    auto& transfers = block.transfers;
    for (size_t i = 0; i < transfers.size();) {
      Transfer& transfer = transfers[i];
      if (--transfer.rounds > 0) {
        ++i;
        continue;
      }
      memcpy(transfer.target, transfer.data.data(), transfer.data.size());
      Phases& phases = block.barriers[transfer.barrier];
      phases.bytes -= static_cast<int64_t>(transfer.data.size());
      check(phases);
      transfers.erase(transfers.begin() + static_cast<std::ptrdiff_t>(i));
      moved_ = true;
    }
    return !transfers.empty();
  }

  std::function<void()> kernel_;
  jmp_buf scheduler_;
  bool moved_ = false;
};

}  // namespace multiexit::host
