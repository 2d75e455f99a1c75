// A decomposed projection on CPUs: y = x_R Cᵀ + spread(x_B) + b, from one read of x.
//
//   x [tokens, E], any strides     packed C: panels of W output features, [panels, K, W] or,
//   y [tokens, F], contiguous      in pairs of K for 16-bit dot products, [panels, K / 2, W, 2]
//
// For each block of tokens: x_R is packed into rows A [M, K] and x_B into rows of float32, both from
// one read of x (the features of an ascending order are compressed by mask, a vector at a time).
// For each panel: oneDNN's brgemm multiplies A by the panel into sums [M, W] in float32, to which
// spread(x_B) + b is added before they are rounded once into y (float32 is summed in y itself).
// Threads share tokens × panels. Scratch memory belongs to the thread and is kept, so that a call
// allocates its result alone.
//
// Where brgemm has no kernel for a type on this CPU, blocks are multiplied in float32, by brgemm or,
// without that, by ATen's addmm. All index arithmetic is in int64.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

namespace {

namespace blas = at::native::cpublas;

// Outputs of a panel: four vectors of floats, as a register block of brgemm is wide. A wider panel is
// read anew for each few rows, and from the L2 cache where it exceeds the L1 cache.
constexpr int64_t PANEL = std::max<int64_t>(32, 4 * at::vec::Vectorized<float>::size());
constexpr int64_t WIDEST = 64; // panel that is read: coefficients may come from another machine
constexpr int64_t ALIGN = 64; // bytes of a cache line and of the widest vector
constexpr int64_t TOKENS = 192; // of a block: a panel from the L2 cache is reused enough
constexpr int64_t TOKENS_MULTIPLE = 6; // rows of brgemm's register block with four vectors across
constexpr int64_t BLOCK_BYTES = 256 << 10; // of A: with a panel and C it stays within an L2 cache

// Products that are summed before they are added to what is there. For float32 short sums have small
// errors, and their part of a panel stays in the L1 cache; rounding to 16 bits hides them anyway.
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

// -- which features of x --------------------------------------------------------------------------

template <typename T>
constexpr int64_t lanes() { return ALIGN / static_cast<int64_t>(sizeof(T)); }

// Whether this CPU compresses a vector of T by mask.
template <typename T>
constexpr bool compresses() {
#if defined(__AVX2__)
  if (sizeof(T) == 4) return true;
#endif
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
  if (sizeof(T) == 2) return true;
#endif
  return false;
}

// The places of the bits of each mask of eight, a byte each: AVX2 has no compression by mask, but
// permutations.
constexpr std::array<int64_t, 256> COMPRESSED = [] {
  std::array<int64_t, 256> places{};
  for (int64_t mask = 0; mask < 256; ++mask) {
    for (int64_t bit = 0, at = 0; bit < 8; ++bit) {
      if (mask >> bit & 1) places[mask] |= bit << 8 * at++;
    }
  }
  return places;
}();

// Features of x in the order in which they are picked: ranges, a mask, or a list.
class Features {
 public:
  // The features [begin, end), which may be empty, for each of two ranges.
  Features(int64_t a, int64_t b, int64_t c, int64_t d) : count_(b - a + d - c) {
    ranges_ = {{{a, b}, {c, d}}};
  }

  Features(const int64_t* list, int64_t count, int64_t width) : list_(list), count_(count) {
    bool ascending = true;
    for (int64_t i = 0; i < count; ++i) {
      TORCH_CHECK_INDEX(
          0 <= list[i] && list[i] < width,
          "basis_projection: order holds ", list[i], ", expected features from 0 to ", width - 1);
      ascending &= i == 0 || list[i - 1] < list[i];
    }
    if (!ascending || count == 0) return;
    if (list[count - 1] - list[0] == count - 1) {
      ranges_ = {{{list[0], list[0] + count}, {0, 0}}};
      list_ = nullptr;
      return;
    }
    masks_.resize((width + 63) / 64, 0);
    for (int64_t i = 0; i < count; ++i) masks_[list[i] / 64] |= uint64_t{1} << (list[i] % 64);
    width_ = width;
  }

  int64_t count() const { return count_; }

  // Whether the features are one range, which begins with the first one.
  bool consecutive() const {
    const auto& [one, two] = ranges_;
    return list_ == nullptr && (one.first == one.second || two.first == two.second);
  }

  // Whether they are compressed by a mask, where the CPU can.
  bool masked() const { return width_ > 0; }

