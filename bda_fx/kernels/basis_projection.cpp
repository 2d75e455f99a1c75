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
// A CPU with a unit for 16-bit matrices multiplies these by oneDNN's brgemm, into sums in float32.
// Where coefficients were packed for instructions that this CPU lacks, blocks are multiplied in
// float32. All index arithmetic is in int64.

#include "features.h"
#include "register_tile.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace {

using namespace bda_fx;
namespace blas = at::native::cpublas;

constexpr int64_t PANEL = std::max<int64_t>(WIDTH, 16); // outputs of a panel: as wide as a tile
constexpr int64_t TOKENS = 192; // of a block: a panel from the L2 cache is reused enough
constexpr int64_t BLOCK_BYTES = 256 << 10; // of x_R: with a panel it stays within an L2 cache
static_assert(PANEL % WIDTH == 0 && TOKENS % ROWS == 0);

// Products that are summed before they are added to what is there: sums of float32 are as near to
// float64 as ATen's then; rounding to 16 bits hides their errors anyway.
template <typename T>
constexpr int64_t RUN = sizeof(T) == 4 ? 128 : 512;

// body(begin, end) for parts of 0 … tasks, one for each thread.
template <typename Body>
void share(int64_t tasks, const Body& body) {
#if defined(__SANITIZE_THREAD__)
  // The sanitizer does not see how OpenMP, which is not built with it, starts and joins its threads.
  const int64_t part = (tasks + at::get_num_threads() - 1) / at::get_num_threads();
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < tasks; begin += part) {
    threads.emplace_back([&body, begin, end = std::min(begin + part, tasks)] { body(begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
#else
  at::parallel_for(0, tasks, 1, body);
#endif
}

// -- memory of a thread ---------------------------------------------------------------------------

// A buffer that grows to the largest size asked for.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + ALIGN - 1) / ALIGN * ALIGN;
    if (bytes > size_) {
      data_.reset(std::aligned_alloc(ALIGN, bytes));
      TORCH_CHECK(data_ != nullptr, "basis_projection: no memory for ", bytes, " bytes");
      size_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  std::unique_ptr<void, Free> data_;
  int64_t size_ = 0;
};

struct Buffers {
  Scratch rest, basis, sums, panel, row, wide;
};

Buffers& buffers() {
  static thread_local Buffers own;
  return own;
}

// -- products -------------------------------------------------------------------------------------

// Multiply two small matrices of integers by brgemm, which are exact in every type.
template <typename T>
bool multiplies_pairs() {
  constexpr int64_t m = 2, k = 4, n = 16;
  T a[m * k], b[k * n];
  float c[m * n], expected[m * n];
  for (int64_t i = 0; i < m * k; ++i) a[i] = static_cast<T>(static_cast<float>(i % 5 - 2));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      b[i / 2 * 2 * n + 2 * j + i % 2] = static_cast<T>(static_cast<float>((3 * i + j) % 7 - 3));
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      expected[i * n + j] = 1;
      for (int64_t l = 0; l < k; ++l) {
        expected[i * n + j] += static_cast<float>(a[i * k + l]) * ((3 * l + j) % 7 - 3);
      }
    }
  }
  std::fill_n(c, m * n, 1.0f);
  try {
    blas::brgemm(m, n, k, k, n, n, true, a, b, c, true);
    blas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  return std::equal(c, c + m * n, expected);
}

// Whether brgemm has a kernel for pairs of T here. PyTorch exports no such question, so it is tried;
// where it would fall back to a plain loop, or oneDNN would emulate the type, no.
template <typename T>
bool has_brgemm() {
  static const bool found = [] {
#if !defined(BDA_FX_DOT_BF16)
    if (std::is_same_v<T, at::BFloat16> && !blas::could_pack(at::kBFloat16)) return false;
#endif
    if (std::is_same_v<T, at::Half> && !blas::could_pack(at::kHalf)) return false;
    return multiplies_pairs<T>();
  }();
  return found;
}

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
        inner_(pairs_ ? 2 * packed.size(1) : packed.size(1)),
        panel_(packed.size(2)),
        period_(slots.size()),
        brgemm_(!MULTIPLIES<P> && at::globalContext().userEnabledMkldnn() && has_brgemm<P>()) {
    for (int64_t begin = 0, end = 0; begin < period_; begin = end) {
      end = begin + 1;
      if (slots[begin] < 0) continue;
      while (end < period_ && slots[end] == slots[begin] + end - begin) ++end;
      stretches_.push_back({begin, end, slots[begin]});
    }
    const int64_t row = std::max<int64_t>(inner_, 1) * sizeof(P);
    const int64_t most = std::clamp<int64_t>(BLOCK_BYTES / row / ROWS * ROWS, ROWS, TOKENS);
    const int64_t blocks = (tokens_ + most - 1) / most;
    block_ = ((tokens_ + blocks - 1) / blocks + ROWS - 1) / ROWS * ROWS;
    const int64_t runs = std::max<int64_t>((inner_ + RUN<P> - 1) / RUN<P>, 1);
    run_ = round_up<P>((inner_ + runs - 1) / runs);
    // Shuffled rows are written a vector at a time; lines of their own keep threads apart.
    rest_stride_ = round_up<P>(inner_) + lanes<P>();
    basis_stride_ = round_up<B>(basis_.count()) + lanes<B>();
    step_ = rows_.step(width_);
    if (stride_ == 1 && step_ >= width_) {
      rest_in_place_ = std::is_same_v<T, P> && inner_ == rest_.count() &&
          (rest_.consecutive() || (LISTS && rest_.list() != nullptr));
      basis_in_place_ = std::is_same_v<T, B> && basis_.consecutive();
      if (rest_in_place_) rest_stride_ = step_;
      if (basis_in_place_) basis_stride_ = step_;
    }
    if (stride_ == 1 && tokens_ >= MANY) {
      if (!rest_in_place_) rest_shuffle_.prepare(rest, width_);
      if (!basis_in_place_) basis_shuffle_.prepare(basis, width_);
    }
  }

  void run() {
    const int64_t panels = (outputs() + panel_ - 1) / panel_;
    const int64_t blocks = (tokens_ + block_ - 1) / block_;
    share(blocks * panels, [&](int64_t begin, int64_t end) {
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

  template <typename U>
  static int64_t round_up(int64_t count) {
    return (count + lanes<U>() - 1) / lanes<U>() * lanes<U>();
  }

  int64_t outputs() const { return y_.stride; } // as y is contiguous

  int64_t tokens_of(int64_t block) const { return std::min(block_, tokens_ - block * block_); }

  // Rows of x_R and of x_B for a block of tokens: x itself, or what ``gather`` packed.
  Matrix<const P> rest(int64_t block) const {
    if constexpr (std::is_same_v<T, P>) {
      if (rest_in_place_) return {x_ + rows_.offset(block * block_) + rest_.first(), rest_stride_};
    }
    const Matrix<P> packed = rest_buffer();
    return {packed.data, packed.stride};
  }

  Matrix<const B> basis(int64_t block) const {
    if constexpr (std::is_same_v<T, B>) {
      if (basis_in_place_) {
        return {x_ + rows_.offset(block * block_) + basis_.first(), basis_stride_};
      }
    }
    const Matrix<B> packed = basis_buffer();
    return {packed.data, packed.stride};
  }

  Matrix<P> rest_buffer() const {
    return {buffers().rest.get<P>(block_ * rest_stride_), rest_stride_};
  }

  Matrix<B> basis_buffer() const {
    return {buffers().basis.get<B>(block_ * basis_stride_), basis_stride_};
  }

  // x_R and x_B of a block of tokens, to the buffers of this thread.
  void gather(int64_t block) {
    if (rest_in_place_ && (basis_in_place_ || basis_.count() == 0)) return;
    // Some rows at a time, while they are in the L1 cache.
    const int64_t some = step_ > 0 ? AT_ONCE : 1;
    for (int64_t m = 0; m < tokens_of(block); m += some) {
      const int64_t count = std::min(some, tokens_of(block) - m);
      const Matrix<const T> rows{x_ + rows_.offset(block * block_ + m), step_};
      if (WIDENS && (!rest_shuffle_.empty() || !basis_shuffle_.empty())) {
        const Matrix<float> wide{buffers().wide.get<float>(some * width_), width_};
        for (int64_t i = 0; i < count; ++i) at::vec::convert(rows.row(i), wide.row(i), width_);
        split(Matrix<const float>{wide.data, width_}, m, count, 1);
      } else {
        split(rows, m, count, stride_);
      }
    }
  }

  // x_R and x_B of ``count`` tokens, the ``first`` of a block and those after it, unless in place.
  template <typename V>
  void split(Matrix<const V> rows, int64_t first, int64_t count, int64_t stride) const {
    if (!rest_in_place_) {
      const Matrix<P> rest = rest_buffer().from(first);
      pick(rest_, rest_shuffle_, rows, count, stride, rest);
      // A row of coefficients is padded with zeros, which must not meet an infinity.
      for (int64_t m = 0; m < count && inner_ > rest_.count(); ++m) rest.row(m)[inner_ - 1] = P(0);
    }
    if (!basis_in_place_) {
      pick(basis_, basis_shuffle_, rows, count, stride, basis_buffer().from(first));
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

  // What is added to ``count`` outputs from ``first`` on.
  Addends addends(int64_t first, int64_t count) const {
    Addends added{count};
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
    const Matrix<const P> factors{packed_ + panel * inner_ * panel_, panel_};
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

  // The outputs of one panel for one block of tokens: tiles of them, whose sums are
  // set by compute(first column, first row, sums).
  template <typename Compute>
  void finish_panel(int64_t block, int64_t panel, const Compute& compute) const {
    const int64_t first = panel * panel_, count = std::min(panel_, outputs() - first);
    const Matrix<T> y = y_.from(block * block_).columns(first);
    const Matrix<const B> features = basis(block);
    for (int64_t at = 0; at < count; at += WIDTH) {
      const Addends added = addends(first + at, std::min(WIDTH, count - at));
      const auto column = [&](auto vectors) {
        by_rows(tokens_of(block), [&](int64_t i, auto rows) {
          const Matrix<T> to = y.from(i).columns(at);
          fetch<true>(to, rows(), added.count * sizeof(T));
          Sums<rows(), vectors()> sums;
          compute(at, i, sums);
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
  int64_t inner_; // rows of a panel: E - r, made even for pairs
  int64_t panel_; // its outputs
  int64_t period_; // outputs of a head
  c10::SmallVector<Stretch, 4> stretches_; // of these that are given consecutive basis features
  bool brgemm_;
  bool rest_in_place_ = false, basis_in_place_ = false; // read from x where it is
  int64_t run_ = 1; // products that are summed before they are added to what is there
  int64_t block_ = 1; // tokens
  int64_t rest_stride_ = 0, basis_stride_ = 0;
};

// Whether ``packed`` has the shape of packed coefficients [outputs, inner].
bool packs(const at::Tensor& packed, int64_t outputs, int64_t inner) {
  if ((packed.dim() != 3 && packed.dim() != 4) || !packed.is_contiguous()) return false;
  const bool pairs = packed.dim() == 4;
  const int64_t panel = packed.size(2);
  const bool wide = panel == 16 || panel == 32 || panel == 64; // on whatever machine it was packed
  return wide && packed.size(0) == (outputs + panel - 1) / panel &&
      packed.size(1) == (pairs ? (inner + 1) / 2 : inner) && (!pairs || packed.size(3) == 2);
}

at::Tensor project(
    const at::Tensor& x,
    const at::Tensor& packed,
    const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& bias,
    int64_t start,
    int64_t size,
    at::IntArrayRef slots,
    int64_t out_features) {
  TORCH_CHECK(x.dim() > 0 && x.device().is_cpu(), "basis_projection: x has no features on the CPU");
  const int64_t width = x.size(-1);
  TORCH_CHECK(
      0 <= size && size <= width && 0 <= start && (order || start <= width - size),
      "basis_projection: a basis of ", size, " features from ", start, " on is not within x's ",
      width);
  TORCH_CHECK(
      packs(packed, out_features, width - size),
      "basis_projection: packed coefficients ", packed.sizes(), " are not those of ", out_features,
      " outputs of ", width - size, " features");
  TORCH_CHECK(
      !order || (order->scalar_type() == at::kLong && order->dim() == 1 && order->size(0) == width),
      "basis_projection: order is not int64 [", width, "]");
  TORCH_CHECK(
      !bias || (bias->scalar_type() == x.scalar_type() && bias->dim() == 1 &&
                bias->size(0) == out_features),
      "basis_projection: bias is not ", x.scalar_type(), " [", out_features, "]");
  TORCH_CHECK(!slots.empty(), "basis_projection: no slots");
  for (const int64_t slot : slots) {
    TORCH_CHECK(
        -1 <= slot && slot < size, "basis_projection: slot ", slot, ", expected -1 to ", size - 1);
  }
  c10::DimVector shape(x.sizes());
  shape.back() = out_features;
  at::Tensor y = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (y.numel() == 0) return y;

  const at::Tensor listed = order ? order->contiguous() : at::Tensor();
  const at::Tensor offsets = bias ? bias->contiguous() : at::Tensor();
  const int64_t* list = order ? listed.const_data_ptr<int64_t>() : nullptr;
  const Features basis = order ? Features(list, size, width) : Features(start, start + size, 0, 0);
  const Features rest = order ? Features(list + size, width - size, width)
                              : Features(0, start, start + size, width);
  const auto compute = [&](auto input, auto multiplied) {
    using T = decltype(input);
    using P = decltype(multiplied);
    const T* b = bias ? offsets.const_data_ptr<T>() : nullptr;
    Projection<T, P>(x, packed, basis, rest, b, slots, y).run();
  };
  const at::ScalarType type = x.scalar_type(), multiplied = packed.scalar_type();
  TORCH_CHECK(
      multiplied == at::kFloat || multiplied == type, "basis_projection: coefficients were packed "
      "for ", multiplied, ", x is ", type);
  switch (type) {
    case at::kFloat:
      compute(float(), float());
      break;
    case at::kBFloat16:
      multiplied == type ? compute(at::BFloat16(), at::BFloat16()) : compute(at::BFloat16(), float());
      break;
    case at::kHalf:
      multiplied == type ? compute(at::Half(), at::Half()) : compute(at::Half(), float());
      break;
    default:
      TORCH_CHECK(false, "basis_projection: there is no kernel for ", type);
  }
  return y;
}

// Refuse gradients and go on below autograd: a kernel of its own, as one in Python costs 10 µs a call.
at::Tensor project_without_gradient(
    const at::Tensor& x,
    const at::Tensor& packed,
    const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& bias,
    c10::SymInt start,
    c10::SymInt size,
    at::IntArrayRef slots,
    c10::SymInt out_features) {
  const bool wanted = x.requires_grad() || packed.requires_grad() || (bias && bias->requires_grad());
  TORCH_CHECK(
      !(wanted && at::GradMode::is_enabled()),
      "bda_fx: packed_projection has no gradient; basis_projection, on coefficients that are not "
      "packed, has one");
  static const auto below = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("bda_fx::packed_projection", "")
                                .typed<decltype(project_without_gradient)>();
  const at::AutoDispatchBelowAutograd guard;
  return below.call(x, packed, order, bias, start, size, slots, out_features);
}

// One of two forms of the same projection, by the number of tokens: ``ranges`` are pairs of the first
// and the last number for which it is decomposed.
at::Tensor project_by_tokens(
    const at::Tensor& x,
    const at::Tensor& packed,
    const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& bias,
    int64_t start,
    int64_t size,
    at::IntArrayRef slots,
    int64_t out_features,
    const at::Tensor& dense,
    at::IntArrayRef ranges) {
  TORCH_CHECK(x.dim() > 0 && x.device().is_cpu(), "basis_projection: x has no features on the CPU");
  TORCH_CHECK(ranges.size() % 2 == 0, "basis_projection: ranges are not in pairs");
  TORCH_CHECK(
      dense.dim() == 2 && dense.size(0) == out_features && dense.size(1) == x.size(-1),
      "basis_projection: the dense weight is ", dense.sizes(), ", expected ", out_features, " x ",
      x.size(-1));
  int64_t tokens = 1;
  for (const int64_t count : x.sizes().slice(0, x.dim() - 1)) tokens *= count;
  for (size_t i = 0; i < ranges.size(); i += 2) {
    if (ranges[i] <= tokens && tokens <= ranges[i + 1]) {
      return project(x, packed, order, bias, start, size, slots, out_features);
    }
  }
  return at::linear(x, dense, bias).contiguous();
}

at::Tensor project_by_tokens_without_gradient(
    const at::Tensor& x,
    const at::Tensor& packed,
    const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& bias,
    c10::SymInt start,
    c10::SymInt size,
    at::IntArrayRef slots,
    c10::SymInt out_features,
    const at::Tensor& dense,
    at::IntArrayRef ranges) {
  const bool wanted = x.requires_grad() || packed.requires_grad() || dense.requires_grad() ||
      (bias && bias->requires_grad());
  TORCH_CHECK(
      !(wanted && at::GradMode::is_enabled()),
      "bda_fx: packed_projection_by_tokens has no gradient; basis_projection has one");
  static const auto below = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("bda_fx::packed_projection_by_tokens", "")
                                .typed<decltype(project_by_tokens_without_gradient)>();
  const at::AutoDispatchBelowAutograd guard;
  return below.call(
      x, packed, order, bias, start, size, slots, out_features, dense, ranges);
}

// Whether coefficients of a type are packed as they are, in pairs; else they are in float32.
bool packs_in_pairs(at::ScalarType type) {
  return (type == at::kBFloat16 && (MULTIPLIES<at::BFloat16> || has_brgemm<at::BFloat16>())) ||
      (type == at::kHalf && has_brgemm<at::Half>());
}

} // namespace

TORCH_LIBRARY_FRAGMENT(bda_fx, m) {
  m.def("packs_in_pairs(ScalarType dtype) -> bool", packs_in_pairs);
  m.def("panel_width() -> int", [] { return PANEL; });
}

TORCH_LIBRARY_IMPL(bda_fx, Autograd, m) {
  m.impl("packed_projection", project_without_gradient);
  m.impl("packed_projection_by_tokens", project_by_tokens_without_gradient);
}

TORCH_LIBRARY_IMPL(bda_fx, CPU, m) {
  m.impl("packed_projection", project);
  m.impl("packed_projection_by_tokens", project_by_tokens);
}
