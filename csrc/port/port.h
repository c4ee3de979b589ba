// The one place that looks at the compiler. Kernels use the vocabulary below and nothing else of
// CUDA; cuda.h gives it to nvcc, sim.h runs it on the CPU.
//
//   FASTPO_KERNEL, FASTPO_DEVICE           function markers
//   FASTPO_SHARED(type, name, count)       static shared memory; elements start undefined
//   FASTPO_DYNAMIC_SHARED(type, name)      the shared_bytes of launch()
//   kBlockThreads, kWarpSize               block size of every kernel of this library, warp size
//   thread_index(), block_index()          position in the block, position of the block
//   barrier()                              all threads of the block
//   shuffle_down(x, delta), shuffle_xor    all lanes of the warp
//   Vec16<T>, load_vec16, store_vec16      16 aligned bytes
//   bfloat16, float16, to_float, from_float<T>
//   launch(kernel, grid, block, shared_bytes, stream, args...)    returns an error code, 0 is good
//   error_text(code), kInvalidValue
//
// Functions that synchronise or can fault take a Site, the caller's file and line. It is empty on
// CUDA; the simulator names it when something goes wrong. Helpers that wrap them pass theirs on.
#pragma once

#ifdef FASTPO_SIM
#include "port/sim.h"
#else
#include "port/cuda.h"
#endif