  int64_t first() const {
    const auto& [one, two] = ranges_;
    return one.first < one.second ? one.first : two.first;
  }

  // out[i] = row[feature i · stride]. May write up to a vector beyond the last one.
  template <typename T>
  void pick(const T* row, int64_t stride, T* out) const {
    if (list_ == nullptr) {
      for (const auto& [begin, end] : ranges_) {
        if (stride == 1) {
          std::memcpy(out, row + begin, (end - begin) * sizeof(T));
        } else {
          for (int64_t i = begin; i < end; ++i) out[i - begin] = row[i * stride];
        }
        out += end - begin;
      }
    } else if (compresses<T>() && stride == 1 && masked()) {
      compress(row, out);
    } else {
      for (int64_t i = 0; i < count_; ++i) out[i] = row[list_[i] * stride];
    }
  }

 private:
  template <typename T>
  void compress(const T* row, T* out) const {
#if defined(__AVX512F__)
    constexpr int64_t step = lanes<T>();
    for (int64_t at = 0; at < width_; at += step) {
      const uint64_t all = ~uint64_t{0} >> (64 - std::min(step, width_ - at));
      const uint64_t mask = (masks_[at / 64] >> (at % 64)) & all;
      if constexpr (sizeof(T) == 4) {
        const __m512i read = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(all), row + at);
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), read));
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
      } else {
        const __m512i read = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(all), row + at);
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(static_cast<__mmask32>(mask), read));
#endif
      }
      out += std::popcount(mask);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      const int* from = reinterpret_cast<const int*>(row);
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      for (int64_t at = 0; at < width_; at += 8) {
        const uint64_t mask = masks_[at / 64] >> (at % 64) & 0xff;
        const __m256i left = _mm256_set1_epi32(static_cast<int>(std::min<int64_t>(width_ - at, 8)));
        const __m256i read = _mm256_maskload_epi32(from + at, _mm256_cmpgt_epi32(left, lane));
        const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(COMPRESSED[mask]));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(read, order));
        out += std::popcount(mask);
      }
    }
#endif
  }

  const int64_t* list_ = nullptr;
  int64_t count_ = 0;
  int64_t width_ = 0;
  std::array<std::pair<int64_t, int64_t>, 2> ranges_{};
  c10::SmallVector<uint64_t, 64> masks_; // of 4,096 features before it needs the heap
};

// Where the token m of x [*, E] begins.
class Rows {
 public:
  explicit Rows(const at::Tensor& x) {
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      const int64_t size = x.size(i), stride = x.stride(i);
      if (size == 1) continue;
      if (!dims_.empty() && dims_.back().second == size * stride) {
        dims_.back() = {dims_.back().first * size, stride};
      } else {
        dims_.emplace_back(size, stride);
      }
    }
  }

  // Elements from one token to the next where that is always the same, else 0. A lone token may
  // have any: ``features``.
  int64_t step(int64_t features) const {
    if (dims_.empty()) return features;
    return dims_.size() == 1 ? dims_[0].second : 0;
  }

  int64_t offset(int64_t token) const {
    int64_t total = 0;
    for (auto dim = dims_.rbegin(); dim != dims_.rend(); ++dim) {
      total += token % dim->first * dim->second;
      token /= dim->first;
    }
    return total;
  }

 private:
  c10::SmallVector<std::pair<int64_t, int64_t>, 5> dims_; // size, stride
};

// -- products -------------------------------------------------------------------------------------

// Multiply two small matrices of integers by brgemm, which are exact in every type.
template <typename T>
bool multiplies(bool pairs) {
  constexpr int64_t m = 2, k = 4, n = 16;
  T a[m * k], b[k * n];
  float c[m * n], expected[m * n];
  for (int64_t i = 0; i < m * k; ++i) a[i] = static_cast<T>(static_cast<float>(i % 5 - 2));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      b[pairs ? i / 2 * 2 * n + 2 * j + i % 2 : i * n + j] =
          static_cast<T>(static_cast<float>((3 * i + j) % 7 - 3));
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
    blas::brgemm(m, n, k, k, n, n, true, a, b, c, pairs);
    blas::brgemm_release(pairs);
  } catch (const c10::Error&) {
    return false;
  }
  return std::equal(c, c + m * n, expected);
}

