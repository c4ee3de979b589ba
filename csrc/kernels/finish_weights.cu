// finish_weights: the finished product weights @ W of a frozen head -> the gradient of the log-prob
// with respect to the hidden state. One block per row, one pass: hidden * (sizeof(acc) + sizeof(T))
// bytes read and hidden * sizeof(T) written per row.
#include "core/online_softmax.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

template <typename T>
FASTPO_KERNEL void finish_weights_kernel(UnitGrad args, RowState state, acc_t<T> slope,
                                         acc_t<T> inverse_cap) {
  using Acc = acc_t<T>;
  const int64_t row = block_index();
  const int64_t index = args.rows == nullptr ? row : args.rows[row];
  const Acc* partial = static_cast<const Acc*>(args.partial) + row * args.partial_stride;
  const T* target_row = static_cast<const T*>(args.target_rows) + row * args.target_rows_stride;
  T* unit_grad = static_cast<T*>(args.unit_grad) + index * args.unit_grad_stride;

  if (args.targets[row] == args.ignore_index) return clear_row(unit_grad, args.hidden);

  const StateOfRow<Acc> at{state, row};
  const Acc sum = at[kSumExp];
  const Acc one_minus_p = std::exp(-softplus(target_margin(at)));
  const Acc factor = slope * one_minus_p;
  const Acc cap = inverse_cap == 0 ? 1 : cap_slope(at[kTargetLogit] * inverse_cap);
  const Acc inverse_sum = sum == 0 ? 0 : 1 / sum;  // a vocabulary of one word

  sweep_columns(
      args.hidden,
      [&](auto columns) {
        auto grad = load(target_row, columns);
        auto rest = load(partial, columns);
        grad.combine(rest, [&](Acc w, Acc x) { return factor * (cap * w - x * inverse_sum); });
        store(unit_grad, columns, grad);
      },
      partial, target_row, unit_grad);
}

}  // namespace

int finish_weights(const UnitGrad& args, const RowState& state, void* stream, int) {
  return with_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const double inverse_cap = args.softcap == 0 ? 0 : args.temperature / args.softcap;
    return launch(finish_weights_kernel<T>, args.n, kBlockThreads, 0, stream, args, state,
                  static_cast<acc_t<T>>(args.scale / args.temperature),
                  static_cast<acc_t<T>>(inverse_cap));
  });
}

}  // namespace fastpo::FASTPO_BACKEND
