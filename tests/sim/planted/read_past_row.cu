// Every thread's share of a row's sum. Planted: the bound lets one element too many in.
// Argument: whether to plant the bug (0 or 1).
#include <cstdlib>
#include <numeric>
#include <vector>

#include "port/port.h"

FASTPO_KERNEL void shares_kernel(const float* row, float* shares, int64_t bound) {
  float share = 0;
  for (int64_t i = fastpo::thread_index(); i < bound; i += fastpo::kBlockThreads) {
    share += row[i];  // planted
  }
  shares[fastpo::thread_index()] = share;
}

int main(int, char** arguments) {
  const std::vector<float> row(100, 1.5f);
  std::vector<float> shares(fastpo::kBlockThreads);
  if (fastpo::launch(shares_kernel, 1, fastpo::kBlockThreads, 0, nullptr, row.data(), shares.data(),
                     row.size() + std::atoi(arguments[1])) != 0) {
    return 2;
  }
  return std::accumulate(shares.begin(), shares.end(), 0.0f) == 150.0f ? 0 : 1;
}
