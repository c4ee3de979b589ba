// scale_rows: every row times its factor, rounded once. One block per row, one pass: hidden *
// sizeof(T) bytes read and written per row; a zero factor reads nothing.
#include "core/columns.h"
#include "fastpo.h"

namespace fastpo::FASTPO_BACKEND {
namespace {

template <typename T>
FASTPO_KERNEL void scale_rows_kernel(const T* input, int64_t input_stride, const acc_t<T>* factors,
                                     T* out, int64_t out_stride, int64_t hidden) {
  const int64_t row = block_index();
  const acc_t<T> factor = factors[row];
  const T* from = input + row * input_stride;
  T* to = out + row * out_stride;
  if (factor == 0) return clear_row(to, hidden);
  sweep_columns(
      hidden,
      [&](auto columns) {
        auto x = load(from, columns);
        x.for_each(columns, [&](acc_t<T>& value, int64_t) { value *= factor; });
        store(to, columns, x);
      },
      from, to);
}

}  // namespace

int scale_rows(DType dtype, const void* input, int64_t input_stride, const void* factors, void* out,
               int64_t out_stride, int64_t n, int64_t hidden, void* stream, int) {
  return with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(scale_rows_kernel<T>, n, kBlockThreads, 0, stream, static_cast<const T*>(input),
                  input_stride, static_cast<const acc_t<T>*>(factors), static_cast<T*>(out),
                  out_stride, hidden);
  });
}

}  // namespace fastpo::FASTPO_BACKEND
