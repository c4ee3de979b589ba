// chunk_stats: folds a tile of logits into the running statistics of its rows. One block per row,
// one online pass: v * sizeof(TIn) bytes read per row, and a few words of state.
#include "core/online_softmax.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

template <typename TIn, bool kPlain, bool kMoments>
FASTPO_KERNEL void chunk_stats_kernel(Tile tile, Transform<acc_t<TIn>, kPlain> transform,
                                      RowState state) {
  using Acc = acc_t<TIn>;
  const int64_t row = block_index();
  if (tile.targets[row] == tile.ignore_index) return;
  const TIn* logits = static_cast<const TIn*>(tile.logits) + row * tile.row_stride;
  const int64_t target = target_column(tile, tile.targets[row]);
  const StateOfRow<Acc> state_of_row{state, row};

  auto seen = OnlineSoftmax<Acc, kMoments>::identity();
  sweep_columns<transform.kMaxPacks>(
      tile.v,
      [&](auto columns) {
        auto z = load(logits, columns);
        transform.apply(z, columns);
        seen.sums.add_logits(z, columns);
        at_target(z, columns, target, [&](Acc& x) {
          state_of_row[kTargetLogit] = x;
          x = -kInfinity<Acc>;
        });
        seen.add(z, columns, tile.vocab_start);
      },
      logits);

  seen = block_merge(seen);
  if (thread_index() == 0) state_of_row.fold(seen);
}

}  // namespace

int chunk_stats(const Tile& tile, const RowState& state, void* stream, int) {
  return with_dtype(tile.dtype, [&](auto type) {
    using TIn = typename decltype(type)::type;
    return with_variant<TIn>(tile, state.moments != 0, [&](auto plain, auto moments) {
      constexpr bool kPlain = decltype(plain)::value;
      return launch(chunk_stats_kernel<TIn, kPlain, decltype(moments)::value>, tile.n,
                    kBlockThreads, 0, stream, tile, Transform<acc_t<TIn>, kPlain>(tile), state);
    });
  });
}

}  // namespace fastpo::FASTPO_BACKEND
