// Reverses a row through shared memory. Planted: threads read what others may not have written yet.
// Arguments: whether to plant the bug (0 or 1), the thread order.
#include <cstdlib>

#include "port/port.h"

FASTPO_KERNEL void reverse_kernel(const float* in, float* out, bool planted) {
  FASTPO_SHARED(float, row, fastpo::kBlockThreads);
  const int i = fastpo::thread_index();
  row[i] = in[i];
  if (!planted) fastpo::barrier();
  // Warps do not wait for each other in a shuffle, so it is no replacement for the barrier.
  const float left = fastpo::shuffle_xor(row[fastpo::kBlockThreads - 1 - i], 1);
  out[i ^ 1] = left;
}

int main(int, char** arguments) {
  fastpo::sim::set_thread_order(std::atoi(arguments[2]));
  const bool planted = std::atoi(arguments[1]) != 0;
  constexpr int n = fastpo::kBlockThreads;
  float in[n], out[n];
  for (int i = 0; i < n; ++i) in[i] = static_cast<float>(i);
  if (fastpo::launch(reverse_kernel, 1, n, 0, nullptr, in, out, planted) != 0) return 2;
  for (int i = 0; i < n; ++i) {
    if (out[i] != static_cast<float>(n - 1 - i)) return 1;
  }
  return 0;
}
