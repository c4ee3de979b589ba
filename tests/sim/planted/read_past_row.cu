// Doubles a row. Planted: the last thread's bound lets one element too many in.
#include <vector>

#include "port/port.h"

#ifdef PLANTED
constexpr int kExtra = 1;
#else
constexpr int kExtra = 0;
#endif

FASTPO_KERNEL void double_kernel(const float* in, float* out, int64_t v) {
  for (int64_t i = fastpo::thread_index(); i < v + kExtra; i += fastpo::kBlockThreads) {
    const float x = in[i];  // planted
    if (i < v) out[i] = 2 * x;
  }
}

int main() {
  std::vector<float> in(100, 1.5f), out(100);
  if (fastpo::launch(double_kernel, 1, fastpo::kBlockThreads, 0, nullptr, in.data(), out.data(),
                     static_cast<int64_t>(in.size())) != 0) {
    return 2;
  }
  for (float x : out) {
    if (x != 3.0f) return 1;
  }
  return 0;
}
