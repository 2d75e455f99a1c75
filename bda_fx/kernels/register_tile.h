// A tile of the result, a few tokens by a few vectors of outputs, from its sums in registers.
//
//   y [M, N · LANES] = A [M, K] × panel [K, N · LANES] + spread(x_B) + b
//
// Nothing but the result is written, once: products are summed in M · N registers, and what is added
// to them meets them there. The lines of y are asked for before the products are computed, so that a
// result that lies in memory, and not in a cache, is waited for meanwhile.

#pragma once

#include "features.h"

#include <ATen/cpu/vec/vec.h>
#include <c10/macros/Macros.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace bda_fx {

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define BDA_FX_DOT_BF16 // dot products of pairs
#endif

using Wide = at::vec::Vectorized<float>;
constexpr int64_t LANES = Wide::size();

// Registers of a tile: ROWS · VECTORS for sums, VECTORS for a row of the panel and one for a factor.
constexpr int ROWS = 6;
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int VECTORS = 4; // of 32 registers
#else
constexpr int VECTORS = 2; // of 16
#endif
constexpr int64_t WIDTH = VECTORS * LANES;

// Whether tiles are multiplied in P. BDA_FX_BRGEMM leaves 16-bit types to brgemm, for tests.
template <typename P>
constexpr bool MULTIPLIES = std::is_same_v<P, float>
#if defined(BDA_FX_DOT_BF16) && !defined(BDA_FX_BRGEMM)
    || std::is_same_v<P, at::BFloat16>
#endif
    ;

// Whether lanes of T are read by mask as they are; else they are float32.
template <typename T>
constexpr bool READS = std::is_same_v<T, float>
#if defined(CPU_CAPABILITY_AVX512)
    || true
#endif
    ;

// Sums of a tile, in registers: all loops over them are unrolled.
template <int M, int N>
using Sums = Wide[M][N];

// -- what is added --------------------------------------------------------------------------------

#if defined(CPU_CAPABILITY_AVX512)
// 16-bit lanes of type B as floats.
template <typename B>
C10_ALWAYS_INLINE Wide widened(__m256i lanes) {
  if constexpr (std::is_same_v<B, at::Half>) return _mm512_cvtph_ps(lanes);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(lanes), 16));
}
#endif

// from[j] for the lanes j in ``mask``, 0 for others, which are not read.
template <typename B>
C10_ALWAYS_INLINE Wide masked(const B* from, uint32_t mask) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<B, float>) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  } else {
    return widened<B>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_maskload_ps(from, mask_of(mask));
#else
  float read[LANES] = {};
  for (int64_t j = 0; j < LANES; ++j) {
    if (mask >> j & 1) read[j] = from[j];
  }
  return Wide::loadu(read);
#endif
}

constexpr uint32_t ALL_LANES = (uint32_t{1} << LANES) - 1;

// The same of all lanes.
template <typename B>
C10_ALWAYS_INLINE Wide whole(const B* from) {
  if constexpr (std::is_same_v<B, float>) return Wide::loadu(from);
#if defined(CPU_CAPABILITY_AVX512)
  else return widened<B>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
}

// Basis features that some lanes of a vector of outputs are given: that of lane j is j + ``first``.
struct Given {
  int64_t first;
  uint32_t lanes;
};

// What is added to the sums of up to N vectors of outputs, and how many outputs there are.
template <int N>
struct Addends {
  int64_t count;
  std::array<c10::SmallVector<Given, 2>, N> given;
  alignas(ALIGN) std::array<float, N * LANES> bias{};

  // Outputs [begin, end) are given the basis features from ``feature`` on.
  void give(int64_t begin, int64_t end, int64_t feature) {
    for (int64_t at = begin / LANES * LANES; at < end; at += LANES) {
      const int64_t first = std::max(begin - at, int64_t{0}), last = std::min(end - at, LANES);
      const uint32_t lanes = (uint32_t{1} << last) - (uint32_t{1} << first);
      given[at / LANES].push_back({feature + at - begin, lanes});
    }
  }
};

