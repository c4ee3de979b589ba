// A pair of tiles as the divergence kernels take it: its sides in the order of the form, what turns
// their logits into log-probabilities, and the switch to the kernel for a pair.
#pragma once

#include "core/divergence.h"
#include "core/transform.h"

namespace fastpo {

template <typename Acc>
struct ScalarMath {
  using Scalar = Acc;
  using Value = Acc;
  static FASTPO_DEVICE Acc exp(Acc x) { return std::exp(x); }
  static FASTPO_DEVICE Acc log1p(Acc x) { return std::log1p(x); }
  static FASTPO_DEVICE Acc abs(Acc x) { return std::fabs(x); }
};

// The logits of this block's row.
template <typename T>
FASTPO_DEVICE const T* row_of(const Tile& tile) {
  return static_cast<const T*>(tile.logits) + block_index() * tile.row_stride;
}

template <typename Acc, bool kPlain_>
struct PairOfTiles {
  static constexpr bool kPlain = kPlain_;

  Side<Acc> p, q;
  Transform<Acc, kPlain> p_transform, q_transform;

  PairOfTiles(const TilePair& pair, bool swapped) : PairOfTiles(Sides<Acc>(pair, swapped)) {}

 private:
  explicit PairOfTiles(const Sides<Acc>& sides)
      : p(sides.p), q(sides.q), p_transform(sides.p.tile), q_transform(sides.q.tile) {}
};

// For sweep_columns over both tiles: half of what one tile takes, so as many loads in flight.
template <bool kPlain, typename... T>
constexpr int kPairPacks = kPlain && kVecItems<T...> <= 4 ? 2 : 1;

// body(PairOfTiles, form, swapped) for what the pair asks.
template <typename TIn, typename Body>
int with_pair(const TilePair& pair, const Body& body) {
  using Acc = acc_t<TIn>;
  return with_form<ScalarMath<Acc>>(
      pair.kind, pair.alpha, kInvalidValue, [&](auto form, bool swapped) {
        return with_variant<TIn>(fuller_tile(pair), true, [&](auto plain, auto) {
          return body(PairOfTiles<Acc, decltype(plain)::value>(pair, swapped), form, swapped);
        });
      });
}

}  // namespace fastpo
