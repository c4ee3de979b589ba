// finish_stats: the running state of a row -> its log-prob and the other statistics. One thread per
// row; reads two to six words of state and writes one word per output.
#include "core/online_softmax.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

template <typename Acc>
FASTPO_DEVICE Acc log_add_exp(Acc a, Acc b) {
  return std::fmax(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
}

template <typename Acc>
FASTPO_DEVICE void write(void* out, int64_t index, Acc value) {
  if (out != nullptr) static_cast<Acc*>(out)[index] = value;
}

// With p the target's probability and q = 1 - p that of the rest, the sums over the vocabulary
// split into the target's term and q times (or q^2 times) a sum over the distribution of the rest.
template <typename Acc>
FASTPO_KERNEL void finish_stats_kernel(RowState state, int64_t n, int64_t vocab,
                                       const int64_t* targets, int64_t ignore_index, StatsOut out) {
  const int64_t row = block_index() * kBlockThreads + thread_index();
  if (row >= n) return;
  const int64_t index = out.rows == nullptr ? row : out.rows[row];
  if (targets[row] == ignore_index) {
    write(out.logprobs, index, Acc(0));
    write(out.lse, index, Acc(0));
    write(out.lse_low, index, Acc(0));
    write(out.entropy, index, Acc(0));
    write(out.log_sum_sq_probs, index, Acc(0));
    write(out.mean_logits, index, Acc(0));
    if (out.is_top1 != nullptr) out.is_top1[index] = 0;
    return;
  }

  const StateOfRow<Acc> at{state, row};
  const Acc margin = target_margin(at);
  const Acc log_p = -softplus(-margin);
  const Acc log_q = -softplus(margin);
  const Acc sum = at[kSumExp];
  const bool alone = sum == 0;
  write(out.logprobs, index, log_p);

  const Acc target_logit = at[kTargetLogit];
  const Acc max = at[kMax];
  const Acc top = std::fmax(target_logit, max);
  const Acc rest = alone ? 0 : sum * std::exp(max - top);
  const Acc log_sum = std::log(rest + std::exp(target_logit - top));
  const Acc lse = top + log_sum;
  write(out.lse, index, lse);
  write(out.lse_low, index, log_sum - (lse - top));
  if (out.entropy != nullptr) {
    const Acc p = std::exp(log_p);
    const Acc q = std::exp(log_q);
    const Acc entropy_of_rest = std::log(sum) - at[kSumExpLogit] / sum;
    const Acc of_target = p == 0 ? 0 : -p * log_p;
    const Acc of_rest = alone || q == 0 ? 0 : q * (entropy_of_rest - log_q);
    write(out.entropy, index, of_target + of_rest);
  }
  if (out.log_sum_sq_probs != nullptr) {
    const Acc of_rest = 2 * (log_q - std::log(sum)) + std::log(at[kSumSqExp]);
    write(out.log_sum_sq_probs, index, alone ? 2 * log_p : log_add_exp(2 * log_p, of_rest));
  }
  write(out.mean_logits, index, at[kSumLogits] / static_cast<Acc>(vocab));
  if (out.is_top1 != nullptr) {
    out.is_top1[index] =
        target_logit > max || (target_logit == max && targets[row] < state.top[row]);
  }
}

}  // namespace

int finish_stats(DType acc, const RowState& state, int64_t n, int64_t vocab, const int64_t* targets,
                 int64_t ignore_index, const StatsOut& out, void* stream, int) {
  return with_dtype(acc, [&](auto type) {
    using Acc = acc_t<typename decltype(type)::type>;
    const int64_t blocks = (n + kBlockThreads - 1) / kBlockThreads;
    return launch(finish_stats_kernel<Acc>, blocks, kBlockThreads, 0, stream, state, n, vocab,
                  targets, ignore_index, out);
  });
}

}  // namespace fastpo::FASTPO_BACKEND
