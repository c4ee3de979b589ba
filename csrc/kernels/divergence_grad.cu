// divergence_grad: two tiles of logits -> the gradients of their divergences with respect to either
// or both, in place or into other buffers. One block per row, one pass: 2 v sizeof(TIn) bytes read,
// v sizeof(TOut) written per gradient.
#include "core/pair.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

template <typename TOut>
FASTPO_DEVICE TOut* row_of(const TileOut& out) {
  return out.data == nullptr ? nullptr
                             : static_cast<TOut*>(out.data) + block_index() * out.row_stride;
}

// d divergence / dlogit of one side of one row.
template <typename Acc, bool kPlain>
struct GradOfSide {
  const Transform<Acc, kPlain>& transform;
  LogSoftmax<Acc> log_softmax;
  Acc mean;
  Acc g;  // upstream

  FASTPO_DEVICE GradOfSide(const Side<Acc>& side, const Transform<Acc, kPlain>& transform, Acc g)
      : transform(transform),
        log_softmax(side.log_softmax(block_index())),
        mean(side.mean[block_index()]),
        g(g) {}

  FASTPO_DEVICE Acc operator()(Acc part, Acc probability, Acc slope) const {
    return g * (part - probability * mean) * slope * transform.chain;
  }
};

template <typename TIn, typename TOut, bool kPlain, typename Form>
FASTPO_KERNEL void divergence_grad_kernel(PairOfTiles<acc_t<TIn>, kPlain> pair, Form form,
                                          const acc_t<TIn>* grads, TileOut p_out, TileOut q_out) {
  using Acc = acc_t<TIn>;
  const int64_t v = pair.p.tile.v;
  TOut *p_grads = row_of<TOut>(p_out), *q_grads = row_of<TOut>(q_out);
  const Acc g = grads[block_index()];
  if (g == 0) {
    if (p_grads != nullptr) clear_row(p_grads, v);
    if (q_grads != nullptr) clear_row(q_grads, v);
    return;
  }
  const GradOfSide<Acc, kPlain> p_grad(pair.p, pair.p_transform, g);
  const GradOfSide<Acc, kPlain> q_grad(pair.q, pair.q_transform, g);
  const TIn* p_logits = row_of<TIn>(pair.p.tile);
  const TIn* q_logits = row_of<TIn>(pair.q.tile);

  sweep_columns<kPairPacks<kPlain, TIn, TOut>>(
      v,
      [&](auto columns) {
        auto p_lanes = load(p_logits, columns);
        auto q_lanes = load(q_logits, columns);
        p_lanes.for_each_with(q_lanes, columns, [&](Acc& p, Acc& q, int64_t column) {
          const Acc p_slope = pair.p_transform.apply(p, column);
          const Acc q_slope = pair.q_transform.apply(q, column);
          const LogProbs<ScalarMath<Acc>> at(p, q, p_grad.log_softmax, q_grad.log_softmax);
          const Parts<Acc> parts = form(at);
          p = p_grad(parts.of_p, at.p, p_slope);
          q = q_grad(parts.of_q, at.q, q_slope);
        });
        if (p_grads != nullptr) store(p_grads, columns, p_lanes);
        if (q_grads != nullptr) store(q_grads, columns, q_lanes);
      },
      p_logits, q_logits, p_grads == nullptr ? q_grads : p_grads,
      q_grads == nullptr ? p_grads : q_grads);
}

}  // namespace

int divergence_grad(const TilePair& pair, const void* grads, const TileOut& grad_policy,
                    const TileOut& grad_ref, void* stream, int) {
  const TileOut& any = grad_policy.data == nullptr ? grad_ref : grad_policy;
  if (any.data == nullptr) return 0;
  if (grad_ref.data != nullptr && grad_ref.dtype != any.dtype) return kInvalidValue;
  return with_tile_dtypes(pair.policy.dtype, any.dtype, [&](auto type_in, auto type_out) {
    using TIn = typename decltype(type_in)::type;
    using TOut = typename decltype(type_out)::type;
    return with_pair<TIn>(pair, [&](auto tiles, auto form, bool swapped) {
      constexpr bool kPlain = decltype(tiles)::kPlain;
      return launch(divergence_grad_kernel<TIn, TOut, kPlain, decltype(form)>, pair.policy.n,
                    kBlockThreads, 0, stream, tiles, form, static_cast<const acc_t<TIn>*>(grads),
                    swapped ? grad_ref : grad_policy, swapped ? grad_policy : grad_ref);
    });
  });
}

}  // namespace fastpo::FASTPO_BACKEND
