// Which features of x are read, in which order, and where its tokens begin.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// What a vector of ATen's is decides, not what the compiler could do besides.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace bda_fx {

constexpr int64_t ALIGN = 64; // bytes of a cache line and of the widest vector

// Before loops whose body is in registers.
#if defined(__clang__)
#define BDA_FX_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BDA_FX_UNROLL _Pragma("GCC unroll 8")
#endif

// A matrix whose rows are ``stride`` apart.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;

  T* row(int64_t i) const { return data + i * stride; }
  Matrix from(int64_t i) const { return {row(i), stride}; }
  Matrix columns(int64_t j) const { return {data + j, stride}; }
  operator Matrix<const T>() const requires(!std::is_const_v<T>) { return {data, stride}; }
};

#if defined(CPU_CAPABILITY_AVX2)
// All bits of the lanes j of eight for which bit j of ``lanes`` is set.
inline __m256i mask_of(uint32_t lanes) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bits);
  return _mm256_cmpeq_epi32(set, bits);
}
#endif

// Elements of a cache line.
template <typename T>
constexpr int64_t lanes() { return ALIGN / static_cast<int64_t>(sizeof(T)); }

// Features of x in the order in which they are picked: two ranges, or a list.
class Features {
 public:
  // The features [begin, end), which may be empty, for each of two ranges.
  Features(int64_t a, int64_t b, int64_t c, int64_t d) : count_(b - a + d - c) {
    ranges_ = {{{a, b}, {c, d}}};
  }

  Features(const int64_t* list, int64_t count, int64_t width) : list_(list), count_(count) {
    for (int64_t i = 0; i < count; ++i) {
      TORCH_CHECK_INDEX(
          0 <= list[i] && list[i] < width,
          "basis_projection: order holds ", list[i], ", expected features from 0 to ", width - 1);
      ascending_ &= i == 0 || list[i - 1] < list[i];
    }
    if (ascending_ && count > 0 && list[count - 1] - list[0] == count - 1) {
      ranges_ = {{{list[0], list[0] + count}, {0, 0}}};
      list_ = nullptr;
    }
  }

  int64_t count() const { return count_; }

  // Whether the features are one range, which begins with the first one.
  bool consecutive() const {
    const auto& [one, two] = ranges_;
    return list_ == nullptr && (one.first == one.second || two.first == two.second);
  }

  // The list, if they are one.
  const int64_t* list() const { return list_; }

  // The list if they are one, in ascending order.
  const int64_t* ascending_list() const { return ascending_ ? list_ : nullptr; }

  // Where the ranges begin; 0 for a list, whose places count from the beginning of a row.
  int64_t first() const {
    const auto& [one, two] = ranges_;
    return one.first < one.second ? one.first : two.first;
  }

  // out[i] = row[feature i · stride].
  template <typename T>
  void pick(const T* row, int64_t stride, T* out) const {
    if (list_ != nullptr) {
      for (int64_t i = 0; i < count_; ++i) out[i] = row[list_[i] * stride];
      return;
    }
    for (const auto& [begin, end] : ranges_) {
      if (stride == 1) {
        std::memcpy(out, row + begin, (end - begin) * sizeof(T));
      } else {
        for (int64_t i = begin; i < end; ++i) out[i - begin] = row[i * stride];
      }
      out += end - begin;
    }
  }

 private:
  const int64_t* list_ = nullptr;
  int64_t count_ = 0;
  bool ascending_ = true;
  std::array<std::pair<int64_t, int64_t>, 2> ranges_{};
};

// A list of features in ascending order, picked a vector at a time: what lanes of the result come
// from one vector of x is one permutation of it. Worth its preparation for many rows.
template <typename T>
class Shuffle {
#if defined(CPU_CAPABILITY_AVX512)
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  static constexpr int64_t SIZE = 64 / sizeof(T); // lanes of a vector
#else
  using Index = int32_t;
  static constexpr int64_t SIZE = 8;
#endif

