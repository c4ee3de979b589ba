// Element types: conversion to and from the accumulation type, and the switch from runtime codes to
// template arguments. Every switch answers an unsupported code with kInvalidValue.
#pragma once

#include <type_traits>

#include "fastpo.h"
#include "port/port.h"

namespace fastpo {

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccOf<T>::type;

template <typename T>
FASTPO_DEVICE acc_t<T> to_acc(T x) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return x;
  } else {
    return to_float(x);
  }
}

template <typename T>
FASTPO_DEVICE T from_acc(acc_t<T> x) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <typename T>
struct Type {
  using type = T;
};

// f(Type<T>) for the type of a code.
template <typename F>
int with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kBFloat16:
      return f(Type<bfloat16>{});
    case DType::kFloat16:
      return f(Type<float16>{});
    case DType::kFloat64:
      return f(Type<double>{});
    default:
      return kInvalidValue;
  }
}

// f(Type<TIn>, Type<TOut>) for the pairs that TileOut names.
template <typename F>
int with_tile_dtypes(DType in, DType out, F f) {
  return with_dtype(in, [&](auto type_in) {
    using TIn = typename decltype(type_in)::type;
    if (in == out) return f(type_in, type_in);
    if constexpr (std::is_same_v<TIn, float>) {
      if (out == DType::kBFloat16) return f(type_in, Type<bfloat16>{});
      if (out == DType::kFloat16) return f(type_in, Type<float16>{});
    }
    return kInvalidValue;
  });
}

}  // namespace fastpo
