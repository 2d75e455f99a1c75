// A decomposed projection on CPUs: y = x_R Cᵀ + spread(x_B) + b, from one read of x.
//
//   x [tokens, E], any strides     packed C: panels of W output features, [panels, K, W] or,
//   y [tokens, F], contiguous      in pairs of K for 16-bit dot products, [panels, K / 2, W, 2]
//
// For each block of tokens: x_R and x_B are packed into rows, both from one read of x (the features of
// an ascending order by permutations, a vector at a time), unless they can be read in place: in
// float32 x_R always can if features are one after the other, as its factors are read one by one.
// For each panel: a few rows of x_R at a time are multiplied by it into registers, to which
// spread(x_B) + b is added before they are rounded once into y (``register_tile.h``). Threads share
// tokens × panels. Scratch memory belongs to the thread and is kept, so that a call allocates its
// result alone.
//
// A CPU with a unit for matrices of bfloat16 multiplies many tokens by that, 32 at a time
// (``matrix_tile.h``), while vectors finish what it multiplied (``unit_outputs.h``), and other 16-bit
// matrices that it has a unit for by oneDNN's brgemm. Where coefficients were packed for instructions
// that this CPU lacks, blocks are multiplied in float32. All index arithmetic is in int64.

#pragma once

#include "brgemm.h"
#include "features.h"
#include "matrix_tile.h"
#include "register_tile.h"
#include "threads.h"
#include "unit_outputs.h"

#include <ATen/Context.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include <unistd.h>

namespace bda_fx {

constexpr int64_t PANEL = std::max<int64_t>(WIDTH, 16); // outputs of a panel: as wide as a tile
constexpr int64_t TOKENS = 384; // of a block: more would not reuse its panels much better
constexpr int64_t FEWEST_TOKENS = 48; // of a block that is made smaller for the sake of threads
static_assert(PANEL % WIDTH == 0 && TOKENS % ROWS == 0);

constexpr int64_t PAGE = 4096; // bytes of a page of memory, at least

// Bytes of an L2 cache. Where the system does not tell: as many as common ones have.
inline int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (told > 0) return told;
#endif
  return 1 << 20;
}

// Products that are summed before they are added to what is there: sums of float32 are as near to
// float64 as ATen's then; rounding to 16 bits hides their errors anyway.
template <typename T>
constexpr int64_t RUN = sizeof(T) == 4 ? 128 : 512;

// One call: x of type T, multiplied in the type P of the packed coefficients.
template <typename T, typename P>
class Projection {
  // Whether rows of x, which become float32 anyway, become so first: only that can be permuted.
  static constexpr bool WIDENS = !std::is_same_v<T, float> && std::is_same_v<P, float> &&
      Shuffle<float>::EXISTS && !Shuffle<T>::EXISTS;

  // Whether factors are read from x wherever they lie: single ones can be, pairs cannot.
  static constexpr bool LISTS = std::is_same_v<T, float>;

  using B = std::conditional_t<READS<T> && !WIDENS, T, float>; // of x_B when it is added
  using S = std::conditional_t<WIDENS, float, T>; // of rows when they are split
  using Tile = unit::Tile<T, B>;

  // Tokens from which on it pays to prepare shuffles.
  static constexpr int64_t MANY = 32;
  static constexpr int AT_ONCE = 8; // rows that are shuffled

