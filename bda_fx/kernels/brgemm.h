// Whether oneDNN's brgemm multiplies 16-bit matrices here.

#pragma once

#include "register_tile.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace bda_fx {

namespace blas = at::native::cpublas;

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

} // namespace bda_fx