// Two vectors of floats as one of T.
template <typename T>
C10_ALWAYS_INLINE at::vec::Vectorized<T> narrow(const Wide& low, const Wide& high) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
#if defined(BDA_FX_DOT_BF16)
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#else
    return at::vec::convert_float_bfloat16(low, high);
#endif
  } else {
    return at::vec::convert_float_half(low, high);
  }
}

// sums += bias.
template <int M, int N, int MOST>
C10_ALWAYS_INLINE void add_bias(Sums<M, N>& sums, const Addends<MOST>& addends) {
  BDA_FX_UNROLL
  for (int j = 0; j < N; ++j) {
    const Wide bias = Wide::loadu(addends.bias.data() + j * LANES);
    BDA_FX_UNROLL
    for (int i = 0; i < M; ++i) sums[i][j] = sums[i][j] + bias;
  }
}

// y = sums + basis features, rounded once.
template <int M, int N, int MOST, typename T, typename B>
C10_ALWAYS_INLINE void finish(
    Sums<M, N>& sums, const Addends<MOST>& addends, Matrix<const B> basis, Matrix<T> y) {
  BDA_FX_UNROLL
  for (int j = 0; j < N; ++j) {
    for (const auto& [first, lanes] : addends.given[j]) {
      BDA_FX_UNROLL
      for (int i = 0; i < M; ++i) {
        sums[i][j] = sums[i][j] + masked(basis.row(i) + first, lanes);
      }
    }
  }
  const auto store = [&](const auto& left) {
    BDA_FX_UNROLL
    for (int i = 0; i < M; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        BDA_FX_UNROLL
        for (int j = 0; j < N; ++j) sums[i][j].store(y.row(i) + j * LANES, left(j, 1));
      } else {
        BDA_FX_UNROLL
        for (int j = 0; j < N; j += 2) {
          narrow<T>(sums[i][j], sums[i][std::min(j + 1, N - 1)])
              .store(y.row(i) + j * LANES, left(j, 2));
        }
      }
    }
  };
  if (addends.count >= N * LANES && (std::is_same_v<T, float> || N > 1)) {
    store([](int, int vectors) { return static_cast<int>(vectors * LANES); });
  } else {
    store([&](int j, int vectors) {
      return static_cast<int>(std::clamp<int64_t>(addends.count - j * LANES, 0, vectors * LANES));
    });
  }
}

// -- products -------------------------------------------------------------------------------------

// Where the factors A [M, K] lie in rows of x: one after the other.
struct InOrder {
  template <typename P>
  static Matrix<const P> skip(Matrix<const P> x, int64_t count) { return x.columns(count); }
  InOrder after(int64_t) const { return {}; }
  int64_t operator[](int64_t k) const { return k; }
};

// Or at the listed places of each row.
struct Listed {
  const int64_t* places;

  template <typename P>
  static Matrix<const P> skip(Matrix<const P> x, int64_t) { return x; }
  Listed after(int64_t count) const { return {places + count}; }
  int64_t operator[](int64_t k) const { return places[k]; }
};

// Rows of a panel before the one that is multiplied at which it is asked for: it lies in the L2 cache.
constexpr int64_t AHEAD = 12;