 public:
  Projection(
      const at::Tensor& x,
      const at::Tensor& packed,
      const Features& basis,
      const Features& rest,
      const T* bias,
      at::IntArrayRef slots,
      at::Tensor& y)
      : x_(x.const_data_ptr<T>()),
        width_(x.size(-1)),
        stride_(x.stride(-1)),
        rows_(x),
        packed_(packed.const_data_ptr<P>()),
        basis_(basis),
        rest_(rest),
        bias_(bias),
        y_{y.mutable_data_ptr<T>(), y.size(-1)},
        tokens_(y.numel() / y.size(-1)),
        pairs_(packed.dim() == 4),
        depth_(pairs_ ? 2 * packed.size(1) : packed.size(1)),
        inner_(pairs_ ? rest.count() + rest.count() % 2 : depth_),
        panel_(packed.size(2)),
        period_(slots.size()),
        unit_(has_unit()),
        brgemm_(
            !MULTIPLIES<P> && !unit_ && at::globalContext().userEnabledMkldnn() &&
            has_brgemm<P>()) {
    for (int64_t begin = 0, end = 0; begin < period_; begin = end) {
      end = begin + 1;
      if (slots[begin] < 0) continue;
      while (end < period_ && slots[end] == slots[begin] + end - begin) ++end;
      stretches_.push_back({begin, end, slots[begin]});
    }
    run_ = round_up<P>(at::divup(inner_, std::max<int64_t>(at::divup(inner_, RUN<P>), 1)));
    // Shuffled rows are written a vector at a time; lines of their own keep threads apart.
    rest_stride_ = round_up<P>(depth_) + lanes<P>();
    basis_stride_ = round_up<B>(basis_.count()) + lanes<B>();
    step_ = rows_.step(width_);
    if (stride_ == 1 && step_ >= width_) {
      rest_in_place_ = std::is_same_v<T, P> && (unit_ ? depth_ : inner_) == rest_.count() &&
          (rest_.consecutive() || (LISTS && rest_.list() != nullptr));
      if (unit_ && !in_lines(x_ + rest_.first(), step_)) rest_in_place_ = false;
      basis_in_place_ = std::is_same_v<T, B> && basis_.consecutive();
      if (rest_in_place_) rest_stride_ = step_;
      if (basis_in_place_) basis_stride_ = step_;
    }
    block_ = tokens_of_blocks();
    if (stride_ == 1 && tokens_ >= MANY) {
      if (!rest_in_place_) rest_shuffle_.prepare(rest, width_);
      if (!basis_in_place_) basis_shuffle_.prepare(basis, width_);
    }
  }

