// segment_sums and its backward: per-sequence weighted sums of token values. One block per
// sequence, one pass over its positions: sizeof(T) bytes per position for values and for reference,
// sizeof(acc) for weights, 1 for the mask; the backward writes as much as it is asked for. The
// order of additions follows from the position in the sequence alone, so accesses are not widened
// by alignment.
#include "core/dtype.h"
#include "core/reduce.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

// The sequence of this block, position by position.
template <typename T>
struct Sequence {
  using Acc = acc_t<T>;
  const T* values;
  const T* reference;
  const Acc* weights;
  const uint8_t* mask;
  int64_t length;
  int64_t packed_begin;  // where it starts in a packed output

  FASTPO_DEVICE Sequence(const Segments& s, int64_t b)
      : length(s.offsets == nullptr ? s.T : s.offsets[b + 1] - s.offsets[b]),
        packed_begin(s.offsets == nullptr ? b * s.T : s.offsets[b]) {
    const bool packed = s.offsets != nullptr;
    values = start(static_cast<const T*>(s.values), packed, b * s.values_stride);
    reference = start(static_cast<const T*>(s.reference), packed, b * s.reference_stride);
    weights = start(static_cast<const Acc*>(s.weights), packed, b * s.weights_stride);
    mask = start(s.mask, packed, b * s.mask_stride);
  }

  FASTPO_DEVICE bool active(int64_t t) const { return mask == nullptr || mask[t] != 0; }
  FASTPO_DEVICE Acc weight(int64_t t) const { return weights == nullptr ? 1 : weights[t]; }
  FASTPO_DEVICE Acc difference(int64_t t) const {
    const Acc value = to_acc(values[t]);
    return reference == nullptr ? value : value - to_acc(reference[t]);
  }

 private:
  template <typename P>
  FASTPO_DEVICE const P* start(const P* data, bool packed, int64_t row_offset) const {
    return data == nullptr ? nullptr : data + (packed ? packed_begin : row_offset);
  }
};

template <typename Acc>
struct SumAndCount {
  Acc sum;
  int64_t count;

  static FASTPO_DEVICE SumAndCount identity() { return {0, 0}; }
  FASTPO_DEVICE void merge(const SumAndCount& other) {
    sum += other.sum;
    count += other.count;
  }
  FASTPO_DEVICE SumAndCount shuffled_down(int delta, Site site) const {
    return {shuffle_down(sum, delta, site), shuffle_down(count, delta, site)};
  }
};

template <typename T>
FASTPO_KERNEL void segment_sums_kernel(Segments segments, acc_t<T>* sums, int64_t* counts) {
  const int64_t b = block_index();
  const Sequence<T> sequence(segments, b);
  auto total = SumAndCount<acc_t<T>>::identity();
  for (int64_t t = thread_index(); t < sequence.length; t += kBlockThreads) {
    if (!sequence.active(t)) continue;
    total.merge({sequence.weight(t) * sequence.difference(t), 1});
  }
  total = block_merge(total);
  if (thread_index() == 0) {
    sums[b] = total.sum;
    counts[b] = total.count;
  }
}

template <typename T>
FASTPO_KERNEL void segment_sums_backward_kernel(Segments segments, const acc_t<T>* grad_sums,
                                                T* grad_values, T* grad_reference,
                                                acc_t<T>* grad_weights) {
  using Acc = acc_t<T>;
  const int64_t b = block_index();
  const Sequence<T> sequence(segments, b);
  const Acc g = grad_sums[b];
  for (int64_t t = thread_index(); t < sequence.length; t += kBlockThreads) {
    const bool active = sequence.active(t);
    const int64_t index = sequence.packed_begin + t;
    const Acc grad = active ? sequence.weight(t) * g : 0;
    if (grad_values != nullptr) grad_values[index] = from_acc<T>(grad);
    if (grad_reference != nullptr) grad_reference[index] = from_acc<T>(active ? -grad : 0);
    if (grad_weights != nullptr) grad_weights[index] = active ? sequence.difference(t) * g : 0;
  }
}

}  // namespace

int segment_sums(const Segments& segments, void* sums, int64_t* counts, void* stream, int) {
  return with_dtype(segments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(segment_sums_kernel<T>, segments.B, kBlockThreads, 0, stream, segments,
                  static_cast<acc_t<T>*>(sums), counts);
  });
}

int segment_sums_backward(const Segments& segments, const void* grad_sums, void* grad_values,
                          void* grad_reference, void* grad_weights, void* stream, int) {
  return with_dtype(segments.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(segment_sums_backward_kernel<T>, segments.B, kBlockThreads, 0, stream, segments,
                  static_cast<const acc_t<T>*>(grad_sums), static_cast<T*>(grad_values),
                  static_cast<T*>(grad_reference), static_cast<acc_t<T>*>(grad_weights));
  });
}

}  // namespace fastpo::FASTPO_BACKEND
