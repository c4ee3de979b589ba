// segment_sums and its backward: sequences of token values to one sum and count each.
//
// A sequence is read once, in blocks that stay in the L1 cache; each step on a block is one plain
// loop. Sums are formed in double whatever the input type, so a float result is rounded once.
#include <algorithm>

#include "cpu/dtype.h"

namespace fastpo::cpu {
namespace {

constexpr int64_t kBlock = 512;
// Partial sums of a block: enough to hide the latency of an addition in every vector width.
constexpr int64_t kPartials = 16;
// Below this many values the start of a thread team costs more than it saves.
constexpr int64_t kParallelValues = 1 << 15;

// One sequence: where its values start in each array, and its length. Outputs of the backward are
// contiguous, so their rows start at `out`.
struct Range {
  int64_t values, reference, weights, mask, out, length;
};

Range range_of(const Segments& s, int64_t b) {
  if (s.offsets != nullptr) {
    const int64_t start = s.offsets[b];
    return {start, start, start, start, start, std::max<int64_t>(s.offsets[b + 1] - start, 0)};
  }
  return {b * s.values_stride,
          b * s.reference_stride,
          b * s.weights_stride,
          b * s.mask_stride,
          b * s.T,
          s.T};
}

int64_t total_values(const Segments& s) {
  return s.offsets == nullptr ? s.B * s.T : s.B > 0 ? s.offsets[s.B] - s.offsets[0] : 0;
}

// values - reference of positions begin .. begin + count of a sequence.
template <typename T, typename A>
void load_difference(const Segments& s, const Range& range, int64_t begin, int64_t count, A* out) {
  const T* values = static_cast<const T*>(s.values) + range.values + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]);
  if (s.reference == nullptr) return;
  const T* reference = static_cast<const T*>(s.reference) + range.reference + begin;
  for (int64_t i = 0; i < count; ++i) out[i] -= to_float(reference[i]);
}

// A select, not a product: NaN and infinity outside the mask vanish.
template <typename A>
void clear_unmasked(const uint8_t* mask, int64_t count, A* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = mask[i] ? values[i] : A(0);
}

// Sum of the first `count` values of a block; its rest is zeros.
double sum_block(const double (&block)[kBlock], int64_t count) {
  double partials[kPartials] = {};
  for (int64_t i = 0; i < count; i += kPartials) {
    for (int64_t k = 0; k < kPartials; ++k) partials[k] += block[i + k];
  }
  for (int64_t width = kPartials / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) partials[k] += partials[k + width];
  }
  return partials[0];
}

template <typename T>
void sum_sequence(const Segments& s, int64_t b, Acc<T>* sum, int64_t* active) {
  const Range range = range_of(s, b);
  double total = 0, block[kBlock];
  int64_t positions = 0;
  for (int64_t begin = 0; begin < range.length; begin += kBlock) {
    const int64_t count = std::min(kBlock, range.length - begin);
    std::fill(block + count, block + kBlock, 0.0);
    load_difference<T>(s, range, begin, count, block);
    if (s.weights != nullptr) {
      const Acc<T>* weights = static_cast<const Acc<T>*>(s.weights) + range.weights + begin;
      for (int64_t i = 0; i < count; ++i) block[i] *= weights[i];
    }
    if (s.mask == nullptr) {
      positions += count;
    } else {
      const uint8_t* mask = s.mask + range.mask + begin;
      clear_unmasked(mask, count, block);
      int32_t active_here = 0;  // 32 bits: twice the lanes of a 64-bit count
      for (int64_t i = 0; i < count; ++i) active_here += mask[i] != 0;
      positions += active_here;
    }
    total += sum_block(block, count);
  }
  *sum = static_cast<Acc<T>>(total);
  *active = positions;
}

template <typename T>
void sequence_grads(const Segments& s, int64_t b, Acc<T> grad, T* grad_values, T* grad_reference,
                    Acc<T>* grad_weights) {
  using A = Acc<T>;
  const Range range = range_of(s, b);
  A block[kBlock];
  for (int64_t begin = 0; begin < range.length; begin += kBlock) {
    const int64_t count = std::min(kBlock, range.length - begin);
    const int64_t out = range.out + begin;
    const uint8_t* mask = s.mask == nullptr ? nullptr : s.mask + range.mask + begin;
    if (grad_values != nullptr || grad_reference != nullptr) {
      if (s.weights == nullptr) {
        std::fill(block, block + count, grad);
      } else {
        const A* weights = static_cast<const A*>(s.weights) + range.weights + begin;
        for (int64_t i = 0; i < count; ++i) block[i] = weights[i] * grad;
      }
      if (mask != nullptr) clear_unmasked(mask, count, block);
    }
    if (grad_values != nullptr) {
      for (int64_t i = 0; i < count; ++i) grad_values[out + i] = from_float<T>(block[i]);
    }
    if (grad_reference != nullptr) {
      // 0 - x, not -x: a masked position gets 0, not -0.
      for (int64_t i = 0; i < count; ++i) grad_reference[out + i] = from_float<T>(A(0) - block[i]);
    }
    if (grad_weights != nullptr) {
      load_difference<T>(s, range, begin, count, block);
      for (int64_t i = 0; i < count; ++i) block[i] *= grad;
      if (mask != nullptr) clear_unmasked(mask, count, block);
      std::copy(block, block + count, grad_weights + out);
    }
  }
}

}  // namespace

int segment_sums(const Segments& segments, void* sums, int64_t* counts, void*, int threads) {
  return with_dtype(segments.dtype, [&](auto type) {
    using T = decltype(type);
    Acc<T>* const sums_B = static_cast<Acc<T>*>(sums);
    // Lengths differ, so sequences are handed out one by one; the order cannot change a sum.
#pragma omp parallel for num_threads(threads) \
    schedule(dynamic) if (total_values(segments) >= kParallelValues)
    for (int64_t b = 0; b < segments.B; ++b) {
      sum_sequence<T>(segments, b, sums_B + b, counts + b);
    }
    return 0;
  });
}

int segment_sums_backward(const Segments& segments, const void* grad_sums, void* grad_values,
                          void* grad_reference, void* grad_weights, void*, int threads) {
  return with_dtype(segments.dtype, [&](auto type) {
    using T = decltype(type);
    const Acc<T>* const grad_sums_B = static_cast<const Acc<T>*>(grad_sums);
#pragma omp parallel for num_threads(threads) \
    schedule(dynamic) if (total_values(segments) >= kParallelValues)
    for (int64_t b = 0; b < segments.B; ++b) {
      sequence_grads<T>(segments, b, grad_sums_B[b], static_cast<T*>(grad_values),
                        static_cast<T*>(grad_reference), static_cast<Acc<T>*>(grad_weights));
    }
    return 0;
  });
}

}  // namespace fastpo::cpu
