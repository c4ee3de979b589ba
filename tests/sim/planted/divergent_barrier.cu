// Sums two warps' leaders. Planted: only the first warp comes to the barrier.
// Argument: whether to plant the bug (0 or 1).
#include <cstdlib>

#include "port/port.h"

FASTPO_KERNEL void leaders_kernel(float* out, bool planted) {
  constexpr int kWarps = fastpo::kBlockThreads / fastpo::kWarpSize;
  FASTPO_SHARED(float, leaders, kWarps);
  const int i = fastpo::thread_index();
  if (i % fastpo::kWarpSize == 0) leaders[i / fastpo::kWarpSize] = 1.0f;
  if (planted && i >= fastpo::kWarpSize) return;
  fastpo::barrier();  // planted
  if (i == 0) {
    *out = 0;
    for (int warp = 0; warp < kWarps; ++warp) *out += leaders[warp];
  }
}

int main(int, char** arguments) {
  const bool planted = std::atoi(arguments[1]) != 0;
  float out = 0;
  if (fastpo::launch(leaders_kernel, 1, fastpo::kBlockThreads, 0, nullptr, &out, planted) != 0)
    return 2;
  return out == fastpo::kBlockThreads / fastpo::kWarpSize ? 0 : 1;
}
