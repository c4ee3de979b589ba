// The port vocabulary (see port.h) on the CPU: kernels run with their barriers, shuffles and shared
// memory, one block after the other. What it cannot show: memory ordering, occupancy, speed.
#pragma once

#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "port/sim_block.h"
#include "port/sim_float.h"

#define FASTPO_KERNEL
#define FASTPO_DEVICE inline
#define FASTPO_SHARED(type, name, count) \
  static const char name##_key = 0;      \
  type* const name = static_cast<type*>( \
      fastpo::sim::Block::current()->shared(&name##_key, sizeof(type) * (count)))
#define FASTPO_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(fastpo::sim::Block::current()->dynamic_shared())

namespace fastpo {

// Small, so that a row of a test gives every thread work and a block is cheap to run.
constexpr int kBlockThreads = 64;
constexpr int kWarpSize = sim::Block::kWarpThreads;
constexpr int kInvalidValue = 1;          // cudaErrorInvalidValue
constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration

using sim::Site;

inline int thread_index() { return sim::Block::current()->thread(); }
inline int64_t block_index() { return sim::Block::current()->index(); }
inline void barrier(Site site = Site::here()) { sim::Block::current()->barrier(site); }

template <typename T>
T shuffle_down(T value, int delta, Site site = Site::here()) {
  return sim::Block::current()->shuffle(value, thread_index() % kWarpSize + delta, site);
}
template <typename T>
T shuffle_xor(T value, int mask, Site site = Site::here()) {
  return sim::Block::current()->shuffle(value, (thread_index() % kWarpSize) ^ mask, site);
}

template <typename T>
struct alignas(16) Vec16 {
  T lane[16 / sizeof(T)];
};

inline void check_vec16(const void* address, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  std::fprintf(stderr, "fastpo sim: misaligned 16-byte access in %s:%d\n", site.file, site.line);
  std::abort();
}
template <typename T>
Vec16<T> load_vec16(const T* address, Site site = Site::here()) {
  check_vec16(address, site);
  Vec16<T> value;
  std::memcpy(&value, address, 16);
  return value;
}
template <typename T>
void store_vec16(T* address, const Vec16<T>& value, Site site = Site::here()) {
  check_vec16(address, site);
  std::memcpy(address, &value, 16);
}

// Arguments convert to the kernel's parameters: only the kernel decides the types.
template <typename T>
struct AsIs {
  using type = T;
};

template <typename... Params>
int launch(void (*kernel)(Params...), int64_t grid, int block, size_t shared_bytes, void*,
           typename AsIs<Params>::type... args) {
  if (grid < 0 || grid > INT_MAX) return kInvalidConfiguration;
  if (grid == 0) return 0;
  sim::Block threads(block, shared_bytes, [&] { kernel(args...); });
  for (int64_t i = 0; i < grid; ++i) threads.run(i);
  return 0;
}

inline const char* error_text(int code) {
  switch (code) {
    case 0:
      return "no error";
    case kInvalidValue:
      return "invalid argument";
    case kInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "unknown error";
  }
}

}  // namespace fastpo
