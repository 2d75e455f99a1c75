// The operators ``packed_projection`` and ``packed_projection_by_tokens`` on the CPU: their arguments are
// checked here, what they compute is in ``projection.h``.

#include "projection.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>

namespace {

using namespace bda_fx;

// Whether ``packed`` has the shape of packed coefficients [outputs, inner].
bool packs(const at::Tensor& packed, int64_t outputs, int64_t inner) {
  if ((packed.dim() != 3 && packed.dim() != 4) || !packed.is_contiguous()) return false;
  const bool pairs = packed.dim() == 4;
  const int64_t panel = packed.size(2);
  const bool wide = panel == 16 || panel == 32 || panel == 64; // on whatever machine it was packed
  const int64_t rows = pairs ? (inner + 1) / 2 : inner, padded = rows + unit::SIZE - 1;
  return wide && packed.size(0) == (outputs + panel - 1) / panel &&
      (packed.size(1) == rows || (pairs && packed.size(1) == padded / unit::SIZE * unit::SIZE)) &&
      (!pairs || packed.size(3) == 2);
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

// What the rows of a panel are filled up to a multiple of, with zeros: 1 where coefficients of a type
// are packed in float32, more where they are packed as they are, in pairs.
int64_t panel_depth(at::ScalarType type) {
  if (type == at::kBFloat16 && TILES<at::BFloat16> && unit::exists()) return unit::DEPTH;
  const bool pairs =
      (type == at::kBFloat16 && (MULTIPLIES<at::BFloat16> || has_brgemm<at::BFloat16>())) ||
      (type == at::kHalf && has_brgemm<at::Half>());
  return pairs ? 2 : 1;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(bda_fx, m) {
  m.def("panel_width() -> int", [] { return PANEL; });
  m.def("panel_depth(ScalarType dtype) -> int", panel_depth);
}

TORCH_LIBRARY_IMPL(bda_fx, Autograd, m) {
  m.impl("packed_projection", project_without_gradient);
  m.impl("packed_projection_by_tokens", project_by_tokens_without_gradient);
}

TORCH_LIBRARY_IMPL(bda_fx, CPU, m) {
  m.impl("packed_projection", project);
  m.impl("packed_projection_by_tokens", project_by_tokens);
}
