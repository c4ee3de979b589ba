// The divergences of fastpo.h lane by lane, for a scalar on the GPU and a vector on the CPU alike.
//
// All kinds are three forms of a distribution p from a distribution q, p being the policy, or the
// reference where `swapped`: exchanging the two turns the divergence of f into that of r f(1 / r).
//   Kl      f = r - 1 - log r                        forward_kl; swapped: reverse_kl
//   Js      the mixture of both, never swapped       js
//   Power   the f of alpha with a <= 1/2             alpha; swapped: alpha > 1/2 by 1 - alpha, and
//                                                    chi2, which is twice alpha = 2
//
// Where |log r| < 1 terms are written with e^x - 1 - x, elsewhere directly: neither cancels, and no
// term comes out negative.
#pragma once

#include <utility>

#include "fastpo.h"
// The CPU backend has no port: it says itself what FASTPO_DEVICE is.
#ifndef FASTPO_DEVICE
#include "port/port.h"
#endif

namespace fastpo {

// In what follows Math names a type Value, its Scalar (Value itself, or the element of a vector),
// and its functions exp, log1p (of arguments above -1 and up to 0) and abs. `condition ? a : b`
// picks lane by lane.

// e^x - 1 - x for |x| <= 1, to the last digits however small x is: its Taylor series.
template <typename Math>
FASTPO_DEVICE typename Math::Value excess(typename Math::Value x) {
  using Scalar = typename Math::Scalar;
  constexpr Scalar kInverseFactorials[] = {
      Scalar(1.0 / 2),
      Scalar(1.0 / 6),
      Scalar(1.0 / 24),
      Scalar(1.0 / 120),
      Scalar(1.0 / 720),
      Scalar(1.0 / 5040),
      Scalar(1.0 / 40320),
      Scalar(1.0 / 362880),
      Scalar(1.0 / 3628800),
      Scalar(1.0 / 39916800),  // the last one that a float has a use for
      Scalar(1.0 / 479001600),
      Scalar(1.0 / 6227020800),
      Scalar(1.0 / 87178291200),
      Scalar(1.0 / 1307674368000),
      Scalar(1.0 / 20922789888000),
      Scalar(1.0 / 355687428096000),
      Scalar(1.0 / 6402373705728000),
  };
  constexpr int kLast = sizeof(Scalar) == sizeof(double) ? 16 : 9;
  typename Math::Value sum = x * kInverseFactorials[kLast] + kInverseFactorials[kLast - 1];
#pragma unroll
  for (int k = kLast - 2; k >= 0; --k) sum = sum * x + kInverseFactorials[k];
  return x * x * sum;
}

// weight * x with 0 * inf = 0.
template <typename Value>
FASTPO_DEVICE Value times(Value weight, Value x) {
  return weight == 0 ? Value{} : weight * x;
}

// weight * (e^x - 1), given grown = weight * e^x.
template <typename Math, typename Value>
FASTPO_DEVICE Value growth(Value weight, Value x, Value grown) {
  return Math::abs(x) < 1 ? weight * (x + excess<Math>(x)) : grown - weight;
}

// weight * (e^x - 1 - x), given grown = weight * e^x.
template <typename Math, typename Value>
FASTPO_DEVICE Value weighted_excess(Value weight, Value x, Value grown) {
  return Math::abs(x) < 1 ? weight * excess<Math>(x) : grown - weight - times(weight, x);
}

// The normaliser of a row: log p = (z - max) - log_sum, so an offset that all its logits share
// costs no digits.
template <typename Acc>
struct LogSoftmax {
  Acc max, log_sum;
};

template <typename Math>
struct LogProbs {
  using Value = typename Math::Value;
  using Row = LogSoftmax<typename Math::Scalar>;
  Value log_q, p, q;
  Value t;  // log r, finite where neither has any probability

  FASTPO_DEVICE LogProbs(Value p_z, Value q_z, const Row& of_p, const Row& of_q) {
    const Value p_below = p_z - of_p.max, q_below = q_z - of_q.max;
    log_q = q_below - of_q.log_sum;
    p = Math::exp(p_below - of_p.log_sum);
    q = Math::exp(log_q);
    // Not log p - log q: where the logits differ little, their difference is exact.
    t = (p_below == q_below ? Value{} : p_below - q_below) - (of_p.log_sum - of_q.log_sum);
  }
};

// What a form makes of them.
template <typename Value>
struct Parts {
  Value value;  // q f(r)
  Value of_p;   // p f'(r)
  Value of_q;   // q (f(r) - r f'(r))
};

template <typename Math>
struct Kl {
  using Value = typename Math::Value;