// Whether brgemm has a kernel for T here, 16-bit types in pairs. PyTorch exports no such question,
// so it is tried; where it would fall back to a plain loop, or oneDNN would emulate the type, no.
template <typename T>
bool has_brgemm() {
  static const bool found = [] {
#if !defined(__AVX512BF16__)
    if (std::is_same_v<T, at::BFloat16> && !blas::could_pack(at::kBFloat16)) return false;
#endif
    if (std::is_same_v<T, at::Half> && !blas::could_pack(at::kHalf)) return false;
    return multiplies<T>(sizeof(T) == 2);
  }();
  return found;
}

// One call: x of type T, multiplied in the type P of the packed coefficients.
template <typename T, typename P>
class Projection {
  using Wide = at::vec::Vectorized<float>;
  using Narrow = at::vec::Vectorized<T>;

  // Whether rows of x, which become float32 anyway, become so first: only that is compressed.
  static constexpr bool WIDENS = !std::is_same_v<T, float> && std::is_same_v<P, float> &&
      compresses<float>() && !compresses<T>();

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
        stride_(x.stride(-1)),
        rows_(x),
        packed_(packed.const_data_ptr<P>()),
        basis_(basis),
        rest_(rest),
        bias_(bias),
        slots_(slots),
        y_(y.mutable_data_ptr<T>()),
        features_(y.size(-1)),
        tokens_(features_ == 0 ? 0 : y.numel() / features_),
        pairs_(packed.dim() == 4),
        inner_(pairs_ ? 2 * packed.size(1) : packed.size(1)),
        panel_(packed.size(2)),
        brgemm_(at::globalContext().userEnabledMkldnn() && has_brgemm<P>()) {
    constexpr int64_t some = TOKENS_MULTIPLE;
    const int64_t row = std::max<int64_t>(inner_, 1) * sizeof(P);
    const int64_t most = std::clamp(BLOCK_BYTES / row / some * some, some, TOKENS);
    const int64_t blocks = (tokens_ + most - 1) / most;
    if (blocks > 0) block_ = ((tokens_ + blocks - 1) / blocks + some - 1) / some * some;
    const int64_t runs = std::max<int64_t>((inner_ + RUN<P> - 1) / RUN<P>, 1);
    run_ = round_up<P>((inner_ + runs - 1) / runs);
    // Compressed rows are written a vector at a time; lines of their own keep threads apart.
    rest_stride_ = round_up<P>(inner_) + lanes<P>();
    basis_stride_ = round_up<float>(basis_.count()) + lanes<float>();
    step_ = rows_.step(x.size(-1));
    if (stride_ == 1 && step_ >= x.size(-1) && std::is_same_v<T, P>) {
      rest_in_place_ = inner_ == rest_.count() && rest_.consecutive();
      basis_in_place_ = std::is_same_v<T, float> && basis_.consecutive();
      if (rest_in_place_) rest_stride_ = step_;
      if (basis_in_place_) basis_stride_ = step_;
    }
  }