// sums += A [M, count] × panel [count, N · LANES], in order, A at some places of the rows of x.
// 16-bit factors lie in pairs.
template <int M, int N, typename P, typename Places>
C10_ALWAYS_INLINE void add_products(
    Matrix<const P> x, Places places, Matrix<const P> panel, int64_t count, Sums<M, N>& sums) {
  constexpr int64_t terms = std::is_same_v<P, float> ? 1 : 2;
  const P* rows[M];
  BDA_FX_UNROLL
  for (int i = 0; i < M; ++i) {
    rows[i] = x.row(i);
    // Keep them all: to compute them anew takes units that multiply, too.
    asm("" : "+r"(rows[i]));
  }
  for (int64_t k = 0; k < count; k += terms) {
    const int64_t place = places[k];
    Wide row[N];
    BDA_FX_UNROLL
    for (int j = 0; j < N; ++j) {
      row[j] = Wide::loadu(panel.row(k) + terms * j * LANES);
      __builtin_prefetch(panel.row(k + AHEAD * terms) + terms * j * LANES, 0, 3);
    }
    BDA_FX_UNROLL
    for (int i = 0; i < M; ++i) {
      if constexpr (std::is_same_v<P, float>) {
        const Wide factor(rows[i][place]);
        BDA_FX_UNROLL
        for (int j = 0; j < N; ++j) sums[i][j] = at::vec::fmadd(factor, row[j], sums[i][j]);
      }
#if defined(BDA_FX_DOT_BF16)
      else {
        int32_t two;
        std::memcpy(&two, rows[i] + place, sizeof two);
        const auto factors = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
        BDA_FX_UNROLL
        for (int j = 0; j < N; ++j) {
          const auto pairs = reinterpret_cast<__m512bh>(static_cast<__m512>(row[j]));
          sums[i][j] = _mm512_dpbf16_ps(sums[i][j], factors, pairs);
        }
      }
#endif
    }
  }
}

// sums = A [M, K] × panel [K, N · LANES]: ``run`` products are summed at a time, and these sums in
// order.
template <int M, int N, typename P, typename Places>
C10_ALWAYS_INLINE void multiply_tile(
    Matrix<const P> x, Places places, Matrix<const P> panel, int64_t inner, int64_t run,
    Sums<M, N>& sums) {
  alignas(ALIGN) float totals[M][N * LANES];
  for (int64_t k = 0;; k += run) {
    BDA_FX_UNROLL
    for (int i = 0; i < M; ++i) {
      BDA_FX_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j] = Wide(0.0f);
    }
    const int64_t count = std::min(run, inner - k);
    add_products<M, N>(places.skip(x, k), places.after(k), panel.from(k), count, sums);
    if (k > 0) {
      BDA_FX_UNROLL
      for (int i = 0; i < M; ++i) {
        BDA_FX_UNROLL
        for (int j = 0; j < N; ++j) sums[i][j] = sums[i][j] + Wide::loadu(&totals[i][j * LANES]);
      }
    }
    if (k + run >= inner) return;
    BDA_FX_UNROLL
    for (int i = 0; i < M; ++i) {
      BDA_FX_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j].store(&totals[i][j * LANES]);
    }
  }
}

// Sums that are in memory.
template <int M, int N>
C10_ALWAYS_INLINE void load(Matrix<const float> from, Sums<M, N>& sums) {
  BDA_FX_UNROLL
  for (int i = 0; i < M; ++i) {
    BDA_FX_UNROLL
    for (int j = 0; j < N; ++j) sums[i][j] = Wide::loadu(from.row(i) + j * LANES);
  }
}

// Have the lines of the first ``bytes`` of ``count`` rows come to the cache, to be written or read.
template <bool WRITTEN, typename T>
C10_ALWAYS_INLINE void fetch(Matrix<T> rows, int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) {
    const char* row = reinterpret_cast<const char*>(rows.row(i));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, WRITTEN, WRITTEN ? 3 : 2);
  }
}

// body(first row, rows), ``rows`` a constant, for tiles of up to ROWS of m rows.
template <typename Body>
void by_rows(int64_t m, const Body& body) {
  int64_t i = 0;
  for (; i + ROWS <= m; i += ROWS) body(i, std::integral_constant<int, ROWS>());
  switch (m - i) {
    case 5: return body(i, std::integral_constant<int, 5>());
    case 4: return body(i, std::integral_constant<int, 4>());
    case 3: return body(i, std::integral_constant<int, 3>());
    case 2: return body(i, std::integral_constant<int, 2>());
    case 1: return body(i, std::integral_constant<int, 1>());
  }
}

} // namespace bda_fx
