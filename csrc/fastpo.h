// fastpo: every operation of the C++ room, by its C++ signature. The table of contents of csrc/.
//
// Dimension key (the same letters end the tensor names in Python):
//   N  packed tokens            n  rows of one tile        H  hidden size
//   V  vocabulary               v  columns of one tile     B  sequences       T  positions
//
// Rules. Pointers, sizes and strides only: no torch, no Python. Strides count elements. All offsets
// are 64 bit. An operation writes its outputs and allocates nothing. Zero rows is a valid call that
// launches nothing. The return value is 0 or the backend's error code (see error_string).
//
// Three backends implement this header, each in its own namespace FASTPO_BACKEND: cpu, cuda, sim
// (the CUDA kernels on the CPU). `stream` is a cudaStream_t for cuda and is ignored by the others;
// `threads` is the number of CPU threads for cpu and is ignored by the others.
#pragma once

#include <cstdint>

#ifndef FASTPO_BACKEND
#define FASTPO_BACKEND cpu
#endif

namespace fastpo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Statistics, biases, log-probs and upstream gradients are in the accumulation type of the logits:
// double for kFloat64, float for the other three. Below `acc` means that type.

// One row of RowState::values for each running statistic over the columns seen so far. All but
// kTargetLogit and kSumLogits leave the target column out: 1 - p(target) is then a sum of positive
// numbers and never a difference, so confident tokens keep all their digits.
enum StateRow : int {
  kMax = 0,          // max_{v != y} z_v                         starts at -inf
  kSumExp = 1,       // sum_{v != y} exp(z_v - kMax)             starts at 0
  kTargetLogit = 2,  // z_y                                      starts at NaN: a target outside the
                     //                                          vocabulary poisons its own row
  kSumExpLogit = 3,  // sum_{v != y} exp(z_v - kMax) (z_v - kMax)   starts at 0; for kEntropy
  kSumSqExp = 4,     // sum_{v != y} exp(z_v - kMax)^2           starts at 0; for kLogSumSqProbs
  kSumLogits = 5,    // sum_v z_v, target included               starts at 0; for kMeanLogits
  kStateRows = 6,
};

// Which optional statistics a call keeps (bits of RowState::moments).
enum Moment : int { kEntropy = 1, kLogSumSqProbs = 2, kMeanLogits = 4, kIsTop1 = 8 };

struct RowState {
  void* values;    // acc [kStateRows, n], row r starts at values + r * stride
  int64_t stride;  // >= n
  int32_t*
      top;      // [n] first column index at which kMax is reached, starts at INT32_MAX; for kIsTop1
  int moments;  // Moment bits
};

// A tile of logits [n, v]: columns vocab_start .. vocab_start + v of n rows. The softmax sees
//   z = softcap * tanh(scale * (logit + bias) / softcap) / temperature     (softcap > 0)
//   z = scale * (logit + bias) / temperature                               (softcap == 0)
// computed in acc. Rows whose target equals ignore_index are skipped by every operation: their
// state stays as it is, and outputs of their rows are zeros.
struct Tile {
  const void* logits;
  DType dtype;
  int64_t row_stride;  // >= v; rows need not be aligned
  int64_t n, v;
  int64_t vocab_start;
  const int64_t* targets;  // [n], vocabulary ids
  int64_t ignore_index;
  const void* bias;  // acc [v] of these columns, or null
  double scale, softcap, temperature;
};

// Where a tile-shaped result goes: [n, v] with its own dtype and stride; may be the logits
// themselves when dtype and stride agree (in place). Supported (logits -> output) dtypes: equal
// types, and float32 -> bfloat16 or float16.
struct TileOut {
  void* data;
  DType dtype;
  int64_t row_stride;
};

// Outputs of finish_stats, any of which may be null; acc [*] unless noted.
struct StatsOut {
  void *logprobs, *lse, *lse_low, *entropy, *log_sum_sq_probs, *mean_logits;
  uint8_t* is_top1;
  const int64_t* rows;
};

