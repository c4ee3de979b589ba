// The operations on rows: finish_stats, finish_weights, scale_rows.
#include <algorithm>

#include "cpu/simd.h"

namespace fastpo::cpu::FASTPO_ISA {
namespace {

// log(1 + e^x)
template <typename A>
A softplus(A x) {
  return std::max(x, A(0)) + std::log1p(std::exp(-std::abs(x)));
}

// x * y with 0 * inf = 0.
template <typename A>
A times(A x, A y) {
  return x == 0 ? A(0) : x * y;
}

// log p_y - log(1 - p_y). An infinite logit has no probability: NaN, as exp(inf - inf) would give.
template <typename A>
A target_margin(A target_logit, A max, A sum) {
  if (target_logit == kInfinity<A>) return std::numeric_limits<A>::quiet_NaN();
  return (target_logit - max) - std::log(sum);
}

template <typename A>
void write(void* out, int64_t index, A value) {
  if (out != nullptr) static_cast<A*>(out)[index] = value;
}

template <typename A>
void finish_row(const RowState& state, int64_t i, int64_t vocab, int64_t target,
                const StatsOut& out, int64_t index) {
  const auto value = [&](StateRow r) {
    return static_cast<const A*>(state.values)[r * state.stride + i];
  };
  const A sum = value(kSumExp), target_logit = value(kTargetLogit);
  const A margin = target_margin(target_logit, value(kMax), sum);
  const A logprob = -softplus(-margin), log_other = -softplus(margin);

  write<A>(out.logprobs, index, logprob);
  // max(NaN, x) keeps its first argument: a poisoned target poisons the lse.
  const A top = std::max(target_logit, value(kMax));
  const A log_sum =
      std::log(times(sum, std::exp(value(kMax) - top)) + std::exp(target_logit - top));
  const A lse = top + log_sum;
  write<A>(out.lse, index, lse);
  write<A>(out.lse_low, index, log_sum - (lse - top));
  if (out.entropy != nullptr) {
    const A rest = sum == 0 ? A(0) : std::log(sum) - value(kSumExpLogit) / sum - log_other;
    write<A>(out.entropy, index,
             times(std::exp(logprob), -logprob) + times(std::exp(log_other), rest));
  }
  if (out.log_sum_sq_probs != nullptr) {
    const A rest =
        sum == 0 ? -kInfinity<A> : 2 * log_other + std::log(value(kSumSqExp)) - 2 * std::log(sum);
    const A high = std::max(2 * logprob, rest), low = std::min(2 * logprob, rest);
    write<A>(out.log_sum_sq_probs, index, high + std::log1p(std::exp(low - high)));
  }
  write<A>(out.mean_logits, index, value(kSumLogits) / A(vocab));
  if (out.is_top1 != nullptr) {
    const A rest = value(kMax);
    out.is_top1[index] = target_logit > rest || (target_logit == rest && target < state.top[i]);
  }
}

template <typename A>
void zero_outputs(const StatsOut& out, int64_t index) {
  for (void* values :
       {out.logprobs, out.lse, out.lse_low, out.entropy, out.log_sum_sq_probs, out.mean_logits}) {
    write<A>(values, index, A(0));
  }
  if (out.is_top1 != nullptr) out.is_top1[index] = 0;
}

template <typename T>
void unit_grad_row(const UnitGrad& args, const RowState& state, int64_t i) {
  using A = Acc<T>;
  const auto value = [&](StateRow r) {
    return static_cast<const A*>(state.values)[r * state.stride + i];
  };
  const A sum = value(kSumExp), target_logit = value(kTargetLogit);
  const A other = std::exp(-softplus(target_margin(target_logit, value(kMax), sum)));  // 1 - p_y
  A cap_grad = 1;
  if (args.softcap != 0) {
    const A t = target_logit * A(args.temperature / args.softcap);
    cap_grad = 1 - t * t;
  }
  const A inverse = sum == 0 ? A(0) : 1 / sum;
  const A factor = A(args.scale / args.temperature) * other;
  const A* partial = static_cast<const A*>(args.partial) + i * args.partial_stride;
  const T* target_row = static_cast<const T*>(args.target_rows) + i * args.target_rows_stride;
  const int64_t index = args.rows == nullptr ? i : args.rows[i];
  T* out = static_cast<T*>(args.unit_grad) + index * args.unit_grad_stride;
  if (args.targets[i] == args.ignore_index) {
    std::memset(out, 0, args.hidden * sizeof(T));
    return;
  }
  for (int64_t j = 0; j < args.hidden; ++j) {
    const A difference = cap_grad * to_float(target_row[j]) - partial[j] * inverse;
    out[j] = from_float<T>(factor * difference);
  }
}

}  // namespace

int finish_stats(DType acc, const RowState& state, int64_t n, int64_t vocab, const int64_t* targets,
                 int64_t ignore_index, const StatsOut& out, int threads) {
  return with_dtype(acc, [&](auto type) {
    using A = Acc<decltype(type)>;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t index = out.rows == nullptr ? i : out.rows[i];
      if (targets[i] == ignore_index) {
        zero_outputs<A>(out, index);
      } else {
        finish_row<A>(state, i, vocab, targets[i], out, index);
      }
    }
    return 0;
  });
}

int finish_weights(const UnitGrad& args, const RowState& state, int threads) {
  return with_dtype(args.dtype, [&](auto type) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < args.n; ++i) unit_grad_row<decltype(type)>(args, state, i);
    return 0;
  });
}

int scale_rows(DType dtype, const void* input, int64_t input_stride, const void* factors, void* out,
               int64_t out_stride, int64_t n, int64_t hidden, int threads) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; ++i) {
      const T* from = static_cast<const T*>(input) + i * input_stride;
      T* to = static_cast<T*>(out) + i * out_stride;
      const A factor = static_cast<const A*>(factors)[i];
      for (int64_t j = 0; j < hidden; ++j) {
        to[j] = from_float<T>(factor == 0 ? A(0) : factor * to_float(from[j]));
      }
    }
    return 0;
  });
}

}  // namespace fastpo::cpu::FASTPO_ISA
