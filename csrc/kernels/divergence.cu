// divergence: how far a policy is from a reference, row by row. One block per row, and two
// passes over the logits of both: 4 v sizeof(TIn) bytes read per row, half of them for the second
// time.
#include "core/online_softmax.h"
#include "core/pair.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

template <typename Acc>
FASTPO_DEVICE LogSoftmax<Acc> merged(const OnlineSoftmax<Acc, false>& of_thread) {
  const auto seen = block_merge(of_thread);
  return {seen.max.value, std::log(seen.sums.sum)};
}

template <typename Acc>
struct PartSums {
  Acc value, of_p, of_q;

  static FASTPO_DEVICE PartSums identity() { return {0, 0, 0}; }
  FASTPO_DEVICE void merge(const PartSums& other) {
    value += other.value;
    of_p += other.of_p;
    of_q += other.of_q;
  }
  FASTPO_DEVICE PartSums shuffled_down(int delta, Site site) const {
    return {shuffle_down(value, delta, site), shuffle_down(of_p, delta, site),
            shuffle_down(of_q, delta, site)};
  }
  FASTPO_DEVICE void add(const Parts<Acc>& parts) {
    value += parts.value < 0 ? 0 : parts.value;  // NaN stays
    of_p += parts.of_p;
    of_q += parts.of_q;
  }
};

template <typename TIn, bool kPlain, typename Form>
FASTPO_KERNEL void divergence_kernel(PairOfTiles<acc_t<TIn>, kPlain> pair, Form form,
                                     acc_t<TIn>* divergences) {
  using Acc = acc_t<TIn>;
  const int64_t v = pair.p.tile.v;
  const TIn* p_logits = row_of<TIn>(pair.p.tile);
  const TIn* q_logits = row_of<TIn>(pair.q.tile);

  // Both in one sweep, so in one order: equal logits have equal sums.
  auto p_seen = OnlineSoftmax<Acc, false>::identity();
  auto q_seen = OnlineSoftmax<Acc, false>::identity();
  sweep_columns<kPairPacks<kPlain, TIn>>(
      v,
      [&](auto columns) {
        auto p_lanes = load(p_logits, columns);
        auto q_lanes = load(q_logits, columns);
        pair.p_transform.apply(p_lanes, columns);
        pair.q_transform.apply(q_lanes, columns);
        p_seen.add(p_lanes, columns, 0);
        q_seen.add(q_lanes, columns, 0);
      },
      p_logits, q_logits);
  const LogSoftmax<Acc> of_p = merged(p_seen), of_q = merged(q_seen);

  auto sums = PartSums<Acc>::identity();
  sweep_columns<kPairPacks<kPlain, TIn>>(
      v,
      [&](auto columns) {
        auto p_lanes = load(p_logits, columns);
        auto q_lanes = load(q_logits, columns);
        p_lanes.for_each_with(q_lanes, columns, [&](Acc& p_z, Acc& q_z, int64_t column) {
          pair.p_transform.apply(p_z, column);
          pair.q_transform.apply(q_z, column);
          sums.add(form(LogProbs<ScalarMath<Acc>>(p_z, q_z, of_p, of_q)));
        });
      },
      p_logits, q_logits);

  sums = block_merge(sums);
  if (thread_index() != 0) return;
  divergences[block_index()] = sums.value;
  pair.p.write(block_index(), of_p, sums.of_p);
  pair.q.write(block_index(), of_q, sums.of_q);
}

}  // namespace

int divergence(const TilePair& pair, void* divergences, void* stream, int) {
  return with_dtype(pair.policy.dtype, [&](auto type) {
    using TIn = typename decltype(type)::type;
    return with_pair<TIn>(pair, [&](auto tiles, auto form, bool) {
      return launch(divergence_kernel<TIn, decltype(tiles)::kPlain, decltype(form)>, pair.policy.n,
                    kBlockThreads, 0, stream, tiles, form, static_cast<acc_t<TIn>*>(divergences));
    });
  });
}

}  // namespace fastpo::FASTPO_BACKEND
