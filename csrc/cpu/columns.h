// A row of a tile in short vectors: raw logits to z, the walk over the columns, loads and stores.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace fastpo::cpu::FASTPO_ISA {

// Partial sums are kept in short float vectors for this many columns, then added in double: the
// error of a row's sum does not grow with its length.
constexpr int64_t kSumBlock = 1024;

// raw logits -> z, and the derivative of the soft-cap. kPlain: neither bias nor soft-cap. Factors
// are applied one by one, as the formula has them: a product of two would be rounded, and every z
// of the row be off by the same share.
template <typename T, bool kPlain>
struct Transform {
  using A = Acc<T>;
  const A* bias;
  A scale, softcap, temperature;

  explicit Transform(const Tile& tile)
      : bias(static_cast<const A*>(tile.bias)),
        scale(tile.scale),
        softcap(tile.softcap),
        temperature(tile.temperature) {}

  Vec<A> raw(Vec<A> x, int64_t column, int64_t count) const {
    if (!kPlain && bias != nullptr) {
      x += count == kLanes<A> ? load(bias + column) : load_part(bias + column, count, A(0));
    }
    return scale == 1 ? x : x * scale;
  }
  Vec<A> divided(Vec<A> x) const { return temperature == 1 ? x : x / temperature; }

  Vec<A> operator()(Vec<A> x, int64_t column, int64_t count) const {
    x = raw(x, column, count);
    return divided(kPlain || softcap == 0 ? x : softcap * tanh(x / softcap));
  }
  // z of a column and cap' of it.
  Vec<A> operator()(Vec<A> x, int64_t column, int64_t count, Vec<A>* cap_grad) const {
    x = raw(x, column, count);
    *cap_grad = broadcast(A(1));
    if (!kPlain && softcap != 0) {
      const Vec<A> t = tanh(x / softcap);
      *cap_grad = 1 - t * t;
      x = softcap * t;
    }
    return divided(x);
  }
};

// body(column, count) over [begin, end) in vectors; count is below kLanes in the last one only, so
// that after inlining the other iterations carry no trace of it.
template <typename A, typename Body>
inline void sweep(int64_t begin, int64_t end, const Body& body) {
  int64_t column = begin;
  for (; column + kLanes<A> <= end; column += kLanes<A>) body(column, int64_t(kLanes<A>));
  if (column < end) body(column, end - column);
}

template <typename T>
inline Vec<Acc<T>> load_columns(const T* row, int64_t column, int64_t count) {
  return count == kLanes<Acc<T>> ? load(row + column) : load_part(row + column, count, Acc<T>(0));
}

template <typename O>
inline void store_columns(O* row, int64_t column, int64_t count, Vec<Acc<O>> x) {
  if (count == kLanes<Acc<O>>) {
    store(row + column, x);
  } else {
    store_part(row + column, x, count);
  }
}

// Lanes past `count` become `fill`.
template <typename A>
inline void blank(Vec<A>& x, int64_t count, A fill) {
  for (int64_t k = count; k < kLanes<A>; ++k) x[k] = fill;
}

template <typename O>
inline void zero_row(O* row, int64_t v) {
  std::memset(row, 0, v * sizeof(O));  // all-zero bits are zero in every type
}

// body(std::true_type) for a tile without bias and soft-cap, body(std::false_type) otherwise.
template <typename Body>
void with_plain(const Tile& tile, const Body& body) {
  if (tile.bias == nullptr && tile.softcap == 0) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

}  // namespace fastpo::cpu::FASTPO_ISA