  void run() {
    const int64_t panels = (features_ + panel_ - 1) / panel_;
    const int64_t blocks = (tokens_ + block_ - 1) / block_;
    share(blocks * panels, [&](int64_t begin, int64_t end) {
      int64_t gathered = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / panels, panel = task % panels;
        if (gathered != block) gather(block);
        gathered = block;
        multiply(block, panel);
      }
      if (brgemm_) blas::brgemm_release(pairs_);
    });
  }

 private:
  template <typename U>
  static int64_t round_up(int64_t count) {
    return (count + lanes<U>() - 1) / lanes<U>() * lanes<U>();
  }

  int64_t tokens_of(int64_t block) const { return std::min(block_, tokens_ - block * block_); }

  // Rows of x_R and of x_B in float32 for a block of tokens: x itself, or what ``gather`` packed.
  const P* rest(int64_t block) const {
    if constexpr (std::is_same_v<T, P>) {
      if (rest_in_place_) return x_ + rows_.offset(block * block_) + rest_.first();
    }
    return buffers().rest.get<P>(block_ * rest_stride_);
  }

  const float* basis(int64_t block) const {
    if constexpr (std::is_same_v<T, float>) {
      if (basis_in_place_) return x_ + rows_.offset(block * block_) + basis_.first();
    }
    return buffers().basis.get<float>(block_ * basis_stride_);
  }

  // x_R and x_B of a block of tokens, to the buffers of this thread.
  void gather(int64_t block) {
    if (rest_in_place_ && (basis_in_place_ || basis_.count() == 0)) return;
    P* rest = rest_in_place_ ? nullptr : buffers().rest.get<P>(block_ * rest_stride_);
    float* basis = basis_in_place_ ? nullptr : buffers().basis.get<float>(block_ * basis_stride_);
    const int64_t width = rest_.count() + basis_.count();
    T* picked = buffers().row.get<T>(round_up<T>(width) + lanes<T>());
    const bool widened = WIDENS && stride_ == 1 && (rest_.masked() || basis_.masked());
    float* wide = widened ? buffers().wide.get<float>(width) : nullptr;
    const T* first = x_ + rows_.offset(block * block_);
    for (int64_t m = 0; m < tokens_of(block); ++m) {
      const T* row = step_ > 0 ? first + m * step_ : x_ + rows_.offset(block * block_ + m);
      P* rest_row = rest_in_place_ ? nullptr : rest + m * rest_stride_;
      float* basis_row = basis_in_place_ ? nullptr : basis + m * basis_stride_;
      if (widened) {
        at::vec::convert(row, wide, width);
        split(wide, 1, static_cast<float*>(nullptr), rest_row, basis_row);
      } else {
        split(row, stride_, picked, rest_row, basis_row);
      }
    }
  }

  // x_R and x_B of one token, each where it is wanted. ``picked``: for features that are converted.
  template <typename S>
  void split(const S* row, int64_t stride, S* picked, P* rest, float* basis) const {
    if (rest != nullptr) {
      pick(rest_, row, stride, picked, rest);
      // A row of coefficients is padded with zeros, which must not meet an infinity.
      for (int64_t i = rest_.count(); i < inner_; ++i) rest[i] = P(0);
    }
    if (basis != nullptr) pick(basis_, row, stride, picked, basis);
  }

  template <typename S, typename U>
  static void pick(const Features& features, const S* row, int64_t stride, S* picked, U* to) {
    if constexpr (std::is_same_v<S, U>) {
      features.pick(row, stride, to);
    } else if (stride == 1 && features.consecutive()) {
      at::vec::convert(row + features.first(), to, features.count());
    } else {
      features.pick(row, stride, picked);
      at::vec::convert(picked, to, features.count());
    }
  }

  // The outputs of one panel for one block of tokens, from what was gathered.
  void multiply(int64_t block, int64_t panel) const {
    const int64_t m = tokens_of(block), first = panel * panel_;
    const int64_t n = std::min(panel_, features_ - first);
    T* y = y_ + block * block_ * features_ + first;
    float* sums;
    int64_t stride;
    if constexpr (std::is_same_v<T, float>) {
      sums = y;
      stride = features_;
    } else {
      sums = buffers().sums.get<float>(block_ * panel_);
      stride = panel_;
    }
    if (inner_ > 0) {
      multiply(rest(block), m, n, packed_ + panel * inner_ * panel_, sums, stride);
    } else {
      for (int64_t i = 0; i < m; ++i) std::fill_n(sums + i * stride, n, 0.0f);
    }
    float bias[WIDEST] = {};
    if (bias_ != nullptr) at::vec::convert(bias_ + first, bias, n);
    const float* features = basis(block);
    const int64_t width = slots_.size();
    for (int64_t begin = 0, end = 0; begin < n; begin = end) {
      const int64_t slot = slots_[(first + begin) % width];
      const int64_t step = slot < 0 ? 0 : 1; // a stretch of consecutive slots, or of none
      for (end = begin + 1; end < n; ++end) {
        if (slots_[(first + end) % width] != slot + (end - begin) * step) break;
      }
      if (std::is_same_v<T, float> && slot < 0 && bias_ == nullptr) continue;
      const float* identity = slot < 0 ? nullptr : features + slot;
      finish(m, end - begin, sums + begin, stride, identity, bias + begin, y + begin);
    }
  }

  // Two vectors of floats as one of T; the first one alone where T is float.
  static Narrow narrow(const Wide& low, const Wide& high) {
    if constexpr (std::is_same_v<T, float>) {
      return low;
    } else if constexpr (std::is_same_v<T, at::BFloat16>) {
#if defined(__AVX512BF16__)
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#endif
      return at::vec::convert_float_bfloat16(low, high);
    } else {
      return at::vec::convert_float_half(low, high);
    }
  }

  // y [m, n] = sums + identity + bias, rounded once.
  void finish(
      int64_t m, int64_t n, const float* sums, int64_t stride, const float* identity,
      const float* bias, T* y) const {
    int64_t at = 0;
    const auto vectors = [&](auto count) {
      constexpr int64_t width = count() * Narrow::size();
      for (; at + width <= n; at += width) {
        const float* from = identity == nullptr ? nullptr : identity + at;
        finish_vectors<count()>(m, sums + at, stride, from, bias + at, y + at);
      }
    };
    vectors(std::integral_constant<int, 4>());
    vectors(std::integral_constant<int, 2>());
    vectors(std::integral_constant<int, 1>());
    if (at == n) return;
    const int64_t one = std::min<int64_t>(Wide::size(), n - at), two = n - at - one;
    for (int64_t i = 0; i < m; ++i) {
      const auto add = [&](int64_t from, int64_t count) {
        const Wide row = Wide::loadu(sums + i * stride + from, count);
        const Wide sum = row + Wide::loadu(bias + from, count);
        if (identity == nullptr) return sum;
        return sum + Wide::loadu(identity + i * basis_stride_ + from, count);
      };
      const Wide low = add(at, one), high = two > 0 ? add(at + one, two) : Wide(0.0f);
      narrow(low, high).store(y + i * features_ + at, n - at);
    }
  }

  // The same for COUNT vectors of T in each row, with their bias in registers.
  template <int COUNT>
  void finish_vectors(
      int64_t m, const float* sums, int64_t stride, const float* identity, const float* bias,
      T* y) const {
    constexpr int64_t parts = Narrow::size() / Wide::size();
    std::array<Wide, COUNT * parts> offsets, row;
    for (size_t j = 0; j < row.size(); ++j) offsets[j] = Wide::loadu(bias + j * Wide::size());
    for (int64_t i = 0; i < m; ++i) {
      for (size_t j = 0; j < row.size(); ++j) {
        row[j] = Wide::loadu(sums + i * stride + j * Wide::size()) + offsets[j];
        if (identity != nullptr) {
          row[j] = row[j] + Wide::loadu(identity + i * basis_stride_ + j * Wide::size());
        }
      }
      for (int64_t j = 0; j < COUNT; ++j) {
        narrow(row[j * parts], row[j * parts + parts - 1])
            .store(y + i * features_ + j * Narrow::size());
      }
    }
  }

  // sums [m, n] = A [m, K] × panel [K, n]
  void multiply(
      const P* a, int64_t m, int64_t n, const P* panel, float* sums, int64_t stride) const {
    if (brgemm_) {
      for (int64_t k = 0; k < inner_; k += run_) {
        blas::brgemm(
            m, n, std::min(run_, inner_ - k), rest_stride_, panel_, stride, k > 0, a + k,
            panel + k * panel_, sums, pairs_);
      }
      return;
    }
    const float *left = nullptr, *right = nullptr;
    if constexpr (std::is_same_v<P, float>) {
      left = a;
      right = panel;
    } else { // oneDNN was switched off after packing
      float* wide = buffers().panel.get<float>(m * rest_stride_ + inner_ * panel_);
      left = wide;
      for (int64_t i = 0; i < m; ++i) {
        at::vec::convert(a + i * rest_stride_, wide + i * rest_stride_, inner_);
      }
      right = wide += m * rest_stride_;
      for (int64_t k = 0; k < inner_; ++k) {
        for (int64_t j = 0; j < panel_; ++j) {
          const int64_t at = pairs_ ? k / 2 * 2 * panel_ + 2 * j + k % 2 : k * panel_ + j;
          wide[k * panel_ + j] = static_cast<float>(panel[at]);
        }
      }
    }
    const auto matrix = [](const float* data, int64_t rows, int64_t columns, int64_t step) {
      return at::from_blob(const_cast<float*>(data), {rows, columns}, {step, 1}, at::kFloat);
    };
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor total = matrix(sums, m, n, stride);
    at::addmm_out(
        total, total, matrix(left, m, inner_, rest_stride_), matrix(right, inner_, n, panel_), 0, 1);
  }

  const T* x_;
  int64_t stride_; // from one feature of x to the next
  Rows rows_;
  int64_t step_ = 0; // from one token of x to the next, 0 if it varies
  const P* packed_;
  const Features& basis_;
  const Features& rest_;
  const T* bias_;
  at::IntArrayRef slots_;
  T* y_;
  int64_t features_, tokens_;
  bool pairs_;
  int64_t inner_; // rows of a panel: E - r, made even for pairs
  int64_t panel_; // its outputs
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
  return 1 <= panel && panel <= WIDEST && packed.size(0) == (outputs + panel - 1) / panel &&
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
  return (type == at::kBFloat16 && has_brgemm<at::BFloat16>()) ||
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
