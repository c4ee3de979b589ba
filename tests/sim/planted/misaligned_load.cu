// Copies a row by 16-byte accesses. Planted: the row starts in the middle of 16 bytes.
// Argument: whether to plant the bug (0 or 1).
#include <cstdlib>

#include "port/port.h"

FASTPO_KERNEL void copy_kernel(const float* in, float* out) {
  const int64_t i = 4 * static_cast<int64_t>(fastpo::thread_index());
  const fastpo::Vec16<float> x = fastpo::load_vec16(in + i);  // planted
  fastpo::store_vec16(out + i, x);
}

int main(int, char** arguments) {
  const int offset = std::atoi(arguments[1]) != 0 ? 1 : 4;
  constexpr int n = 4 * fastpo::kBlockThreads;
  alignas(16) float in[n + 4], out[n];
  for (int i = 0; i < n + 4; ++i) in[i] = static_cast<float>(i);
  if (fastpo::launch(copy_kernel, 1, fastpo::kBlockThreads, 0, nullptr, in + offset, out) != 0) {
    return 2;
  }
  for (int i = 0; i < n; ++i) {
    if (out[i] != in[i + offset]) return 1;
  }
  return 0;
}
