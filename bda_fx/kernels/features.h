// Which features of x are read, in which order, and where its tokens begin.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bda_fx {

constexpr int64_t ALIGN = 64; // bytes of a cache line and of the widest vector

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

} // namespace bda_fx
