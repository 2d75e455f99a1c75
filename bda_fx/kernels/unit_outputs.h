// Outputs from the tiles of a unit for matrices: y = sums + spread(x_B) + b, rounded once.
//
// The CPU's vectors do this for one tile, some rows at each step, while the unit computes the next
// one. It takes no longer than that if little is left to decide at each row: how basis features meet
// the outputs of a tile is a template parameter, and what all of its rows need is kept in registers.

#pragma once

#include "matrix_tile.h"
#include "register_tile.h"

#include <algorithm>
#include <cstdint>

namespace bda_fx::unit {

constexpr int VECTORS = COLUMNS / LANES; // of outputs of a row

// How the vectors of a row are given basis features: none of them, each all of its lanes by
// consecutive ones, each some lanes by consecutive ones, or otherwise, or there are fewer outputs.
enum class Spread { NONE, ALL, SOME, OTHER };

// What is added to the sums of the columns of a tile.
struct Column {
  Addends<VECTORS> added;
  Spread spread;

  explicit Column(const Addends<VECTORS>& addends) : added(addends), spread(of(addends)) {}

 private:
  static Spread of(const Addends<VECTORS>& added) {
    bool none = true, all = true;
    if (added.count < COLUMNS) return Spread::OTHER;
    for (const auto& given : added.given) {
      if (given.size() > 1) return Spread::OTHER;
      none = none && given.empty();
      all = all && !given.empty() && given[0].lanes == ALL_LANES;
    }
    return none ? Spread::NONE : all ? Spread::ALL : Spread::SOME;
  }
};

// A tile of ``rows``: their sums, and where their outputs go.
template <typename T, typename B>
struct Tile {
  float* sums = nullptr; // [rows, COLUMNS]
  const Column* column = nullptr;
  Matrix<const B> features{};
  Matrix<T> y{};
  int64_t rows = 0;
};

// Finishes the rows of a tile, in order.
template <Spread SPREAD, typename T, typename B>
class Finish {
 public:
  C10_ALWAYS_INLINE explicit Finish(const Tile<T, B>& tile)
      : column_(tile.column), sums_(tile.sums), features_(tile.features), y_(tile.y),
        left_(tile.rows) {
    if (left_ == 0 || SPREAD == Spread::OTHER) return;
    BDA_FX_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      bias_[v] = Wide::loadu(column_->added.bias.data() + v * LANES);
      if (!column_->added.given[v].empty()) given_[v] = column_->added.given[v][0];
    }
  }

  // The next ``count`` rows, or what is left of them.
  C10_ALWAYS_INLINE void rows(int64_t count) {
    count = std::min(count, left_);
    left_ -= count;
    for (; count > 0; --count) {
      if constexpr (SPREAD == Spread::OTHER) {
        Sums<1, VECTORS> sums;
        load(Matrix<const float>{sums_, COLUMNS}, sums);
        add_bias<1, VECTORS>(sums, column_->added);
        finish<1, VECTORS>(sums, column_->added, features_, y_);
      } else {
        BDA_FX_UNROLL
        for (int v = 0; v < VECTORS; v += 2) {
          narrow<T>(vector(v), vector(v + 1)).store(y_.data + v * LANES);
        }
      }
      sums_ += COLUMNS;
      features_ = features_.from(1);
      y_ = y_.from(1);
    }
  }

 private:
  C10_ALWAYS_INLINE Wide vector(int v) const {
    const Wide sum = Wide::loadu(sums_ + v * LANES) + bias_[v];
    const auto [first, lanes] = given_[v];
    if constexpr (SPREAD == Spread::ALL) return sum + whole(features_.data + first);
    if constexpr (SPREAD == Spread::SOME) return sum + masked(features_.data + first, lanes);
    return sum;
  }

  const Column* column_;
  const float* sums_;
  Matrix<const B> features_;
  Matrix<T> y_;
  int64_t left_;
  Wide bias_[VECTORS];
  Given given_[VECTORS] = {};
};

} // namespace bda_fx::unit
