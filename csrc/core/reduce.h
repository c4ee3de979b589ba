// Reductions over a warp and a block. A reducible value R is trivially copyable and has
//   static R identity();                merge with it changes nothing
//   void merge(const R& other);
//   R shuffled_down(int delta, Site);   each member through shuffle_down
// The order of merges depends on the block size alone.
#pragma once

#include "port/port.h"

namespace fastpo {

// The merged value of a warp, in lane 0.
template <typename R>
FASTPO_DEVICE R warp_merge(R value, Site site = Site::here()) {
#pragma unroll 1
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) {
    value.merge(value.shuffled_down(delta, site));
  }
  return value;
}

// The merged value of a block, in every thread. Ends with a barrier, so it may be called again.
template <typename R>
FASTPO_DEVICE R block_merge(R value, Site site = Site::here()) {
  constexpr int kWarps = kBlockThreads / kWarpSize;
  FASTPO_SHARED(R, warps, kWarps);
  const int lane = thread_index() % kWarpSize;
  const int warp = thread_index() / kWarpSize;

  value = warp_merge(value, site);
  if (lane == 0) warps[warp] = value;
  barrier(site);
  if (warp == 0) {
    value = warp_merge(lane < kWarps ? warps[lane] : R::identity(), site);
    if (lane == 0) warps[0] = value;
  }
  barrier(site);
  value = warps[0];
  barrier(site);
  return value;
}

}  // namespace fastpo