// Arguments of finish_weights. dtype is the type of target_rows = W[targets] [n, hidden] and of
// unit_grad; partial is acc.
struct UnitGrad {
  DType dtype;
  const void* partial;  // acc [n, hidden]
  int64_t partial_stride;
  const void* target_rows;  // [n, hidden]
  int64_t target_rows_stride;
  void* unit_grad;  // [*, hidden]
  int64_t unit_grad_stride;
  const int64_t* rows;     // [n] or null
  const int64_t* targets;  // [n]; rows of ignore_index get zeros
  int64_t ignore_index;
  int64_t n, hidden;
  double scale, softcap, temperature;
};

// Per row, acc, each gradient null or [n].
struct RowGrads {
  const void *logprobs, *lse, *lse_low, *entropy;  // forward values; entropy only needed with h
  const void *grad_logprobs, *grad_entropy, *grad_lse;  // g, h, k
};

// Sequence b is values[offsets[b] .. offsets[b+1]) when offsets is given, else row b of [B, T] with
// its strides.
struct Segments {
  DType dtype;                                                           // of values and reference
  const void* values;                                                    // [total] or [B, T]
  const void* reference;                                                 // same shape, or null
  const void* weights;                                                   // acc, same shape, or null
  const uint8_t* mask;                                                   // same shape, or null
  int64_t values_stride, reference_stride, weights_stride, mask_stride;  // between rows of [B, T]
  const int64_t* offsets;                                                // [B + 1] or null
  int64_t B, T;                                                          // T is unused with offsets
};

// A divergence D of a policy p from a reference q, as sum_v q_v f(r_v) with r_v = p_v / q_v, f
// convex and f(1) = f'(1) = 0: no term is negative, so D keeps its digits where p and q nearly
// agree.
enum class DivergenceKind : int {
  kForwardKl = 0,  // f = r - 1 - log r                            KL(q || p)
  kReverseKl = 1,  // f = r log r - r + 1                          KL(p || q)
  kJs = 2,         // w KL(p || m) + (1 - w) KL(q || m),  m = w p + (1 - w) q,  w = alpha
  kChi2 = 3,       // f = (r - 1)^2                                Pearson's chi-squared
  kAlpha = 4,      // f = (r^a - 1 - a (r - 1)) / (a (a - 1)),  a = alpha, neither 0 nor 1
};

// What `divergence` leaves for `divergence_grad`, one row per quantity; acc [kDivergenceRows, n].
// log p_v = (z_v - kPolicyMax) - kPolicyLogSum, likewise for q.
enum DivergenceRow : int {
  kPolicyMax = 0,     // max_v z_v of the policy
  kPolicyLogSum = 1,  // log sum_v exp(z_v - kPolicyMax)
  kRefMax = 2,
  kRefLogSum = 3,
  kPolicyMean = 4,  // sum_v p_v f'(r_v)
  kRefMean = 5,     // sum_v q_v (f(r_v) - r_v f'(r_v))
  kDivergenceRows = 6,
};

// Two tiles of the same rows and columns; their targets and ignore_index are not used.
struct TilePair {
  Tile policy, ref;  // of one dtype
  DivergenceKind kind;
  double alpha;
  void* rows;           // acc [kDivergenceRows, n], row r starts at rows + r * rows_stride
  int64_t rows_stride;  // >= n
};