  void run() {
    const int64_t panels = this->panels();
    const int64_t blocks = at::divup(tokens_, block_);
    share(blocks * panels, [&](int64_t begin, int64_t end) {
      if (unit_) return run_unit(begin, end);
      int64_t gathered = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / panels, panel = task % panels;
        if (gathered != block) gather(block);
        gathered = block;
        multiply(block, panel, panel + 1 == panels && task + 1 < end);
      }
      if (brgemm_) blas::brgemm_release(true);
    });
  }

 private:
  struct Stretch {
    int64_t begin, end, slot; // of the outputs of a head
  };

  bool has_unit() const {
    const bool packed = panel_ % unit::COLUMNS == 0 && depth_ % unit::DEPTH == 0 && inner_ > 0;
    return TILES<P> && packed && (!MULTIPLIES<P> || tokens_ > unit::FEW) && unit::exists();
  }

  // Whether rows begin with a cache line: a unit for matrices takes three times as long to load rows
  // that cross lines.
  static bool in_lines(const T* rows, int64_t stride) {
    return reinterpret_cast<uintptr_t>(rows) % ALIGN == 0 && stride % lanes<T>() == 0;
  }

  // Tokens of a block, at most: what is read of them lies in an L2 cache, or, if a unit for matrices has
  // all panels there, in an L1 cache.
  int64_t most_tokens() const {
    const int64_t row = (rest_in_place_ ? width_ * sizeof(T) : rest_stride_ * sizeof(P)) +
        (basis_in_place_ ? 0 : basis_stride_ * sizeof(B));
    const int64_t most = l2_bytes() / 3 / row;
    if (!unit_) return std::clamp<int64_t>(most / ROWS * ROWS, ROWS, TOKENS);
    const bool all = together() == panels();
    return all ? unit::ROWS : std::max(most / unit::ROWS * unit::ROWS, unit::ROWS);
  }

  // Tokens of all blocks but the last: about the same in each, and so many blocks that threads have as
  // many tasks each, as long as blocks do not become small.
  int64_t tokens_of_blocks() const {
    const int64_t tile = unit_ ? unit::ROWS : ROWS, most = most_tokens();
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t even = threads / std::gcd(threads, panels()); // divides the blocks then
    int64_t blocks = at::divup(tokens_, most);
    const int64_t more = at::divup(blocks, even) * even;
    if (tokens_ / more >= FEWEST_TOKENS) blocks = more;
    return at::divup(at::divup(tokens_, blocks), tile) * tile;
  }

  template <typename U>
  static int64_t round_up(int64_t count) {
    return at::divup(count, lanes<U>()) * lanes<U>();
  }

  int64_t panels() const { return at::divup(outputs(), panel_); }

  // Panels that a unit for matrices has in an L2 cache: parts of them all, of nearly the same size.
  int64_t together() const {
    const int64_t bytes = depth_ * panel_ * sizeof(P);
    return at::divup(panels(), at::divup(panels() * bytes, l2_bytes() * 3 / 8));
  }

  int64_t outputs() const { return y_.stride; } // as y is contiguous

  int64_t tokens_of(int64_t block) const { return std::min(block_, tokens_ - block * block_); }

  // Rows of x_R and of x_B for a block of tokens: x itself, or what ``gather`` packed.
  Matrix<const P> rest(int64_t block) const {
    if constexpr (std::is_same_v<T, P>) {
      if (rest_in_place_) return {x_ + rows_.offset(block * block_) + rest_.first(), rest_stride_};
    }
    return rest_buffer();
  }

  Matrix<const B> basis(int64_t block) const {
    if constexpr (std::is_same_v<T, B>) {
      if (basis_in_place_) {
        return {x_ + rows_.offset(block * block_) + basis_.first(), basis_stride_};
      }
    }
    return basis_buffer(block);
  }

  Matrix<P> rest_buffer() const {
    return {buffers().rest.get<P>(block_ * rest_stride_), rest_stride_};
  }

  Matrix<B> basis_buffer(int64_t block) const {
    // A unit for matrices still reads those of the block before.
    const int64_t other = unit_ ? block % 2 * block_ * basis_stride_ : 0;
    return {buffers().basis.get<B>((1 + unit_) * block_ * basis_stride_) + other, basis_stride_};
  }

  // x_R and x_B of a block of tokens, to the buffers of this thread.
  void gather(int64_t block) const {
    if (rest_in_place_ && (basis_in_place_ || basis_.count() == 0)) return;
    // Some rows at a time, while they are in the L1 cache.
    const int64_t some = step_ > 0 ? AT_ONCE : 1;
    for (int64_t m = 0; m < tokens_of(block); m += some) {
      const int64_t count = std::min(some, tokens_of(block) - m);
      const Matrix<const T> rows{x_ + rows_.offset(block * block_ + m), step_};
      if (WIDENS && (!rest_shuffle_.empty() || !basis_shuffle_.empty())) {
        const Matrix<float> wide{buffers().wide.get<float>(some * width_), width_};
        for (int64_t i = 0; i < count; ++i) at::vec::convert(rows.row(i), wide.row(i), width_);
        split(Matrix<const float>{wide.data, width_}, block, m, count, 1);
      } else {
        split(rows, block, m, count, stride_);
      }
    }
  }

  // x_R and x_B of ``count`` tokens, the ``first`` of a block and those after it, unless in place.
  template <typename V>
  void split(
      Matrix<const V> rows, int64_t block, int64_t first, int64_t count, int64_t stride) const {
    if (!rest_in_place_) {
      const Matrix<P> rest = rest_buffer().from(first);
      pick(rest_, rest_shuffle_, rows, count, stride, rest);
      // Coefficients are padded with zeros, which must not meet an infinity.
      for (int64_t m = 0; m < count && depth_ > rest_.count(); ++m) {
        std::fill(rest.row(m) + rest_.count(), rest.row(m) + depth_, P(0));
      }
    }
    if (!basis_in_place_) {
      pick(basis_, basis_shuffle_, rows, count, stride, basis_buffer(block).from(first));
    }
  }

  template <typename V, typename U>
  void pick(
      const Features& features, const Shuffle<S>& shuffle, Matrix<const V> rows, int64_t count,
      int64_t stride, Matrix<U> to) const {
    if constexpr (!std::is_same_v<V, U>) {
      const bool direct = stride == 1 && features.consecutive();
      V* picked = direct ? nullptr : buffers().row.get<V>(round_up<V>(width_) + lanes<V>());
      for (int64_t m = 0; m < count; ++m) {
        if (!direct) pick(features, shuffle, rows.from(m), 1, stride, Matrix<V>{picked, 0});
        const V* from = direct ? rows.row(m) + features.first() : picked;
        at::vec::convert(from, to.row(m), features.count());
      }
    } else {
      int64_t m = 0;
      if constexpr (std::is_same_v<V, S>) {
        if (!shuffle.empty()) {
          for (; m + AT_ONCE <= count; m += AT_ONCE) {
            shuffle.template pick<AT_ONCE>(rows.from(m), to.from(m));
          }
          for (; m < count; ++m) shuffle.template pick<1>(rows.from(m), to.from(m));
        }
      }
      for (; m < count; ++m) features.pick(rows.row(m), stride, to.row(m));
    }
  }

  // What is added to ``count`` outputs from ``first`` on, up to N vectors of them.
  template <int N>
  Addends<N> addends(int64_t first, int64_t count) const {
    Addends<N> added{count};
    if (bias_ != nullptr) at::vec::convert(bias_ + first, added.bias.data(), count);
    for (int64_t head = first / period_ * period_; head < first + count; head += period_) {
      for (const Stretch& stretch : stretches_) {
        const int64_t begin = std::max(head + stretch.begin - first, int64_t{0});
        const int64_t end = std::min(head + stretch.end - first, count);
        if (begin < end) added.give(begin, end, stretch.slot + first + begin - head - stretch.begin);
      }
    }
    return added;
  }

  // The outputs of one panel for one block of tokens, from what was gathered. ``next``: this
  // thread goes on to the next block.
  void multiply(int64_t block, int64_t panel, bool next) const {
    const Matrix<const P> a = rest(block);
    const Matrix<const P> factors{packed_ + panel * depth_ * panel_, panel_};
    const int64_t m = tokens_of(block);
    if constexpr (MULTIPLIES<P>) {
      const auto from = [&](auto places) {
        finish_panel(block, panel, [&](int64_t at, int64_t i, auto& sums) {
          if (next && at == 0) fetch_x(block + 1, i);
          const Matrix<const P> columns = factors.columns(pairs_ ? 2 * at : at);
          multiply_tile(a.from(i), places, columns, inner_, run_, sums);
        });
      };
      if constexpr (LISTS) {
        if (rest_in_place_ && rest_.list() != nullptr) return from(Listed{rest_.list()});
      }
      from(InOrder());
    } else if (brgemm_ && inner_ > 0) {
      const Matrix<float> products{buffers().sums.get<float>(block_ * panel_), panel_};
      for (int64_t k = 0; k < inner_; k += run_) {
        blas::brgemm(
            m, panel_, std::min(run_, inner_ - k), a.stride, panel_, panel_, k > 0, a.data + k,
            factors.row(k), products.data, true);
      }
      finish_panel(block, panel, [&](int64_t at, int64_t i, auto& sums) {
        load(Matrix<const float>{products.row(i) + at, panel_}, sums);
      });
    } else { // no products, packed for another CPU, or oneDNN was switched off since
      float* wide = buffers().panel.get<float>(m * rest_stride_ + inner_ * panel_);
      const Matrix<const float> left{wide, rest_stride_}, right{wide + m * rest_stride_, panel_};
      for (int64_t i = 0; i < m; ++i, wide += rest_stride_) at::vec::convert(a.row(i), wide, inner_);
      for (int64_t k = 0; k < inner_; ++k, wide += panel_) {
        for (int64_t j = 0; j < panel_; ++j) {
          wide[j] = static_cast<float>(factors.row(k / 2 * 2)[2 * j + k % 2]);
        }
      }
      finish_panel(block, panel, [&](int64_t at, int64_t i, auto& sums) {
        multiply_tile(left.from(i), InOrder(), right.columns(at), inner_, run_, sums);
      });
    }
  }

  // What a thread has while a unit for matrices works for it.
  struct Session {
    int64_t low; // the first of its outputs
    bool all_together; // all panels are in the L2 cache
    std::vector<unit::Column> columns;
    float *sums, *others; // of a tile, and of the one before
    unit::Configured unit;
    Tile before;
  };

  // The outputs of the tasks [begin, end), of each a panel for a block of tokens, by a unit for
  // matrices. While the sums of a tile are computed, the tile before it is finished. As many panels as
  // stay in an L2 cache meet some tokens, which stay in the L1 cache, one after the other, so that
  // rows of y are written from left to right.
  void run_unit(int64_t begin, int64_t end) const {
    const int64_t all = panels();
    const bool some = begin / all == (end - 1) / all; // of the panels, for one block
    const int64_t low = some ? begin % all * panel_ : 0;
    const int64_t high = some ? (end - 1) % all * panel_ + panel_ : outputs();
    float* sums = buffers().sums.get<float>(2 * unit::ROWS * unit::COLUMNS);
    const int64_t together = this->together();
    Session session{
        low, together == all, columns_of(low, std::min(high, outputs())), sums,
        sums + unit::ROWS * unit::COLUMNS};
    while (begin < end) {
      const int64_t block = begin / all, first = begin % all;
      const int64_t after = std::min(all, first + end - begin);
      gather(block);
      for (int64_t panel = first; panel < after; panel += together) {
        const int64_t next = std::min(panel + together, after);
        for (int64_t i = 0; i < tokens_of(block); i += unit::ROWS) {
          run_strip(block, i, panel * panel_, std::min(next * panel_, outputs()), session);
        }
      }
      begin += after - first;
    }
    const Tile& last = session.before;
    unit::Finish<unit::Spread::OTHER, T, B>(last).rows(last.rows);
  }

  // The outputs [left, right) of some tokens, from the i-th of a block on, but for their last tile.
  void run_strip(int64_t block, int64_t i, int64_t left, int64_t right, Session& session) const {
    const Matrix<const P> rows = rest(block).from(i);
    const Matrix<const B> features = basis(block).from(i);
    const Matrix<T> y = y_.from(block * block_ + i);
    const int64_t count = std::min(tokens_of(block) - i, unit::ROWS);
    session.unit.set(count);
    // With each tile, pages of some of the rows of y that follow are found.
    const bool last = i + unit::ROWS >= tokens_of(block) && !session.all_together;
    const int64_t left_of_y = tokens_ - block * block_ - i - unit::ROWS;
    int64_t unknown = last ? 0 : std::clamp<int64_t>(left_of_y, 0, unit::ROWS);
    T* next = y.row(unit::ROWS) + left;
    const int64_t share = at::divup(unit::ROWS * unit::COLUMNS, right - left);
    for (int64_t at = left; at < right; at += unit::COLUMNS) {
      for (int64_t n = share; n > 0 && unknown > 0; --n, --unknown, next += y_.stride) {
        find_pages(next, right - left);
      }
      const unit::Column& column = session.columns[(at - session.low) / unit::COLUMNS];
      const Tile tile{session.sums, &column, features, y.columns(at), count};
      compute_tile(rows, at, tile, session.before);
      std::swap(session.sums, session.others);
      session.before = tile;
    }
  }

  // Has the CPU look up where pages of memory are: it takes as long as a tile does where no TLB tells.
  static void find_pages(const T* from, int64_t count) {
    const char* at = reinterpret_cast<const char*>(from);
    const char* last = reinterpret_cast<const char*>(from + count) - 1;
    for (; at < last; at += PAGE) __builtin_prefetch(at, 1, 3);
    __builtin_prefetch(last, 1, 3);
  }

  // What is added to the outputs [low, high), by the columns of a tile.
  std::vector<unit::Column> columns_of(int64_t low, int64_t high) const {
    std::vector<unit::Column> columns;
    columns.reserve((high - low + unit::COLUMNS - 1) / unit::COLUMNS);
    for (int64_t at = low; at < high; at += unit::COLUMNS) {
      columns.emplace_back(addends<unit::VECTORS>(at, std::min(high - at, unit::COLUMNS)));
    }
    return columns;
  }

  // The sums of a tile from its rows of x_R and the panel that holds its outputs, from ``at`` on.
  void compute_tile(
      Matrix<const P> rows, int64_t at, const Tile& tile, const Tile& before) const {
    using unit::Spread;
    const P* panel = packed_ + at / panel_ * depth_ * panel_;
    const Matrix<const P> columns{panel + 2 * (at % panel_), 2 * panel_};
    const auto by = [&](auto spread) {
      if (tile.rows > unit::SIZE) {
        compute_tile<true, spread()>(rows, columns, tile, before);
      } else {
        compute_tile<false, spread()>(rows, columns, tile, before);
      }
    };
    switch (before.rows > 0 ? before.column->spread : Spread::NONE) {
      case Spread::NONE: return by(std::integral_constant<Spread, Spread::NONE>());
      case Spread::ALL: return by(std::integral_constant<Spread, Spread::ALL>());
      case Spread::SOME: return by(std::integral_constant<Spread, Spread::SOME>());
      case Spread::OTHER: return by(std::integral_constant<Spread, Spread::OTHER>());
    }
  }

  // The same; meanwhile its lines of y come to the cache, and the tile before it is finished.
  // BOTH: it has more than half of its rows.
  template <bool BOTH, unit::Spread SPREAD>
  void compute_tile(
      Matrix<const P> rows, Matrix<const P> columns, const Tile& tile, const Tile& before) const {
    if constexpr (TILES<P>) {
      const int64_t most = at::divup(unit::ROWS, depth_ / unit::DEPTH); // rows at a step
      int64_t ahead = tile.rows;
      Matrix<T> line = tile.y;
      unit::Finish<SPREAD, T, B> finish(before);
      const auto meanwhile = [&]() __attribute__((always_inline)) {
        const int64_t count = std::min(most, ahead);
        fetch<true>(line, count, ALIGN);
        line = line.from(count);
        ahead -= count;
        finish.rows(most);
      };
      unit::multiply_tile<BOTH>({rows, columns, depth_}, {tile.sums, unit::COLUMNS}, meanwhile);
    }
  }

  // The outputs of one panel for one block of tokens: tiles of them, whose sums are
  // set by compute(first column, first row, sums).
  template <typename Compute>
  void finish_panel(int64_t block, int64_t panel, const Compute& compute) const {
    const int64_t first = panel * panel_, count = std::min(panel_, outputs() - first);
    const Matrix<T> y = y_.from(block * block_).columns(first);
    const Matrix<const B> features = basis(block);
    for (int64_t at = 0; at < count; at += WIDTH) {
      const auto added = addends<VECTORS>(first + at, std::min(WIDTH, count - at));
      const auto column = [&](auto vectors) {
        by_rows(tokens_of(block), [&](int64_t i, auto rows) {
          const Matrix<T> to = y.from(i).columns(at);
          fetch<true>(to, rows(), added.count * sizeof(T));
          Sums<rows(), vectors()> sums;
          compute(at, i, sums);
          add_bias<rows(), vectors()>(sums, added);
          finish<rows(), vectors()>(sums, added, features.from(i), to);
        });
      };
      if (added.count <= LANES) {
        column(std::integral_constant<int, 1>());
      } else if (added.count <= 2 * LANES) {
        column(std::integral_constant<int, 2>());
      } else {
        column(std::integral_constant<int, VECTORS>());
      }
    }
  }

  // Have the rows of x from the i-th token of a block on, as many as a tile has, come to the cache.
  void fetch_x(int64_t block, int64_t i) const {
    if (step_ == 0 || stride_ != 1) return;
    const Matrix<const T> rows{x_ + rows_.offset(block * block_), step_};
    const int64_t count = std::min<int64_t>(tokens_of(block) - i, ROWS);
    fetch<false>(rows.from(i), count, width_ * sizeof(T));
  }

  const T* x_;
  int64_t width_; // features of x
  int64_t stride_; // from one of them to the next
  Rows rows_;
  int64_t step_ = 0; // from one token of x to the next, 0 if it varies
  const P* packed_;
  const Features& basis_;
  const Features& rest_;
  Shuffle<S> rest_shuffle_, basis_shuffle_; // empty if they are picked in another way
  const T* bias_;
  Matrix<T> y_;
  int64_t tokens_;
  bool pairs_;
  int64_t depth_; // rows of a panel, with those that are zeros
  int64_t inner_; // that are multiplied: E - r, made even for pairs
  int64_t panel_; // its outputs
  int64_t period_; // outputs of a head
  c10::SmallVector<Stretch, 4> stretches_; // of these that are given consecutive basis features
  bool unit_, brgemm_;
  bool rest_in_place_ = false, basis_in_place_ = false; // read from x where it is
  int64_t run_ = 1; // products that are summed before they are added to what is there
  int64_t block_ = 1; // tokens
  int64_t rest_stride_ = 0, basis_stride_ = 0;
};

} // namespace bda_fx
