// A block's walk over the columns of a row: 16 bytes per access where addresses allow, several
// independent accesses in flight, every column visited once and by one thread.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dtype.h"
#include "port/port.h"

namespace fastpo {

// The columns one thread visits in one step: kPacks runs of kItems neighbours.
template <int kPacks_, int kItems_>
struct Columns {
  static constexpr int kPacks = kPacks_;
  static constexpr int kItems = kItems_;
  int64_t first;

  FASTPO_DEVICE int64_t at(int pack) const {
    return first + pack * (int64_t{kBlockThreads} * kItems);
  }
};

// Their values.
template <typename Acc, typename C>
struct Lanes {
  Acc x[C::kPacks][C::kItems];

  // f(value reference, column) for every lane, columns ascending.
  template <typename F>
  FASTPO_DEVICE void for_each(C columns, F f) {
#pragma unroll
    for (int pack = 0; pack < C::kPacks; ++pack) {
#pragma unroll
      for (int item = 0; item < C::kItems; ++item) f(x[pack][item], columns.at(pack) + item);
    }
  }

  // f(value reference, that of other, column) for every lane.
  template <typename F>
  FASTPO_DEVICE void for_each_with(Lanes& other, C columns, F f) {
#pragma unroll
    for (int pack = 0; pack < C::kPacks; ++pack) {
#pragma unroll
      for (int item = 0; item < C::kItems; ++item) {
        f(x[pack][item], other.x[pack][item], columns.at(pack) + item);
      }
    }
  }

  // x = f(x, other) lane by lane.
  template <typename F>
  FASTPO_DEVICE void combine(const Lanes& other, F f) {
#pragma unroll
    for (int pack = 0; pack < C::kPacks; ++pack) {
#pragma unroll
      for (int item = 0; item < C::kItems; ++item) {
        x[pack][item] = f(x[pack][item], other.x[pack][item]);
      }
    }
  }
  FASTPO_DEVICE void multiply(const Lanes& other) {
    combine(other, [](Acc a, Acc b) { return a * b; });
  }
};

template <typename T, typename C>
FASTPO_DEVICE Lanes<acc_t<T>, C> load(const T* row, C columns, Site site = Site::here()) {
  Lanes<acc_t<T>, C> lanes;
  if constexpr (C::kItems == 1) {
    lanes.x[0][0] = to_acc(row[columns.first]);
  } else {
    constexpr int kPerVec = 16 / sizeof(T);
    constexpr int kVecs = C::kItems / kPerVec;
    Vec16<T> vecs[C::kPacks][kVecs];
#pragma unroll
    for (int pack = 0; pack < C::kPacks; ++pack) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        vecs[pack][i] = load_vec16(row + columns.at(pack) + i * kPerVec, site);
      }
    }
#pragma unroll
    for (int pack = 0; pack < C::kPacks; ++pack) {
#pragma unroll
      for (int i = 0; i < C::kItems; ++i) {
        lanes.x[pack][i] = to_acc(vecs[pack][i / kPerVec].lane[i % kPerVec]);
      }
    }
  }
  return lanes;
}

template <typename T, typename Acc, typename C>
FASTPO_DEVICE void store(T* row, C columns, const Lanes<Acc, C>& lanes, Site site = Site::here()) {
  static_assert(std::is_same_v<Acc, acc_t<T>>);
  if constexpr (C::kItems == 1) {
    row[columns.first] = from_acc<T>(lanes.x[0][0]);
  } else {
    constexpr int kPerVec = 16 / sizeof(T);
#pragma unroll
    for (int pack = 0; pack < C::kPacks; ++pack) {
#pragma unroll
      for (int i = 0; i < C::kItems; i += kPerVec) {
        Vec16<T> vec;
#pragma unroll
        for (int j = 0; j < kPerVec; ++j) vec.lane[j] = from_acc<T>(lanes.x[pack][i + j]);
        store_vec16(row + columns.at(pack) + i, vec, site);
      }
    }
  }
}

// The first column at which all rows are 16-byte aligned, or v if there is none.
template <int kItems, typename... T>
FASTPO_DEVICE int64_t aligned_column(int64_t v, const T*... rows) {
#pragma unroll
  for (int column = 0; column < kItems; ++column) {
    const uintptr_t bits = (reinterpret_cast<uintptr_t>(rows + column) | ...);
    if (bits % 16 == 0) return column < v ? column : v;
  }
  return v;
}

// Neighbours that fill 16 bytes of the smallest type.
template <typename... T>
constexpr int kVecItems = 16 / std::min({sizeof(T)...});

// visit(Columns) over [0, v), up to kMaxPacks runs at once; the visitor may pass `rows` and those
// columns to load and store. Rows whose addresses never align together go one element at a time.
// The loops are not unrolled further: the body is long, and has its loads in flight already.
template <int kMaxPacks = 4, typename Visit, typename... T>
FASTPO_DEVICE void sweep_columns(int64_t v, Visit visit, const T*... rows) {
  constexpr int kItems = kVecItems<T...>;
  constexpr int kPacks = kMaxPacks * kItems > 16 ? 16 / kItems : kMaxPacks;
  constexpr int64_t kStep = int64_t{kBlockThreads} * kItems;
  const int64_t head = aligned_column<kItems>(v, rows...);
  const int64_t end = head + (v - head) / kItems * kItems;

  int64_t column = head + int64_t{thread_index()} * kItems;
  if constexpr (kPacks > 1) {
#pragma unroll 1
    for (; column + (kPacks - 1) * kStep < end; column += kPacks * kStep) {
      visit(Columns<kPacks, kItems>{column});
    }
  }
#pragma unroll 1
  for (; column < end; column += kStep) visit(Columns<1, kItems>{column});
  // Both ends of the row in one loop: what lies before head, then what lies after end.
#pragma unroll 1
  for (int64_t i = thread_index(); i < v - (end - head); i += kBlockThreads) {
    visit(Columns<1, 1>{i < head ? i : i + (end - head)});
  }
}

// Zeros in a row's v columns.
template <typename T>
FASTPO_DEVICE void clear_row(T* row, int64_t v, Site site = Site::here()) {
  sweep_columns(
      v, [&](auto columns) { store(row, columns, Lanes<acc_t<T>, decltype(columns)>{}, site); },
      row);
}

}  // namespace fastpo
