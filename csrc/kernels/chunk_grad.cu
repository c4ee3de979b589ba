// chunk_grad: a tile of logits -> the gradient of the loss with respect to them, in place or into
// another buffer. One block per row, one pass: v sizeof(TIn) bytes read, v sizeof(TOut) written.
#include "core/transform.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

// d loss / dz_v from log p_v, for one row.
template <typename Acc>
struct GradOfRow {
  Acc logprob, lse, lse_low, entropy;
  Acc g, h, k;  // upstream gradients of logprob, entropy, lse

  FASTPO_DEVICE GradOfRow(const RowGrads& rows, int64_t row)
      : logprob(value(rows.logprobs, row)),
        lse(value(rows.lse, row)),
        lse_low(value(rows.lse_low, row)),
        entropy(value(rows.entropy, row)),
        g(value(rows.grad_logprobs, row)),
        h(value(rows.grad_entropy, row)),
        k(value(rows.grad_lse, row)) {}

  FASTPO_DEVICE Acc at_rest(Acc z) const {
    const Acc log_p = (z - lse) - lse_low;
    const Acc p = std::exp(log_p);
    return p * (k - g) - entropy_term(p, log_p);
  }
  FASTPO_DEVICE Acc at_target() const {
    const Acc p = std::exp(logprob);
    return p * k - g * std::expm1(logprob) - entropy_term(p, logprob);
  }

 private:
  static FASTPO_DEVICE Acc value(const void* values, int64_t row) {
    return values == nullptr ? 0 : static_cast<const Acc*>(values)[row];
  }
  FASTPO_DEVICE Acc entropy_term(Acc p, Acc log_p) const {
    if (h == 0 || p == 0) return 0;  // 0 * -inf would be NaN
    return h * p * (log_p + entropy);
  }
};

template <typename TIn, typename TOut, bool kPlain>
FASTPO_KERNEL void chunk_grad_kernel(Tile tile, Transform<acc_t<TIn>, kPlain> transform,
                                     RowGrads rows, TileOut out) {
  using Acc = acc_t<TIn>;
  const int64_t row = block_index();
  const TIn* logits = static_cast<const TIn*>(tile.logits) + row * tile.row_stride;
  TOut* grads = static_cast<TOut*>(out.data) + row * out.row_stride;
  if (tile.targets[row] == tile.ignore_index) return clear_row(grads, tile.v);
  const int64_t target = target_column(tile, tile.targets[row]);
  const GradOfRow<Acc> grad(rows, row);
  const Acc target_grad = grad.at_target();

  sweep_columns<transform.kMaxPacks>(
      tile.v,
      [&](auto columns) {
        auto z = load(logits, columns);
        auto slopes = transform.apply(z, columns);
        z.for_each(columns, [&](Acc& x, int64_t) { x = grad.at_rest(x) * transform.chain; });
        at_target(z, columns, target, [&](Acc& x) { x = target_grad * transform.chain; });
        z.multiply(slopes);
        store(grads, columns, z);
      },
      logits, grads);
}

}  // namespace

int chunk_grad(const Tile& tile, const RowGrads& rows, const TileOut& out, void* stream, int) {
  return with_tile_dtypes(tile.dtype, out.dtype, [&](auto type_in, auto type_out) {
    using TIn = typename decltype(type_in)::type;
    using TOut = typename decltype(type_out)::type;
    return with_variant<TIn>(tile, true, [&](auto plain, auto) {
      constexpr bool kPlain = decltype(plain)::value;
      return launch(chunk_grad_kernel<TIn, TOut, kPlain>, tile.n, kBlockThreads, 0, stream, tile,
                    Transform<acc_t<TIn>, kPlain>(tile), rows, out);
    });
  });
}

}  // namespace fastpo::FASTPO_BACKEND
