// The tile operations: chunk_stats, chunk_weights, chunk_grad. One thread takes whole rows; a row
// is swept twice, the second time out of cache.
#include <algorithm>

#include "cpu/columns.h"

namespace fastpo::cpu::FASTPO_ISA {
namespace {

// sweep over the tile's columns without the target's, in blocks of kSumBlock; done() ends a block.
template <typename A, typename Body, typename Done>
inline void sweep_rest(int64_t target, int64_t v, const Body& body, const Done& done) {
  const int64_t ranges[2][2] = {{0, target < 0 ? v : target}, {target < 0 ? v : target + 1, v}};
  for (const auto& range : ranges) {
    for (int64_t begin = range[0]; begin < range[1]; begin += kSumBlock) {
      sweep<A>(begin, std::min(begin + kSumBlock, range[1]), body);
      done();
    }
  }
}

// The column of the row's target inside this tile, or -1.
inline int64_t target_column(const Tile& tile, int64_t i) {
  const int64_t column = tile.targets[i] - tile.vocab_start;
  return column >= 0 && column < tile.v ? column : -1;
}

// Fold row i into its state; with kWrite, also its weights, and `partial` rescaled.
template <typename T, typename O, bool kPlain, bool kWrite>
void fold_row(const Tile& tile, const RowState& state, int64_t i, O* weights, Acc<T>* partial,
              int64_t hidden) {
  using A = Acc<T>;
  const T* row = static_cast<const T*>(tile.logits) + i * tile.row_stride;
  const Transform<T, kPlain> transform(tile);
  const int64_t target = target_column(tile, i);
  A* const values = static_cast<A*>(state.values) + i;
  const auto value = [&](StateRow r) -> A& { return values[r * state.stride]; };

  Vec<A> maxima = broadcast(-kInfinity<A>);
  sweep_rest<A>(
      target, tile.v,
      [&](int64_t column, int64_t count) {
        Vec<A> z = transform(load_columns(row, column, count), column, count);
        blank<A>(z, count, -kInfinity<A>);
        maxima = max<A>(z, maxima);
      },
      [] {});
  const A row_max = max_lane<A>(maxima), old_max = value(kMax);
  const A new_max = std::max(old_max, row_max);
  const A shift = new_max == -kInfinity<A> ? A(0) : new_max;  // -inf - -inf would be NaN
  const A rescale = std::exp(old_max - shift);

  if ((state.moments & kIsTop1) && row_max > old_max) {
    int64_t first = 0;
    while (first == target || !(transform(load_columns(row, first, 1), first, 1)[0] == row_max)) {
      ++first;
    }
    state.top[i] = int32_t(tile.vocab_start + first);
  }
  // The target goes first: in place, its column is overwritten below.
  A target_logit = 0;
  if (target >= 0) {
    target_logit = transform(load_columns(row, target, 1), target, 1)[0];
    value(kTargetLogit) = target_logit;
  }

  Vec<A> sums = {}, sums_logit = {}, sums_sq = {}, logits = {};
  double sum = 0, sum_logit = 0, sum_sq = 0, sum_logits = target_logit;
  sweep_rest<A>(
      target, tile.v,
      [&](int64_t column, int64_t count) {
        Vec<A> cap_grad;
        const Vec<A> x = load_columns(row, column, count);
        Vec<A> z = kWrite ? transform(x, column, count, &cap_grad) : transform(x, column, count);
        if (state.moments & kMeanLogits) {
          Vec<A> counted = z;
          blank<A>(counted, count, A(0));
          logits += counted;
        }
        z -= shift;
        blank<A>(z, count, -kInfinity<A>);
        const Vec<A> e = exp(z);
        sums += e;
        if (state.moments & kEntropy) sums_logit += e == 0 ? Vec<A>{} : e * z;  // 0 * -inf is NaN
        if (state.moments & kLogSumSqProbs) sums_sq += e * e;
        if constexpr (kWrite) store_columns(weights, column, count, e * cap_grad);
      },
      [&] {
        sum += sum_lanes<A>(sums);
        sums = Vec<A>{};
        if (state.moments == 0) return;
        sum_logit += sum_lanes<A>(sums_logit);
        sum_sq += sum_lanes<A>(sums_sq);
        sum_logits += sum_lanes<A>(logits);
        sums_logit = sums_sq = logits = Vec<A>{};
      });

  if (state.moments & kEntropy) {
    const A drop = rescale == 0 ? A(0) : old_max - shift;
    value(kSumExpLogit) = rescale * (value(kSumExpLogit) + drop * value(kSumExp)) + sum_logit;
  }
  if (state.moments & kLogSumSqProbs) {
    value(kSumSqExp) = rescale * rescale * value(kSumSqExp) + sum_sq;
  }
  if (state.moments & kMeanLogits) value(kSumLogits) += sum_logits;
  value(kSumExp) = rescale * value(kSumExp) + sum;
  value(kMax) = new_max;

  if constexpr (kWrite) {
    if (target >= 0) weights[target] = from_float<O>(0);
    if (partial != nullptr && rescale != 1) {
      sweep<A>(0, hidden, [&](int64_t column, int64_t count) {
        store_columns(partial, column, count, load_columns(partial, column, count) * rescale);
      });
    }
  }
}

template <typename T, typename O, bool kPlain>
void grad_row(const Tile& tile, const RowGrads& rows, int64_t i, O* out) {
  using A = Acc<T>;
  const T* row = static_cast<const T*>(tile.logits) + i * tile.row_stride;
  const Transform<T, kPlain> transform(tile);
  const int64_t target = target_column(tile, i);
  const auto at = [&](const void* values) { return static_cast<const A*>(values)[i]; };
  const auto grad = [&](const void* values) { return values == nullptr ? A(0) : at(values); };
  const A g = grad(rows.grad_logprobs), h = grad(rows.grad_entropy), k = grad(rows.grad_lse);
  const A logprob = at(rows.logprobs), lse = at(rows.lse), lse_low = at(rows.lse_low);
  const A entropy = h == 0 ? A(0) : at(rows.entropy);
  const A chain = tile.scale / tile.temperature;

  A target_grad = 0;
  if (target >= 0) {
    Vec<A> cap_grad;
    transform(load_columns(row, target, 1), target, 1, &cap_grad);
    const A p = std::exp(logprob);
    const A surprise = p == 0 ? A(0) : p * (logprob + entropy);
    target_grad =
        (-g * std::expm1(logprob) - (h == 0 ? A(0) : h * surprise) + k * p) * chain * cap_grad[0];
  }
  sweep<A>(0, tile.v, [&](int64_t column, int64_t count) {
    Vec<A> cap_grad;
    const Vec<A> z = transform(load_columns(row, column, count), column, count, &cap_grad);
    const Vec<A> log_p = (z - lse) - lse_low;
    const Vec<A> p = exp(log_p);
    Vec<A> slope = broadcast(k - g);
    if (h != 0) slope -= p == 0 ? Vec<A>{} : h * (log_p + entropy);
    store_columns(out, column, count, p * slope * cap_grad * chain);
  });
  if (target >= 0) out[target] = from_float<O>(target_grad);
}

}  // namespace

int chunk_stats(const Tile& tile, const RowState& state, int threads) {
  return with_dtype(tile.dtype, [&](auto type) {
    using T = decltype(type);
    with_plain(tile, [&](auto plain) {
#pragma omp parallel for num_threads(threads)
      for (int64_t i = 0; i < tile.n; ++i) {
        if (tile.targets[i] == tile.ignore_index) continue;
        fold_row<T, T, decltype(plain)::value, false>(tile, state, i, nullptr, nullptr, 0);
      }
    });
    return 0;
  });
}

int chunk_weights(const Tile& tile, const RowState& state, const TileOut& weights, void* partial,
                  int64_t partial_stride, int64_t hidden, int threads) {
  return with_tile_dtypes(tile.dtype, weights.dtype, [&](auto type, auto out_type) {
    using T = decltype(type);
    using O = decltype(out_type);
    with_plain(tile, [&](auto plain) {
#pragma omp parallel for num_threads(threads)
      for (int64_t i = 0; i < tile.n; ++i) {
        O* out = static_cast<O*>(weights.data) + i * weights.row_stride;
        Acc<T>* sums = static_cast<Acc<T>*>(partial);
        if (sums != nullptr) sums += i * partial_stride;
        if (tile.targets[i] == tile.ignore_index) {
          zero_row(out, tile.v);
        } else {
          fold_row<T, O, decltype(plain)::value, true>(tile, state, i, out, sums, hidden);
        }
      }
    });
    return 0;
  });
}

int chunk_grad(const Tile& tile, const RowGrads& rows, const TileOut& out, int threads) {
  return with_tile_dtypes(tile.dtype, out.dtype, [&](auto type, auto out_type) {
    using T = decltype(type);
    using O = decltype(out_type);
    with_plain(tile, [&](auto plain) {
#pragma omp parallel for num_threads(threads)
      for (int64_t i = 0; i < tile.n; ++i) {
        O* out_row = static_cast<O*>(out.data) + i * out.row_stride;
        if (tile.targets[i] == tile.ignore_index) {
          zero_row(out_row, tile.v);
        } else {
          grad_row<T, O, decltype(plain)::value>(tile, rows, i, out_row);
        }
      }
    });
    return 0;
  });
}

}  // namespace fastpo::cpu::FASTPO_ISA