  // Whether lanes are permuted as pairs of bytes, at half the cost on some CPUs.
  static constexpr bool BYTES =
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VBMI__)
      sizeof(T) == 2;
#else
      false;
#endif

 public:
  // Whether this CPU permutes lanes of T.
  static constexpr bool EXISTS =
#if defined(CPU_CAPABILITY_AVX512)
      true;
#elif defined(CPU_CAPABILITY_AVX2)
      sizeof(T) == 4;
#else
      false;
#endif

  bool empty() const { return steps_.empty(); }

  void prepare(const Features& features, int64_t width) {
    const int64_t* list = features.ascending_list();
    if (!EXISTS || list == nullptr || width < SIZE) return;
    for (int64_t i = 0; i < features.count(); ++i) {
      const int64_t lane = i % SIZE, from = std::min(list[i] / SIZE * SIZE, width - SIZE);
      if (lane == 0 || steps_.back().from != from) {
        if (lane == 0 && i > 0) steps_.back().last = true;
        steps_.push_back({from, false, 0, {}});
      }
      const int64_t place = list[i] - from;
      if constexpr (BYTES) {
        steps_.back().lanes |= uint64_t{3} << 2 * lane;
        steps_.back().places[lane] = static_cast<Index>(2 * place | (2 * place + 1) << 8);
      } else {
        steps_.back().lanes |= uint64_t{1} << lane;
        steps_.back().places[lane] = static_cast<Index>(place);
      }
    }
    if (!steps_.empty()) steps_.back().last = true;
  }

  // out[m][i] = row m [feature i] for some rows at once. May write up to a vector beyond the last one
  // of each.
  template <int ROWS>
  void pick(Matrix<const T> rows, Matrix<T> out) const {
#if defined(CPU_CAPABILITY_AVX512)
    __m512i picked[ROWS] = {};
    for (const Step& step : steps_) {
      const __m512i places = _mm512_loadu_si512(step.places.data());
      BDA_FX_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        const __m512i read = _mm512_loadu_si512(rows.row(m) + step.from);
        if constexpr (sizeof(T) == 4) {
          const auto lanes = static_cast<__mmask16>(step.lanes);
          picked[m] = _mm512_mask_permutexvar_epi32(picked[m], lanes, places, read);
        } else {
#if defined(__AVX512VBMI__)
          picked[m] = _mm512_mask_permutexvar_epi8(picked[m], step.lanes, places, read);
#else
          const auto lanes = static_cast<__mmask32>(step.lanes);
          picked[m] = _mm512_mask_permutexvar_epi16(picked[m], lanes, places, read);
#endif
        }
      }
      if (!step.last) continue;
      BDA_FX_UNROLL
      for (int m = 0; m < ROWS; ++m) _mm512_storeu_si512(out.row(m), picked[m]);
      out.data += SIZE;
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (sizeof(T) == 4) {
      __m256i picked[ROWS] = {};
      for (const Step& step : steps_) {
        const __m256i places =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(step.places.data()));
        const __m256i lanes = mask_of(static_cast<uint32_t>(step.lanes));
        BDA_FX_UNROLL
        for (int m = 0; m < ROWS; ++m) {
          const auto* from = reinterpret_cast<const __m256i*>(rows.row(m) + step.from);
          const __m256i read = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(from), places);
          picked[m] = _mm256_blendv_epi8(picked[m], read, lanes);
        }
        if (!step.last) continue;
        BDA_FX_UNROLL
        for (int m = 0; m < ROWS; ++m) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.row(m)), picked[m]);
        }
        out.data += SIZE;
      }
    }
#endif
  }

 private:
  // Lanes of the result that come from the vector of x at ``from``, and which of its lanes they are.
  struct Step {
    int64_t from;
    bool last; // of those of a vector of the result
    uint64_t lanes; // a bit for each, or for each byte
    std::array<Index, SIZE> places;
  };

  c10::SmallVector<Step, 0> steps_;
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

} // namespace bda_fx