  FASTPO_DEVICE Parts<Value> operator()(const LogProbs<Math>& at) const {
    return {weighted_excess<Math>(at.q, at.t, at.p), growth<Math>(at.q, at.t, at.p),
            -times(at.q, at.t)};
  }
};

// As w p (e^-u - 1 + u) with u = log(p / m), and the same of q: what is added to w p u is as much
// as is taken from (1 - w) q log(q / m).
template <typename Math>
struct Js {
  using Value = typename Math::Value;
  using Scalar = typename Math::Scalar;
  Scalar weight_p, weight_q;

  explicit Js(double weight)
      : weight_p(static_cast<Scalar>(weight)), weight_q(static_cast<Scalar>(1 - weight)) {}

  FASTPO_DEVICE Parts<Value> operator()(const LogProbs<Math>& at) const {
    const auto p_is_larger = at.t > 0;
    const Value apart = Math::abs(at.t);
    const Value one = Value{} + 1;
    const Value weight_smaller = p_is_larger ? Value{} + weight_q : Value{} + weight_p;
    const Value larger =
        -Math::log1p(weight_smaller * growth<Math>(one, -apart, Math::exp(-apart)));
    const Value smaller = larger - apart;
    const Value log_p_m = p_is_larger ? larger : smaller;
    const Value log_q_m = p_is_larger ? smaller : larger;
    const Value m = weight_p * at.p + weight_q * at.q;
    return {weight_p * weighted_excess<Math>(at.p, -log_p_m, m) +
                weight_q * weighted_excess<Math>(at.q, -log_q_m, m),
            weight_p * times(at.p, log_p_m), weight_q * times(at.q, log_q_m)};
  }
};

template <typename Math>
struct Power {
  using Value = typename Math::Value;
  using Scalar = typename Math::Scalar;
  Scalar a;
  Scalar per_value, per_p, per_q;  // factor / (a (a - 1)), factor / (a - 1), -factor / a

  Power(double a, double factor)
      : a(static_cast<Scalar>(a)),
        per_value(static_cast<Scalar>(factor / (a * (a - 1)))),
        per_p(static_cast<Scalar>(factor / (a - 1))),
        per_q(static_cast<Scalar>(-factor / a)) {}

  FASTPO_DEVICE Parts<Value> operator()(const LogProbs<Math>& at) const {
    const Value at_q = a * at.t, at_p = (a - 1) * at.t;
    // p^a q^(1 - a), by the difference that is exact for logits near each other
    const Value power = at.q == 0 ? Value{} : Math::exp(at.log_q + at_q);
    const Value of_q = growth<Math>(at.q, at_q, power);
    const Value near = at.q * (excess<Math>(at_q) - a * excess<Math>(at.t));
    const Value far = of_q - a * growth<Math>(at.q, at.t, at.p);
    const Value most = Math::abs(at_q) > Math::abs(at.t) ? at_q : at.t;
    return {per_value * (Math::abs(most) < 1 ? near : far), per_p * growth<Math>(at.p, at_p, power),
            per_q * of_q};
  }
};

// body(form, swapped) for a kind, or the code `unknown`.
template <typename Math, typename Body>
int with_form(DivergenceKind kind, double alpha, int unknown, const Body& body) {
  switch (kind) {
    case DivergenceKind::kForwardKl:
      return body(Kl<Math>(), false);
    case DivergenceKind::kReverseKl:
      return body(Kl<Math>(), true);
    case DivergenceKind::kJs:
      return body(Js<Math>(alpha), false);
    case DivergenceKind::kChi2:
      return body(Power<Math>(-1, 2), true);
    case DivergenceKind::kAlpha:
      return alpha > 0.5 ? body(Power<Math>(1 - alpha, 1), true)
                         : body(Power<Math>(alpha, 1), false);
  }
  return unknown;
}

// p or q: its tile, and its rows of TilePair::rows.
template <typename Acc>
struct Side {
  Tile tile;
  Acc *max, *log_sum, *mean;

  FASTPO_DEVICE LogSoftmax<Acc> log_softmax(int64_t row) const { return {max[row], log_sum[row]}; }
  FASTPO_DEVICE void write(int64_t row, const LogSoftmax<Acc>& of_row, Acc mean_of_row) const {
    max[row] = of_row.max;
    log_sum[row] = of_row.log_sum;
    mean[row] = mean_of_row;
  }
};

template <typename Acc>
struct Sides {
  Side<Acc> p, q;

  Sides(const TilePair& pair, bool swapped) {
    const auto row = [&](DivergenceRow r) {
      return static_cast<Acc*>(pair.rows) + r * pair.rows_stride;
    };
    p = {pair.policy, row(kPolicyMax), row(kPolicyLogSum), row(kPolicyMean)};
    q = {pair.ref, row(kRefMax), row(kRefLogSum), row(kRefMean)};
    if (swapped) std::swap(p, q);
  }
};

// The tile that decides whether there is a bias or a soft-cap to see to.
inline const Tile& fuller_tile(const TilePair& pair) {
  return pair.policy.bias != nullptr || pair.policy.softcap != 0 ? pair.policy : pair.ref;
}

}  // namespace fastpo
