// One thread block on the CPU: every thread is a fiber, and the fibers of a block take turns. A
// fiber runs until it waits at a barrier or shuffle, or returns. A warp goes on through its
// shuffles as far as it can before the next warp starts, so that each runs as far ahead of the
// others as barriers allow. Threads that wait at different places, or for threads that have
// returned, are an error that hangs or corrupts on a GPU: the process aborts with the lines
// involved.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastpo::sim {

struct Site {
  const char* file;
  int line;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
};

// Order in which warps, and threads in a warp, take their turns: 0 ascending, 1 descending, 2
// shuffled again and again by a generator of fixed seed. A missing barrier shows in one of them.
inline int thread_order = 0;
inline void set_thread_order(int order) { thread_order = order; }

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;
inline void leave_stack(void** fake, const void* to, size_t bytes) {
  __sanitizer_start_switch_fiber(fake, to, bytes);
}
inline void enter_stack(void* fake, const void** from = nullptr, size_t* bytes = nullptr) {
  __sanitizer_finish_switch_fiber(fake, from, bytes);
}
// A finished fiber leaves its last frames marked on the stack that the next one starts on.
inline void clear_stack(void* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }
#else
constexpr size_t kStackBytes = 64 << 10;
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void** = nullptr, size_t* = nullptr) {}
inline void clear_stack(void*) {}
#endif

class Block {
 public:
  static constexpr int kWarpThreads = 32;

  // The block whose fiber runs now.
  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  Block(int threads, size_t shared_bytes, std::function<void()> body)
      : body_(std::move(body)), fibers_(threads), shared_bytes_(shared_bytes) {
    if (threads % kWarpThreads != 0) fail("the block size is not a multiple of the warp size");
    for (int i = 0; i < threads / kWarpThreads; ++i) warps_.push_back(i);
    for (int i = 0; i < kWarpThreads; ++i) lanes_.push_back(i);
    if (thread_order == 1) {
      std::reverse(warps_.begin(), warps_.end());
      std::reverse(lanes_.begin(), lanes_.end());
    }
  }

  void run(int64_t index) {
    index_ = index;
    shared_.clear();
    current() = this;
    for (size_t i = 0; i < fibers_.size(); ++i) start(fibers_[i], stack(i));
    do {
      if (thread_order == 2) std::shuffle(warps_.begin(), warps_.end(), generator_);
      for (int warp : warps_) run_warp(warp * kWarpThreads);
    } while (release_barrier());
    current() = nullptr;
  }

  int thread() const { return running_; }
  int64_t index() const { return index_; }

  void barrier(Site site) { wait(State::kAtBarrier, site); }

  // The value that lane `source` of the caller's warp brings to the same shuffle. Two slots per
  // fiber, used in turn, since a fiber may come to the next shuffle before its neighbour has read.
  template <typename T>
  T shuffle(T value, int source, Site site) {
    static_assert(sizeof(T) <= sizeof(Fiber::slots[0]));
    Fiber& self = fibers_[running_];
    const int turn = self.turn ^= 1;
    std::memcpy(self.slots[turn], &value, sizeof(T));
    const int first = running_ / kWarpThreads * kWarpThreads;
    wait(State::kAtShuffle, site);
    if (source < kWarpThreads) {
      std::memcpy(&value, fibers_[first + source].slots[turn], sizeof(T));
    }
    return value;
  }

  // Shared memory of one declaration, told apart by `key`. Filled with NaN, so that a read before
  // any write shows; an allocation of its own, so that AddressSanitizer sees its ends.
  void* shared(const void* key, size_t bytes) {
    auto& memory = shared_[key];
    if (!memory) {
      memory.reset(new unsigned char[bytes]);
      std::memset(memory.get(), 0xff, bytes);
    }
    return memory.get();
  }
  void* dynamic_shared() { return shared(nullptr, shared_bytes_); }

  [[noreturn]] static void fail(const char* message) {
    std::fprintf(stderr, "fastpo sim: %s\n", message);
    std::abort();
  }

 private:
  enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

  struct Fiber {
    ucontext_t context;
    char* stack;
    void* fake_stack;  // AddressSanitizer's
    State state;
    Site site;
    int turn;
    unsigned char slots[2][8];
  };

  // Stacks are kept for the next launch.
  static char* stack(size_t i) {
    static thread_local std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= i) stacks.emplace_back(new char[kStackBytes]);
    return stacks[i].get();
  }

  static void start(Fiber& fiber, char* stack) {
    clear_stack(stack);
    fiber.stack = stack;
    fiber.fake_stack = nullptr;
    fiber.state = State::kReady;
    fiber.turn = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  static void enter() {
    Block& block = *current();
    enter_stack(nullptr, &block.scheduler_stack_, &block.scheduler_stack_bytes_);
    block.body_();
    Fiber& self = block.fibers_[block.running_];
    self.state = State::kDone;
    leave_stack(nullptr, block.scheduler_stack_, block.scheduler_stack_bytes_);
    setcontext(&block.scheduler_);
  }

  void resume(int thread) {
    running_ = thread;
    Fiber& fiber = fibers_[thread];
    void* fake_stack = nullptr;
    leave_stack(&fake_stack, fiber.stack, kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    enter_stack(fake_stack);
  }

  void wait(State state, Site site) {
    Fiber& self = fibers_[running_];
    self.state = state;
    self.site = site;
    leave_stack(&self.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&self.context, &scheduler_);
    enter_stack(self.fake_stack);
  }

  void run_warp(int first) {
    do {
      if (thread_order == 2) std::shuffle(lanes_.begin(), lanes_.end(), generator_);
      for (int lane : lanes_) {
        if (fibers_[first + lane].state == State::kReady) resume(first + lane);
      }
    } while (release(State::kAtShuffle, first, first + kWarpThreads));
  }

  // Called when no fiber can run. False when all have returned.
  bool release_barrier() {
    if (release(State::kAtBarrier, 0, fibers_.size())) return true;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state != State::kDone) fail_divergent();
    }
    return false;
  }

  // Lets fibers [first, last) go on if all of them wait in `state` at one line.
  bool release(State state, size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      if (fibers_[i].state != state || !(fibers_[i].site == fibers_[first].site)) return false;
    }
    for (size_t i = first; i < last; ++i) fibers_[i].state = State::kReady;
    return true;
  }

  [[noreturn]] void fail_divergent() const {
    std::fprintf(stderr, "fastpo sim: divergent barrier or shuffle in block %lld\n",
                 static_cast<long long>(index_));
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const Fiber& fiber = fibers_[i];
      const auto same = [&](const Fiber& other) {
        return other.state == fiber.state &&
               (fiber.state == State::kDone || other.site == fiber.site);
      };
      if (std::any_of(fibers_.begin(), fibers_.begin() + i, same)) continue;
      const auto counted = std::count_if(fibers_.begin(), fibers_.end(), same);
      if (fiber.state == State::kDone) {
        std::fprintf(stderr, "  %td threads have returned\n", counted);
      } else {
        std::fprintf(stderr, "  %td threads wait at the %s in %s:%d\n", counted,
                     fiber.state == State::kAtBarrier ? "barrier" : "shuffle", fiber.site.file,
                     fiber.site.line);
      }
    }
    std::abort();
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<int> warps_, lanes_;
  std::mt19937 generator_{12345};
  size_t shared_bytes_;
  std::map<const void*, std::unique_ptr<unsigned char[]>> shared_;
  int64_t index_ = 0;
  int running_ = 0;
  ucontext_t scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

}  // namespace fastpo::sim
