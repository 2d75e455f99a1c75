// A tile of the result by a unit for 16-bit matrices (AMX): 32 tokens by 32 outputs.
//
//   sums [32, 32] = A [32, K] × panel [K, 32]          in pairs of K, summed in float32
//
// Four registers of the unit hold sums, two hold factors of 16 tokens each, two those of 16 outputs
// each, so that whatever is loaded is multiplied twice. A step is 32 products deep. Registers cannot be
// loaded in part along K without another configuration: what is left of K comes padded with zeros.
//
// BDA_FX_EMULATE_TILES has plain loops in place of the unit, for tests on any CPU.

#pragma once

#include "features.h"

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AMX_BF16__) && !defined(BDA_FX_EMULATE_TILES)
#include <ATen/cpu/Utils.h>
#endif

namespace bda_fx {

// Whether matrices of P are multiplied by a unit for them, if this CPU has it.
template <typename P>
constexpr bool TILES =
#if (defined(__AMX_BF16__) || defined(BDA_FX_EMULATE_TILES)) && !defined(BDA_FX_BRGEMM)
    std::is_same_v<P, at::BFloat16>;
#else
    false;
#endif

namespace unit {

constexpr int64_t SIZE = 16; // rows of a register, pairs in a row of it, sums in a row of it
constexpr int64_t ROWS = 2 * SIZE, COLUMNS = 2 * SIZE, DEPTH = 2 * SIZE;
constexpr int64_t FEW = 4; // tokens up to which vectors are as fast: most rows would be idle

#if defined(BDA_FX_EMULATE_TILES)

struct Register {
  char row[SIZE][64];
};
inline thread_local Register registers[8];
inline thread_local int64_t rows_of[8];

inline bool exists() { return true; }

inline void configure(int64_t rows) {
  for (int i = 0; i < 8; ++i) rows_of[i] = SIZE;
  for (const int i : {0, 1, 4}) rows_of[i] = std::min(rows, SIZE);
  for (const int i : {2, 3, 5}) rows_of[i] = std::max<int64_t>(rows - SIZE, 0);
}

inline void release() {}

template <int R, typename T>
void load(const T* from, int64_t stride) {
  for (int64_t i = 0; i < rows_of[R]; ++i) std::memcpy(registers[R].row[i], from + i * stride, 64);
}

template <int R, typename T>
void load_once(const T* from, int64_t stride) { load<R>(from, stride); }

template <int R>
void clear() {
  std::memset(registers[R].row, 0, sizeof registers[R].row);
}

template <int R>
void store(float* to, int64_t stride) {
  for (int64_t i = 0; i < rows_of[R]; ++i) std::memcpy(to + i * stride, registers[R].row[i], 64);
}

template <int C, int A, int B>
void multiply() {
  for (int64_t i = 0; i < rows_of[C]; ++i) {
    float sums[SIZE];
    at::BFloat16 factors[2 * SIZE], pairs[2 * SIZE];
    std::memcpy(sums, registers[C].row[i], 64);
    std::memcpy(factors, registers[A].row[i], 64);
    for (int64_t k = 0; k < SIZE; ++k) {
      std::memcpy(pairs, registers[B].row[k], 64);
      for (int64_t j = 0; j < SIZE; ++j) {
        sums[j] += static_cast<float>(factors[2 * k]) * static_cast<float>(pairs[2 * j]);
        sums[j] += static_cast<float>(factors[2 * k + 1]) * static_cast<float>(pairs[2 * j + 1]);
      }
    }
    std::memcpy(registers[C].row[i], sums, 64);
  }
}

#elif defined(__AMX_BF16__)

// Whether the unit is there and the system lets this process use it.
inline bool exists() {
  static const bool found = at::cpu::init_amx();
  return found;
}

// Registers for ``rows`` tokens, 1 to 32. What is in them is lost.
inline void configure(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; ++i) {
    const bool low = i == 0 || i == 1 || i == 4, outputs = i >= 6;
    const int64_t count = outputs ? SIZE : low ? std::min(rows, SIZE) : rows - SIZE;
    if (count <= 0) continue; // not used
    shapes.bytes[i] = 64;
    shapes.rows[i] = static_cast<uint8_t>(count);
  }
  // The intrinsic tells the compiler of the first bytes only.
  asm volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

inline void release() { _tile_release(); }

// As instructions, since GCC's intrinsics take no register numbers but literal ones. What loads read is
// not told to the compiler: there is a barrier before them.
template <int R, typename T>
C10_ALWAYS_INLINE void load(const T* from, int64_t stride) {
  constexpr int64_t size = sizeof(T);
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride * size), "i"(R));
}

// The same of what is not needed in the L1 cache afterwards.
template <int R, typename T>
C10_ALWAYS_INLINE void load_once(const T* from, int64_t stride) {
  constexpr int64_t size = sizeof(T);
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride * size), "i"(R));
}

template <int R>
C10_ALWAYS_INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(R));
}

template <int R>
C10_ALWAYS_INLINE void store(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride * 4), "i"(R) : "memory");
}

template <int C, int A, int B>
C10_ALWAYS_INLINE void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else // declared for what is never called

inline bool exists() { return false; }
inline void configure(int64_t) {}
inline void release() {}
template <int R, typename T> void load(const T* from, int64_t stride);
template <int R, typename T> void load_once(const T* from, int64_t stride);
template <int R> void clear();
template <int R> void store(float* to, int64_t stride);
template <int C, int A, int B> void multiply();

#endif

// The configuration of a thread's registers, until this object goes.
class Configured {
 public:
  Configured() = default;
  Configured(const Configured&) = delete;
  ~Configured() {
    if (rows_ > 0) release();
  }

  void set(int64_t rows) {
    if (rows != rows_) configure(rows);
    rows_ = rows;
  }

 private:
  int64_t rows_ = 0;
};

// Factors [rows, K] × [K, 32], K a multiple of DEPTH. ``panel``: rows of pairs.
struct Factors {
  Matrix<const at::BFloat16> rows, panel;
  int64_t depth;
};

// sums [rows, 32] = the products. BOTH: of more than 16 rows. meanwhile() is called at each step.
template <bool BOTH, typename Meanwhile>
C10_ALWAYS_INLINE void multiply_tile(
    const Factors& factors, Matrix<float> sums, const Meanwhile& meanwhile) {
  asm volatile("" : : : "memory"); // loads that the compiler does not know of follow
  const at::BFloat16 *a = factors.rows.data, *b = factors.panel.data;
  const int64_t a_stride = factors.rows.stride, b_stride = factors.panel.stride;
  clear<0>();
  clear<1>();
  if constexpr (BOTH) {
    clear<2>();
    clear<3>();
  }
  for (int64_t k = 0; k < factors.depth; k += DEPTH) {
    load_once<6>(b, b_stride);
    load<4>(a, a_stride);
    multiply<0, 4, 6>();
    load_once<7>(b + 2 * SIZE, b_stride);
    multiply<1, 4, 7>();
    if constexpr (BOTH) {
      load<5>(a + SIZE * a_stride, a_stride);
      multiply<2, 5, 6>();
      multiply<3, 5, 7>();
    }
    meanwhile();
    a += DEPTH;
    b += SIZE * b_stride;
  }
  store<0>(sums.data, sums.stride);
  store<1>(sums.data + SIZE, sums.stride);
  if constexpr (BOTH) {
    store<2>(sums.row(SIZE), sums.stride);
    store<3>(sums.row(SIZE) + SIZE, sums.stride);
  }
}

} // namespace unit

} // namespace bda_fx
