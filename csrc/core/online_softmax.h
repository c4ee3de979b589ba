// The running statistics of one row without its target (RowState in fastpo.h): per thread while a
// block sweeps a tile, then merged, then folded into memory. kMoments: all optional statistics are
// carried along, and those that RowState::moments asks for are written.
//
// -inf needs no special case downstream because of two rules: sums are never rescaled from a
// maximum of -inf (nothing is in them), and exponents are taken against 0 while the maximum is
// -inf.
#pragma once

#include <climits>

#include "core/reduce.h"
#include "core/transform.h"

namespace fastpo {

template <typename Acc, bool kIndexed>
struct RunningMax {
  Acc value;
  int32_t at;  // the first column with this value

  static FASTPO_DEVICE RunningMax identity() { return {-kInfinity<Acc>, INT32_MAX}; }

  // What exponents are taken against.
  FASTPO_DEVICE Acc base() const { return value == -kInfinity<Acc> ? 0 : value; }

  // NaN is left to the sums.
  FASTPO_DEVICE void merge(const RunningMax& other) {
    if constexpr (kIndexed) {
      if (other.value > value || (other.value == value && other.at < at)) *this = other;
    } else {
      value = std::fmax(value, other.value);
    }
  }

  FASTPO_DEVICE RunningMax shuffled_down(int delta, Site site) const {
    RunningMax other{shuffle_down(value, delta, site), INT32_MAX};
    if constexpr (kIndexed) other.at = shuffle_down(at, delta, site);
    return other;
  }

  template <typename C>
  FASTPO_DEVICE void add(Lanes<Acc, C>& z, C columns, int64_t vocab_start) {
    RunningMax seen = identity();
    z.for_each(columns, [&](Acc x, int64_t) { seen.value = std::fmax(seen.value, x); });
    if constexpr (kIndexed) {
      if (seen.value < value || seen.value == -kInfinity<Acc>) return;
      z.for_each(columns, [&](Acc x, int64_t column) {
        if (x != seen.value || seen.at != INT32_MAX) return;
        seen.at = static_cast<int32_t>(vocab_start + column);
      });
    }
    merge(seen);
  }
};

// Sums of exponentials against one base.
template <typename Acc, bool kMoments>
struct ExpSums {
  Acc sum, sum_logit, sum_sq;  // kSumExp, kSumExpLogit, kSumSqExp
  Acc logits;                  // kSumLogits

  static FASTPO_DEVICE ExpSums identity() { return {0, 0, 0, 0}; }

  // Changes the base from `from` to the larger `to`.
  FASTPO_DEVICE void rebase(Acc from, Acc to) {
    if (from == to || from == -kInfinity<Acc>) return;
    const Acc ratio = std::exp(from - to);
    if constexpr (kMoments) {
      sum_logit = ratio * (sum_logit + (from - to) * sum);
      sum_sq *= ratio * ratio;
    }
    sum *= ratio;
  }

  FASTPO_DEVICE void merge(const ExpSums& other) {
    sum += other.sum;
    if constexpr (kMoments) {
      sum_logit += other.sum_logit;
      sum_sq += other.sum_sq;
      logits += other.logits;
    }
  }

  FASTPO_DEVICE ExpSums shuffled_down(int delta, Site site) const {
    ExpSums other = identity();
    other.sum = shuffle_down(sum, delta, site);
    if constexpr (kMoments) {
      other.sum_logit = shuffle_down(sum_logit, delta, site);
      other.sum_sq = shuffle_down(sum_sq, delta, site);
      other.logits = shuffle_down(logits, delta, site);
    }
    return other;
  }

  // Takes the target's logit, too.
  template <typename C>
  FASTPO_DEVICE void add_logits(Lanes<Acc, C>& z, C columns) {
    if constexpr (kMoments) z.for_each(columns, [&](Acc x, int64_t) { logits += x; });
  }