namespace FASTPO_BACKEND {

// Fold a tile into the running state.
int chunk_stats(const Tile& tile, const RowState& state, void* stream, int threads);

// Running state -> outputs, any of which may be null; acc [*] unless noted, row i of the state is
// written to index rows[i], or i when rows is null. With d = (z_y - kMax) - log kSumExp, NaN at an
// infinite z_y:
//   logprobs = -softplus(-d) <= 0,   lse = logsumexp_v z_v
//   lse_low = what rounding took from lse: with top = max(kMax, z_y) and
//     log_sum = log(kSumExp exp(kMax - top) + exp(z_y - top)), it is log_sum - (lse - top); so
//     (z - lse) - lse_low is as exact as (z - top) - log_sum, whatever offset the logits share
//   entropy = -sum_v p_v log p_v,    log_sum_sq_probs = log sum_v p_v^2
//   mean_logits = kSumLogits / vocab,  is_top1 (uint8) = argmax_v z_v == y, first index on ties
int finish_stats(DType acc, const RowState& state, int64_t n, int64_t vocab, const int64_t* targets,
                 int64_t ignore_index, const StatsOut& out, void* stream, int threads);

// chunk_stats and, in the same sweep, the tile's share of the frozen-head product:
//   weights_v = exp(z_v - kMax) * cap'_v,  0 at the target,   kMax being the maximum after this
//   tile cap'_v = 1 - tanh^2(scale * (logit_v + bias_v) / softcap), 1 without softcap
// and acc rows of `partial` [n, hidden] (the sum over earlier tiles of weights @ W) are multiplied
// by exp(old kMax - new kMax) when the maximum moved. `partial` is null for the first tile.
int chunk_weights(const Tile& tile, const RowState& state, const TileOut& weights, void* partial,
                  int64_t partial_stride, int64_t hidden, void* stream, int threads);

// Frozen head: the gradient of the log-prob with respect to the hidden state, for row rows[i] (or
// i)
//   unit_grad = (scale / temperature) * (1 - p_y) * (cap'_y * W_y - partial_i / kSumExp)
// dtype is the type of target_rows = W[targets] [n, hidden] and of unit_grad; acc that of the rest.
int finish_weights(const UnitGrad& args, const RowState& state, void* stream, int threads);

// Tile -> gradient of the loss with respect to the raw logits. Per row, acc, each gradient null or
// [n]:
//   dz_v = g (1[v = y] - p_v) - h p_v (log p_v + entropy) + k p_v,   1 - p_y = -expm1(logprob)
//   log p_v = (z_v - lse) - lse_low
//   dlogit_v = dz_v * cap'_v * scale / temperature
// g, h, k being the upstream gradients of logprobs, entropy and lse.
int chunk_grad(const Tile& tile, const RowGrads& rows, const TileOut& out, void* stream,
               int threads);

// out[i, :] = factors[i] * input[i, :], the product formed in acc and rounded once. factors acc
// [n]. A zero factor gives zeros whatever the input holds.
int scale_rows(DType dtype, const void* input, int64_t input_stride, const void* factors, void* out,
               int64_t out_stride, int64_t n, int64_t hidden, void* stream, int threads);

// Segment sums: per sequence b, over its positions t with mask set,
//   sums_b = sum w_t (values_t - reference_t),    counts_b = sum 1
// Sequence b is values[offsets[b] .. offsets[b+1]) when offsets is given, else row b of [B, T] with
// its strides. Positions outside the mask are never multiplied: NaN and inf there do no harm.
// Summation order is fixed by the sequence's length alone: same bits on every run.
int segment_sums(const Segments& segments, void* sums, int64_t* counts, void* stream, int threads);

// Backward of segment_sums; grad_sums acc [B]. Each output is null or laid out as its input, packed
// ([total] or [B, T] contiguous), zeros outside the mask; with offsets, positions that belong to no
// sequence are not written.
//   grad_values_t = w_t g_b   (dtype)      grad_reference_t = -w_t g_b   (dtype)
//   grad_weights_t = (values_t - reference_t) g_b   (acc)
int segment_sums_backward(const Segments& segments, const void* grad_sums, void* grad_values,
                          void* grad_reference, void* grad_weights, void* stream, int threads);

// The divergence of each row and what its gradient needs, from tiles that span the whole
// vocabulary; divergences acc [n], pair.rows is written. A logit of +inf gives NaN in its row.
// Terms are max(0, q_v f(r_v)); one with p_v = q_v = 0 is 0.
int divergence(const TilePair& pair, void* divergences, void* stream, int threads);

// Gradients of sum_i grads_i D_i with respect to the raw logits of any columns, from pair.rows and
// the upstream gradients grads, acc [n]:
//   dz_v = g p_v (f'(r_v) - kPolicyMean)                    of the policy
//   dz_v = g q_v (f(r_v) - r_v f'(r_v) - kRefMean)          of the reference
//   dlogit_v = dz_v * cap'_v * scale / temperature
// Either output may be null (data == nullptr), and either may be the logits it belongs to (in
// place); two outputs are of one dtype. A zero g gives zeros whatever the logits hold.
int divergence_grad(const TilePair& pair, const void* grads, const TileOut& grad_policy,
                    const TileOut& grad_ref, void* stream, int threads);

// Text of an error code of this backend.
const char* error_string(int code);

}  // namespace FASTPO_BACKEND
}  // namespace fastpo
