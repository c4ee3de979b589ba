// Raw logits of one row of a tile -> what the softmax sees, and where the row's target is.
#pragma once

#include <cmath>
#include <limits>

#include "core/columns.h"
#include "core/dtype.h"
#include "fastpo.h"

namespace fastpo {

template <typename Acc>
constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
template <typename Acc>
constexpr Acc kNaN = std::numeric_limits<Acc>::quiet_NaN();

// 1 - tanh^2, the derivative of the soft-cap, of a tanh. In factors: 1 - t is exact near t = 1.
template <typename Acc>
FASTPO_DEVICE Acc cap_slope(Acc tanh) {
  return (1 - tanh) * (1 + tanh);
}

// x / divisor, correctly rounded but for the rarest cases, without the branches of a real division.
template <typename Acc>
FASTPO_DEVICE Acc divide(Acc x, Acc divisor, Acc reciprocal) {
  const Acc quotient = x * reciprocal;
  const Acc corrected = std::fma(std::fma(-quotient, divisor, x), reciprocal, quotient);
  return std::fabs(quotient) < kInfinity<Acc> ? corrected : quotient;  // inf - inf is NaN
}

// z of a raw logit. kPlain: neither bias nor soft-cap. Factors are applied one by one, as the
// formula has them: a product of two would be rounded, and every z of the row be off by the same
// share.
template <typename Acc, bool kPlain>
struct Transform {
  // For sweep_columns: bound by arithmetic, not by loads in flight, where it is less than four.
  static constexpr int kMaxPacks = kPlain && std::is_same_v<Acc, float> ? 4 : 1;

  const Acc* bias;
  Acc scale, softcap, temperature, inverse_temperature;
  Acc chain;  // dz / dlogit without soft-cap

  explicit Transform(const Tile& tile)
      : bias(static_cast<const Acc*>(tile.bias)),
        scale(static_cast<Acc>(tile.scale)),
        softcap(static_cast<Acc>(tile.softcap)),
        temperature(static_cast<Acc>(tile.temperature)),
        inverse_temperature(static_cast<Acc>(1 / tile.temperature)),
        chain(static_cast<Acc>(tile.scale / tile.temperature)) {}

  // x becomes z; returns cap'.
  FASTPO_DEVICE Acc apply(Acc& x, int64_t column) const {
    Acc slope = 1;
    if constexpr (!kPlain) {
      if (bias != nullptr) x += bias[column];
    }
    x *= scale;
    if constexpr (!kPlain) {
      if (softcap != 0) {
        const Acc t = std::tanh(x / softcap);
        x = softcap * t;
        slope = cap_slope(t);
      }
    }
    x = divide(x, temperature, inverse_temperature);
    return slope;
  }

  template <typename C>
  FASTPO_DEVICE Lanes<Acc, C> apply(Lanes<Acc, C>& lanes, C columns) const {
    Lanes<Acc, C> slopes;
#pragma unroll
    for (int pack = 0; pack < C::kPacks; ++pack) {
#pragma unroll
      for (int item = 0; item < C::kItems; ++item) {
        slopes.x[pack][item] = apply(lanes.x[pack][item], columns.at(pack) + item);
      }
    }
    return slopes;
  }
};

// f(plain, moments) with the flags a kernel is compiled for: the common cases lean, the rest in
// one.
template <typename TIn, typename F>
int with_variant(const Tile& tile, bool moments, F f) {
  if constexpr (std::is_same_v<acc_t<TIn>, float>) {
    if (tile.bias == nullptr && tile.softcap == 0) {
      return moments ? f(std::true_type{}, std::true_type{})
                     : f(std::true_type{}, std::false_type{});
    }
  }
  return f(std::false_type{}, std::true_type{});
}

// The column of the row's target in this tile, or -1. Wrapping arithmetic: a target may be
// anything.
FASTPO_DEVICE int64_t target_column(const Tile& tile, int64_t target) {
  const uint64_t column = static_cast<uint64_t>(target) - static_cast<uint64_t>(tile.vocab_start);
  return column < static_cast<uint64_t>(tile.v) ? static_cast<int64_t>(column) : -1;
}

// If the target is among these columns: replace(lane reference), in the one thread that has it.
template <typename Acc, typename C, typename Replace>
FASTPO_DEVICE void at_target(Lanes<Acc, C>& lanes, C columns, int64_t target, Replace replace) {
#pragma unroll
  for (int pack = 0; pack < C::kPacks; ++pack) {
    const int64_t lane = target - columns.at(pack);
    if (lane < 0 || lane >= C::kItems) continue;
#pragma unroll
    for (int item = 0; item < C::kItems; ++item) {
      if (item == lane) replace(lanes.x[pack][item]);
    }
  }
}

}  // namespace fastpo
