// chunk_weights: folds a tile into the running statistics of its rows and turns it into the weights
// exp(z - max) of the frozen-head product, in place or into another buffer. One block per row, two
// passes, since the weights need the final maximum: 2 v sizeof(TIn) bytes read (the second time
// from L2, where the row fits) and v sizeof(TOut) written per row; where the maximum moved, also 2
// hidden sizeof(acc) for rescaling the partial product.
#include "core/online_softmax.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

template <typename TIn, typename TOut, bool kPlain, bool kMoments>
FASTPO_KERNEL void chunk_weights_kernel(Tile tile, Transform<acc_t<TIn>, kPlain> transform,
                                        RowState state, TileOut out, acc_t<TIn>* partial,
                                        int64_t partial_stride, int64_t hidden) {
  using Acc = acc_t<TIn>;
  const int64_t row = block_index();
  const TIn* logits = static_cast<const TIn*>(tile.logits) + row * tile.row_stride;
  TOut* weights = static_cast<TOut*>(out.data) + row * out.row_stride;
  if (tile.targets[row] == tile.ignore_index) return clear_row(weights, tile.v);
  const int64_t target = target_column(tile, tile.targets[row]);
  const StateOfRow<Acc> state_of_row{state, row};
  const Acc old_max = state_of_row[kMax];

  auto seen = OnlineSoftmax<Acc, kMoments>::identity();
  sweep_columns<transform.kMaxPacks>(
      tile.v,
      [&](auto columns) {
        auto z = load(logits, columns);
        transform.apply(z, columns);
        at_target(z, columns, target, [](Acc& x) { x = -kInfinity<Acc>; });
        seen.max.add(z, columns, tile.vocab_start);
      },
      logits);
  // The barriers in here also end the first pass's reads before anything is written in place.
  seen.max = block_merge(seen.max);
  // Weights and sums are taken against the maximum over this and all earlier tiles.
  seen.max.merge({old_max, INT32_MAX});

  sweep_columns<transform.kMaxPacks>(
      tile.v,
      [&](auto columns) {
        auto z = load(logits, columns);
        const auto slopes = transform.apply(z, columns);
        seen.sums.add_logits(z, columns);
        at_target(z, columns, target, [&](Acc& x) {
          state_of_row[kTargetLogit] = x;
          x = -kInfinity<Acc>;
        });
        seen.sums.add(z, columns, seen.max.base());
        z.multiply(slopes);
        store(weights, columns, z);
      },
      logits, weights);
  seen.sums = block_merge(seen.sums);
  if (thread_index() == 0) state_of_row.fold(seen);

  if (partial == nullptr || seen.max.value == old_max || old_max == -kInfinity<Acc>) return;
  const Acc factor = std::exp(old_max - seen.max.value);
  Acc* sums = partial + row * partial_stride;
  sweep_columns(
      hidden,
      [&](auto columns) {
        auto x = load(sums, columns);
        x.for_each(columns, [&](Acc& value, int64_t) { value *= factor; });
        store(sums, columns, x);
      },
      sums);
}

}  // namespace

int chunk_weights(const Tile& tile, const RowState& state, const TileOut& weights, void* partial,
                  int64_t partial_stride, int64_t hidden, void* stream, int) {
  return with_tile_dtypes(tile.dtype, weights.dtype, [&](auto type_in, auto type_out) {
    using TIn = typename decltype(type_in)::type;
    using TOut = typename decltype(type_out)::type;
    return with_variant<TIn>(tile, state.moments != 0, [&](auto plain, auto moments) {
      constexpr bool kPlain = decltype(plain)::value;
      constexpr bool kMoments = decltype(moments)::value;
      return launch(chunk_weights_kernel<TIn, TOut, kPlain, kMoments>, tile.n, kBlockThreads, 0,
                    stream, tile, Transform<acc_t<TIn>, kPlain>(tile), state, weights,
                    static_cast<acc_t<TIn>*>(partial), partial_stride, hidden);
    });
  });
}

}  // namespace fastpo::FASTPO_BACKEND