  // z becomes exp(z - base). The target is -inf by now, which adds nothing.
  template <typename C>
  FASTPO_DEVICE void add(Lanes<Acc, C>& z, C columns, Acc base) {
    z.for_each(columns, [&](Acc& x, int64_t) {
      const Acc above = x - base;
      x = std::exp(above);
      sum += x;
      if constexpr (kMoments) {
        sum_logit += x == 0 ? 0 : x * above;  // 0 * -inf would be NaN
        sum_sq += x * x;
      }
    });
  }
};

template <typename Acc, bool kMoments>
struct OnlineSoftmax {
  RunningMax<Acc, kMoments> max;
  ExpSums<Acc, kMoments> sums;

  static FASTPO_DEVICE OnlineSoftmax identity() {
    return {RunningMax<Acc, kMoments>::identity(), ExpSums<Acc, kMoments>::identity()};
  }

  FASTPO_DEVICE void merge(OnlineSoftmax other) {
    const Acc old = max.value;
    max.merge(other.max);
    sums.rebase(old, max.value);
    other.sums.rebase(other.max.value, max.value);
    sums.merge(other.sums);
  }

  FASTPO_DEVICE OnlineSoftmax shuffled_down(int delta, Site site) const {
    return {max.shuffled_down(delta, site), sums.shuffled_down(delta, site)};
  }

  template <typename C>
  FASTPO_DEVICE void add(Lanes<Acc, C>& z, C columns, int64_t vocab_start) {
    const Acc old = max.value;
    max.add(z, columns, vocab_start);
    sums.rebase(old, max.value);
    sums.add(z, columns, max.base());
  }
};

// One row of the state in memory.
template <typename Acc>
struct StateOfRow {
  const RowState& state;
  int64_t row;

  FASTPO_DEVICE Acc& operator[](StateRow r) const {
    return static_cast<Acc*>(state.values)[r * state.stride + row];
  }

  // Folds the statistics of a tile in. One thread calls it.
  template <bool kMoments>
  FASTPO_DEVICE void fold(OnlineSoftmax<Acc, kMoments> tile) const {
    OnlineSoftmax<Acc, kMoments> total = OnlineSoftmax<Acc, kMoments>::identity();
    const StateOfRow& at = *this;
    total.max.value = at[kMax];
    total.sums.sum = at[kSumExp];
    if constexpr (kMoments) {
      if (state.moments & kIsTop1) total.max.at = state.top[row];
      if (state.moments & kEntropy) total.sums.sum_logit = at[kSumExpLogit];
      if (state.moments & kLogSumSqProbs) total.sums.sum_sq = at[kSumSqExp];
      if (state.moments & kMeanLogits) total.sums.logits = at[kSumLogits];
    }
    total.merge(tile);
    at[kMax] = total.max.value;
    at[kSumExp] = total.sums.sum;
    if constexpr (kMoments) {
      if (state.moments & kIsTop1) state.top[row] = total.max.at;
      if (state.moments & kEntropy) at[kSumExpLogit] = total.sums.sum_logit;
      if (state.moments & kLogSumSqProbs) at[kSumSqExp] = total.sums.sum_sq;
      if (state.moments & kMeanLogits) at[kSumLogits] = total.sums.logits;
    }
  }
};

// Of a finished row: log(p / (1 - p)) of its target. Differences first: an offset that all logits
// share costs no digits. An infinite logit has no probability: NaN, as exp(inf - inf) would give.
template <typename Acc>
FASTPO_DEVICE Acc target_margin(const StateOfRow<Acc>& at) {
  if (at[kTargetLogit] == kInfinity<Acc>) return kNaN<Acc>;
  return at[kTargetLogit] - at[kMax] - std::log(at[kSumExp]);
}

// log(1 + e^x)
template <typename Acc>
FASTPO_DEVICE Acc softplus(Acc x) {
  return std::fmax(x, Acc(0)) + std::log1p(std::exp(-std::fabs(x)));
}

}  // namespace fastpo
