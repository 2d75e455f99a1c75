"""Small ONNX graphs, of ops whose meaning is easily missed, in the text form of onnx.parser.

Axes with a letter are open.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx


@dataclass(frozen=True)
class Case:
    """``takes`` and ``gives`` are inputs and outputs with their types."""

    name: str
    takes: str
    gives: str
    body: str
    opset: int = 18
    weights: str = ""
    domain: str = ""
    says: str = ""

    def __str__(self) -> str:
        return self.name

    def model(self) -> onnx.ModelProto:
        other = f', "{self.domain}" : 1' if self.domain else ""
        weights = f"<{self.weights}>" if self.weights else ""
        return onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : {self.opset}{other}]>\n'
            f"g ({self.takes}) => ({self.gives}) {weights} {{ {self.body} }}"
        )

    def save(self, folder: Path) -> Path:
        path = folder / "case.onnx"
        onnx.save(self.model(), path)
        return path


X, Y = "float[a,b,4] x", "float y"
MOVES = [
    Case("reshape 0 and -1", X, Y, "s = Constant<value_ints=[0,-1]>() y = Reshape(x, s)"),
    Case("reshape allowzero", "float[0,3] x", Y,
         "s = Constant<value_ints=[3,0]>() y = Reshape<allowzero=1>(x, s)"),
    Case("reshape to sizes of another", "float[a,b] x, float[b,a] z", Y,
         "s = Shape(z) y = Reshape(x, s)"),
    Case("reshape splits an open axis", X, Y, """n = Shape<start=0,end=1>(x)
         m = Constant<value_ints=[-1,2,2]>() s = Concat<axis=0>(n, m) y = Reshape(x, s)"""),
    Case("flatten", X, Y, "y = Flatten<axis=2>(x)"),
    Case("flatten at -1", X, Y, "y = Flatten<axis=-1>(x)"),
    Case("squeeze attribute", "float[a,1,b,1] x", Y, "y = Squeeze<axes=[1]>(x)", opset=11),
    Case("squeeze every axis of 1", "float[a,1,b,1] x", Y, "y = Squeeze(x)"),
    Case("unsqueeze from the end", X, Y, "s = Constant<value_ints=[-1,1]>() y = Unsqueeze(x, s)"),
    Case("unsqueeze attribute", X, Y, "y = Unsqueeze<axes=[0,4]>(x)", opset=11),
    Case("transpose reversed", X, Y, "y = Transpose(x)"),
    Case("expand both ways", "float[a,1,4] x", Y,
         "s = Constant<value_ints=[3,1]>() y = Expand(x, s)"),
    Case("expand by more axes", "float[1,b] x, float[a] z", Y, """n = Shape(z)
         m = Constant<value_ints=[1,-9]>() one = Constant<value_ints=[1,1]>()
         k = Max(m, one) s = Concat<axis=0>(n, k) y = Expand(x, s)"""),
    Case("expand as TorchScript spells it", "float[1,b] x, float[a,c] z", Y, """
         n = Shape<start=0,end=1>(z) less = Constant<value_ints=[-1]>()
         asked = Concat<axis=0>(n, less) k = Shape(asked)
         ones = ConstantOfShape<value=int64[1]{1}>(k) minus = Constant<value_int=-1>()
         none = Mul(ones, minus) is = Equal(asked, none) s = Where(is, ones, asked)
         y = Expand(x, s)"""),
    Case("tile", X, Y, "s = Constant<value_ints=[1,2,3]>() y = Tile(x, s)"),
    Case("split unevenly", "float[a,7] x", "float y, float z",
         "s = Constant<value_ints=[2,5]>() y, z = Split<axis=-1>(x, s)"),
    Case("split with a smaller rest", "float[a,7] x", "float y, float z, float w",
         "y, z, w = Split<axis=1,num_outputs=3>(x)"),
    Case("split attribute", "float[a,7] x", "float y, float z",
         "y, z = Split<axis=1,split=[3,4]>(x)", opset=11),
    Case("concat on an open axis", X, Y, "y = Concat<axis=-2>(x, x)"),
    Case("trilu", "float[a,b,c] x", "float y, float z", """k = Constant<value_int=1>()
         y = Trilu<upper=1>(x, k) z = Trilu<upper=0>(x)"""),
    Case("depth to space", "float[a,8,b,c] x", "float y, float z", """
         y = DepthToSpace<blocksize=2,mode="CRD">(x) z = DepthToSpace<blocksize=2>(x)"""),
    Case("space to depth", "float[a,2,4,6] x", Y, "y = SpaceToDepth<blocksize=2>(x)"),
    Case("a branch that shapes choose", "float[a,b] x", Y, """n = Shape<start=1,end=2>(x)
         one = Constant<value_ints=[1]>() t = Equal(n, one) c = Squeeze(t)
         y = If(c) <then_branch = t () => (float p) { p = Neg(x) },
                    else_branch = e () => (float q) { q = Exp(x) }>"""),
]  # fmt: skip
SLICES = [
    Case(f"slice {starts} to {ends} by {steps}", takes, Y, f"""
         s = Constant<value_ints={starts}>() e = Constant<value_ints={ends}>()
         k = Constant<value_ints={axes}>() d = Constant<value_ints={steps}>()
         y = Slice(x, s, e, k, d)""")
    for takes, starts, ends, axes, steps in (
        (X, [1], [2**63 - 1], [1], [1]),
        (X, [-2], [-1], [1], [1]),
        (X, [0, -3], [2**31 - 1, 100], [-2, -1], [1, 2]),
        (X, [0], [2**63 - 1], [1], [2]),
        (X, [-1], [-(2**63) + 1], [1], [-1]),
        (X, [-1], [-(2**31)], [2], [-1]),
        (X, [3], [0], [2], [-1]),
        (X, [-1], [-5], [2], [-2]),
        (X, [-1], [-4], [2], [-2]),
        (X, [5], [9], [2], [1]),
        ("float[0,3] x", [-5], [5], [0], [1]),
    )
] + [
    Case("slice attribute", X, Y, "y = Slice<starts=[1],ends=[-1],axes=[2]>(x)", opset=9),
    Case("slice to an open size", "float[a,9] x, float[b,c] z", Y, """
         e = Shape<start=0,end=1>(z) s = Constant<value_ints=[0]>() k = Constant<value_ints=[1]>()
         y = Slice(x, s, e, k)"""),
    Case("pads as TorchScript spells them", "float[a,b] x", Y, """
         p = Constant<value_ints=[1,2]>() z = Constant<value_ints=[0,0]>()
         both = Concat<axis=0>(p, z) pairs = Constant<value_ints=[-1,2]>() m = Reshape(both, pairs)
         s = Constant<value_ints=[-1]>() e = Constant<value_ints=[-9223372036854775807]>()
         k = Constant<value_ints=[0]>() d = Constant<value_ints=[-1]>() r = Slice(m, s, e, k, d)
         t = Transpose<perm=[1,0]>(r) flat = Constant<value_ints=[-1]>() q = Reshape(t, flat)
         y = Pad(x, q)"""),
]  # fmt: skip
PADS = [
    Case(f"pad {mode}", "float[a,b,6] x", Y, f"""
         p = Constant<value_ints=[0,1,2,0,2,3]>() y = Pad<mode="{mode}">(x, p)""", opset=19)
    for mode in ("constant", "edge", "reflect", "wrap")
] + [
    Case("pad crops", "float[a,b,6] x", Y, """p = Constant<value_ints=[0,0,-2,0,1,-1]>()
         v = Constant<value_float=7.0>() y = Pad(x, p, v)"""),
    Case("pad some axes", "float[a,b,6] x", Y, """p = Constant<value_ints=[1,2]>()
         v = Constant<value_float=0.5>() k = Constant<value_ints=[-1]>() y = Pad(x, p, v, k)"""),
    Case("pad attribute", "float[a,b] x", Y, "y = Pad<pads=[0,1,2,0],value=3.0>(x)", opset=10),
    Case("pad bool", "bool[a,b] x", "bool y", "p = Constant<value_ints=[0,1,0,2]>() y = Pad(x, p)"),
]  # fmt: skip
INDICES = [
    Case("gather negative constants", X, Y,
         "i = Constant<value_ints=[-1,0,-2]>() y = Gather<axis=1>(x, i)"),
    Case("gather one element", X, Y, "i = Constant<value_int=-1>() y = Gather<axis=-1>(x, i)"),
    Case("gather by values", "float[a,b,4] x, int64[c,a] i", Y, "y = Gather<axis=1>(x, i)"),
    Case("gather rows of a table", "int64[a,b] i", Y, "y = Gather(w, i)",
         weights="float[3,2] w = {1,2,3,4,5,6}"),
    Case("gather by int32", "float[a,b] x, int32[c] i", Y, "y = Gather<axis=0>(x, i)"),
    Case("gather elements", "float[a,b] x, int64[a,c] i", Y, "y = GatherElements<axis=1>(x, i)"),
    Case("gather elements by int32", "float[a,b] x, int32[a,c] i", Y,
         "y = GatherElements<axis=1>(x, i)"),
    Case("gather nd", "float[a,b,4] x, int64[c,2] i", Y, "y = GatherND(x, i)"),
    Case("gather nd in batches", "float[a,b,4] x, int64[a,c,1] i", Y,
         "y = GatherND<batch_dims=1>(x, i)"),
    Case("scatter nd", "float[a,b,4] x, float[2,4] u", Y, "y = ScatterND(x, i, u)",
         weights="int64[2,2] i = {0,1,1,-1}"),
    Case("scatter elements", "float[a,b] x, float[a,1] u", Y,
         "n = Shape<end=1>(x) one = Constant<value_ints=[1]>() s = Concat<axis=0>(n, one)"
         "i = ConstantOfShape<value=int64[1]{-1}>(s) y = ScatterElements<axis=1>(x, i, u)"),
    Case("scatter of an old operator set", "float[2,b] x, float[1,b] u", Y,
         "n = Shape(u) i = ConstantOfShape<value=int64[1]{1}>(n) y = Scatter(x, i, u)", opset=10),
    Case("one-hot out of range", "int64[a,b] i", Y, """d = Constant<value_int=2>()
         v = Constant<value_floats=[0.5,2.0]>() y = OneHot<axis=1>(i, d, v)"""),
    Case("top k", "float[a,9] x", "float y, int64 i", """k = Constant<value_ints=[3]>()
         y, i = TopK<axis=-1,largest=0>(x, k)"""),
    Case("arg max", X, "int64 y, int64 z", """
         y = ArgMax<axis=1>(x) z = ArgMin<axis=-1,keepdims=0>(x)"""),
    Case("running sums", X, "float y, float z", """k = Constant<value_int=1>()
         y = CumSum<exclusive=1,reverse=1>(x, k) z = CumSum<exclusive=1>(x, k)"""),
    Case("running sums of int32", "int32[a,b] x", "int32 y",
         "k = Constant<value_int=-1>() y = CumSum<reverse=1>(x, k)"),
    Case("range over an open size", "float[a,b] x", "int64 y", """
         n = Shape<start=1>(x) e = Squeeze(n)
         s = Constant<value_int=-1>() d = Constant<value_int=3>() y = Range(s, e, d)"""),
]  # fmt: skip
FUNCTIONS = (
    "Abs", "Acos", "Asin", "Atan", "Ceil", "Cos", "Cosh", "Exp", "Floor", "Identity", "Neg",
    "Reciprocal", "Relu", "Sign", "Sin", "Sinh", "Softsign", "Tan", "ThresholdedRelu",
)  # fmt: skip
ARITHMETIC = [
    Case("whole division towards zero", "int64[a,b] x", "int64 y, int64 z", """
         d = Constant<value_int=2>() y = Div(x, d) n = Constant<value_int=-3>() z = Div(n, d)"""),
    Case("division of sizes", "float[a,b,4] x", Y, """n = Shape<start=2>(x)
         d = Constant<value_ints=[2]>() h = Div(n, d) m = Constant<value_ints=[0,0,-1]>()
         s = Concat<axis=0>(m, h) y = Reshape(x, s)"""),
    Case("a number divided", X, Y, "one = Constant<value_float=3.0>() y = Div(one, x)"),
    Case("a number less a tensor", X, Y, "one = Constant<value_float=3.0>() y = Sub(one, x)"),
    Case("mod of whole numbers", "int64[a,b] x", "int64 y, int64 z", """
         d = Constant<value_int=3>() y = Mod(x, d) z = Mod<fmod=1>(x, d)"""),
    Case("fmod", "float[a,b] x, float[a,b] z", Y, "y = Mod<fmod=1>(x, z)"),
    Case("power of a type of its own", "float[a,b] x", Y,
         "d = Constant<value_int=2>() y = Pow(x, d)"),
    Case("power of whole numbers", "int64[a,b] x", "int64 y",
         "d = Constant<value_float=2.0>() y = Pow(x, d)"),
    Case("cast truncates", "float[a,b] x", "int32 y, bool z", """two = Constant<value_float=2.5>()
         w = Mul(x, two) y = Cast<to=6>(w) z = Cast<to=9>(w)"""),
    Case("cast of bool and like", "bool[a,b] x, float[a] l", Y, "y = CastLike(x, l)"),
    Case("cast to half", "float[a,b] x", "float16 y", "y = Cast<to=10>(x)"),
    Case("round to even", "int64[a,b] x", Y, """h = Cast<to=1>(x) two = Constant<value_float=2.0>()
         d = Div(h, two) y = Round(d)"""),
    Case("clip attributes", X, Y, "y = Clip<min=-0.5,max=0.25>(x)", opset=10),
    Case("clip above alone", X, Y, "h = Constant<value_float=0.25>() y = Clip(x, , h)"),
    Case("max of three", "float[a,b] x, float[b] z", Y, """
         h = Constant<value_float=0.1>() y = Max(x, z, h)"""),
    Case("sum and mean", "float[a,b] x, float[b] z", "float y, float w",
         "y = Sum(x, z, x) w = Mean(x, z)"),
    Case("other comparisons", "float[a,b] x, float[b] z", "bool y, bool w",
         "y = Greater(x, z) w = LessOrEqual(x, z)"),
    Case("functions", "float[a,b] x", ", ".join(f"float y{name}" for name in FUNCTIONS),
         "s = Tanh(x) " + " ".join(f"y{name} = {name}(s)" for name in FUNCTIONS)),
    Case("logarithm", "float[a,b] x", Y, "p = Abs(x) y = Log(p)"),
    Case("dropout in use", X, Y, "y = Dropout(x)"),
    Case("swish", X, Y, "y = Swish<alpha=0.5>(x)", opset=24),
    Case("comparisons", "float[a,b] x", "bool y, bool z", """h = Constant<value_float=0.0>()
         p = Less(x, h) q = GreaterOrEqual(x, h) y = Xor(p, q) r = Not(p) z = And(r, q)"""),
    Case("where by a number", "bool[a,b] c, float[a,b] x", Y,
         "low = Constant<value_float=-3.4e38>() y = Where(c, x, low)"),
    Case("where of two numbers", "bool[a,b] c", Y, """low = Constant<value_float=-inf>()
         zero = Constant<value_float=0.0>() y = Where(c, zero, low)"""),
    Case("infinities", "float[a,b] x", "bool y, bool z", """o = Constant<value_float=0.0>()
         d = Div(x, o) y = IsInf<detect_negative=0>(d) n = Sub(d, d) z = IsNaN(n)"""),
    Case("activations", X, Y, """p = Erf(x) q = Tanh(p) r = Sigmoid(q) s = LeakyRelu<alpha=0.2>(x)
         t = Elu<alpha=0.5>(s) u = HardSigmoid(t) v = Softplus(u) w = Selu(x) z = Mish(w)
         k = HardSwish(z) y = Sum(r, v, k)"""),
    Case("gelu", X, "float y, float z", 'y = Gelu(x) z = Gelu<approximate="tanh">(x)', opset=20),
    Case("a slope for each channel", X, Y, "y = PRelu(x, w)",
         weights="float[4] w = {0.1,0.2,0.3,0.4}"),
    Case("scale as TorchScript spells it", X, Y, """n = Shape(x) i = Constant<value_ints=[-1]>()
         d = Gather(n, i) f = Cast<to=1>(d) r = Sqrt(f) one = Constant<value_float=1.0>()
         s = Div(one, r) q = Sqrt(s) y = Mul(x, q)"""),
    Case("sizes as numbers", X, Y, "n = Size(x) f = Cast<to=1>(n) y = Div(x, f)"),
]  # fmt: skip
REDUCE = ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
REDUCTIONS = [
    Case(f"reduce {what}", X, "float y, float z",
         f"{axes} y = ReduceMean{body} z = ReduceMax{body}", opset)
    for what, opset, axes, body in (
        ("from the end", 11, "", "<axes=[-1]>(x)"),
        ("all", 18, "", "<keepdims=0>(x)"),
        ("axes of an input", 18, "k = Constant<value_ints=[0,-1]>()", "<keepdims=0>(x, k)"),
        ("none", 18, "k = Constant<value_ints : ints = []>()", "<noop_with_empty_axes=1>(x, k)"),
    )
] + [
    Case("every reduction", X, ", ".join(f"float y{op}" for op in REDUCE), """
         k = Constant<value_ints=[0,-1]>() """
         + " ".join(f"y{op} = Reduce{op}(x, k)" for op in REDUCE)),
    Case("logarithm of a sum", X, Y, "p = Exp(x) y = ReduceLogSum(p)"),
    Case("reduce sum of int32", "int32[a,b] x", "int32 y", """
         k = Constant<value_ints=[1]>() y = ReduceSum(x, k)"""),
    Case("product of sizes", X, Y, """n = Shape<start=1>(x) p = ReduceProd<keepdims=1>(n)
         m = Constant<value_ints=[-1]>() s = Concat<axis=0>(m, p) y = Reshape(x, s)"""),
]  # fmt: skip
W = "float[4,3] w = {1,2,3,4,5,6,7,8,9,1,2,3}, float[3] v = {1,2,3}"
LINEARS = [
    Case("matmul and add", X, Y, "p = MatMul(x, w) y = Add(v, p)", weights=W),
    Case("matmul of a vector", "float[4] x", Y, "y = MatMul(x, w)", weights=W),
    Case("gemm", "float[a,4] x", Y, "y = Gemm<alpha=0.5,beta=2.0>(x, w, v)", weights=W),
    Case("gemm transposed", "float[3,a] x", Y, "y = Gemm<transA=1,transB=1>(x, w)", weights=W),
    Case("gemm with a matrix added", "float[a,4] x, float[a,1] z", Y, "y = Gemm(x, w, z)",
         weights=W),
    Case("gemm with a number added", "float[a,4] x", Y,
         "z = Constant<value_float=2.0>() y = Gemm(x, w, z)", weights=W),
    Case("einsum", "float[a,b,4] x, float[a,c,4] z", Y,
         'y = Einsum<equation="b q d, b k d -> b q k">(x, z)'),
    Case("conv", "float[a,2,9] x, float[3,2,3] k", Y,
         "y = Conv<strides=[2],pads=[1,2],dilations=[2]>(x, k)"),
    Case("conv in groups", "float[a,2,b,c] x, float[4,1,3,2] k, float[4] z", Y, """
         y = Conv<group=2,pads=[1,1,1,1]>(x, k, z)"""),
    Case("conv same", "float[a,2,7,7] x, float[3,2,2,2] k", "float y, float z", """
         y = Conv<auto_pad="SAME_LOWER",strides=[2,2]>(x, k)
         z = Conv<auto_pad="SAME_UPPER">(x, k)"""),
    Case("max pool", "float[a,2,7,9] x", Y, """
         y = MaxPool<kernel_shape=[3,2],strides=[2,2],pads=[0,1,1,0],ceil_mode=1>(x)"""),
    Case("average pool", "float[a,2,7,9] x", "float y, float z", """
         y = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(x)
         z = AveragePool<kernel_shape=[3,2],pads=[1,0,1,0],count_include_pad=1>(x)"""),
    Case("global pool", "float[a,2,b,c] x", "float y, float z",
         "y = GlobalAveragePool(x) z = GlobalMaxPool(x)"),
]  # fmt: skip
NORMS = [
    Case("softmax of an old operator set", X, "float y, float z",
         "y = Softmax(x) z = LogSoftmax<axis=-1>(x)", opset=11),
    Case("softmax along an axis", X, "float y, float z", "y = Softmax<axis=1>(x) z = Softmax(x)"),
    Case("layer norm", X, Y, "y = LayerNormalization<epsilon=0.01>(x, w, v)",
         weights="float[4] w = {1,2,3,4}, float[4] v = {4,3,2,1}"),
    Case("layer norm of two axes", "float[a,2,2] x", Y, "y = LayerNormalization<axis=1>(x, w)",
         weights="float[2,2] w = {1,2,3,4}"),
    Case("layer norm spelled out", X, Y, """m = ReduceMean<axes=[-1]>(x) d = Sub(x, m)
         two = Constant<value_float=2.0>() s = Pow(d, two) v = ReduceMean<axes=[-1]>(s)
         e = Constant<value_float=1e-5>() t = Add(v, e) r = Sqrt(t) y = Div(d, r)""", opset=14),
    Case("rms norm", X, Y, "y = RMSNormalization<epsilon=0.01>(x, w)", opset=23,
         weights="float[4] w = {1,2,3,4}"),
    Case("rms norm as ONNX Runtime spells it", X, Y, "y = SimplifiedLayerNormalization(x, w)",
         opset=17, weights="float[4] w = {1,2,3,4}"),
    Case("group norm of channels", "float[a,4,b] x", Y,
         "y = GroupNormalization<num_groups=2>(x, w, v)", opset=21,
         weights="float[4] w = {1,2,3,4}, float[4] v = {4,3,2,1}"),
    Case("instance norm", "float[a,2,b] x", Y, "y = InstanceNormalization(x, w, v)",
         weights="float[2] w = {1,2}, float[2] v = {4,3}"),
    Case("batch norm", "float[a,2,b] x", Y, "y = BatchNormalization(x, w, v, v, w)",
         weights="float[2] w = {1,2}, float[2] v = {4,3}"),
    Case("lp norm", X, "float y, float z", """
         y = LpNormalization<p=1>(x) z = LpNormalization<axis=1>(x)"""),
]  # fmt: skip
Q = "float[a,4,b,6] q, float[a,2,c,6] k, float[a,2,c,6] v"
ATTENTION = [
    Case("attention of grouped queries", Q, Y, "y = Attention<scale=0.3>(q, k, v)", opset=23),
    Case("causal attention", "float[a,2,b,6] q, float[a,2,b,6] k", Y,
         "y = Attention<is_causal=1>(q, k, k)", opset=23),
    Case("attention with a mask", f"{Q}, float[a,1,b,c] m", Y, "y = Attention(q, k, v, m)",
         opset=23),
    Case("attention with heads in one", "float[a,b,12] q, float[a,c,6] k, bool[b,c] m", Y, """
         t = Constant<value_ints=[1]>() w = Cast<to=9>(t) n = Or(m, w)
         y = Attention<q_num_heads=4,kv_num_heads=2>(q, k, k, n)""", opset=23),
    Case("rotary embedding", "float[a,2,b,6] x, float[a,b,3] c, float[a,b,3] s", Y,
         "y = RotaryEmbedding(x, c, s)", opset=23),
    Case("rotary embedding of a part", "float[a,b,12] x, float[9,2] c, float[9,2] s", Y, """
         n = Shape<start=0,end=2>(x) i = ConstantOfShape<value=int64[1]{3}>(n)
         y = RotaryEmbedding<num_heads=2,rotary_embedding_dim=4,interleaved=1>(x, c, s, i)""",
         opset=23),
]  # fmt: skip
HALVES = "float[4] w = {1,2,3,4}, float[4] v = {4,3,2,1}, float[4] u = {0.1,0.2,0.3,0.4}"
MICROSOFT = [
    Case(name, takes, gives, body, domain="com.microsoft", weights=weights)
    for name, takes, gives, body, weights in (
        ("gelus", X, "float y, float z, float q", """p = com.microsoft.Gelu(x)
            y = com.microsoft.BiasGelu(p, w)
            z = com.microsoft.FastGelu(x, w) q = com.microsoft.QuickGelu(x)""", HALVES),
        ("skip layer norm", X, "float y, float s", """
            y, m, i, s = com.microsoft.SkipLayerNormalization<epsilon=0.01>(x, x, w, v, u)""",
         HALVES),
        ("skip rms norm", X, Y, """
            y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.01>(x, x, w, u)""",
         HALVES),
("embeddings", "int32[a,b] i", Y, """
            two = Constant<value=int32[1]{2}>() k = Mod(i, two)
            one = Constant<value=int32[1]{1}>() h = Equal(k, one) q = Cast<to=6>(h)
            e, m = com.microsoft.EmbedLayerNormalization(k, k, w, p, s, v, u, q)
            y = com.microsoft.MultiHeadAttention<num_heads=2>(e, e, e, , m)""",
         "float[2,4] w = {1,2,3,4,5,6,8,9}, float[9,4] p = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,"
         "2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}, float[2,4] s = {3,1,4,1,5,9,2,6}, "
         "float[4] v = {1,2,3,4}, float[4] u = {4,3,2,1}"),
                ("fused matmul", "float[a,b,4] x, float[a,c,4] z", Y,
         "y = com.microsoft.FusedMatMul<transB=1,alpha=0.5>(x, z)", ""),
        ("fused gemm", "float[a,4] x", Y, """
            y = com.microsoft.FusedGemm<activation="Tanh",beta=0.5>(x, w, v)""", W),
        ("multi-head attention", "float[a,b,6] q, float[a,c,6] k, float[a,1,b,c] m", Y, """
            y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, k, d, , m)""",
         "float[18] d = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}"),
        ("fused attention", "float[a,b,2] x, int32[a,b] i", Y, """
            one = Constant<value=int32[1]{1}>() p = Mul(i, i) m = Min(p, one)
            y = com.microsoft.Attention<num_heads=2>(x, w, d, m)""",
         "float[2,6] w = {1,2,3,4,5,6,1,3,5,2,4,6}, float[6] d = {1,2,3,4,5,6}"),
    )
]  # fmt: skip
CASES = [
    *MOVES, *SLICES, *PADS, *INDICES, *ARITHMETIC, *REDUCTIONS, *LINEARS, *NORMS, *ATTENTION,
    *MICROSOFT,
]  # fmt: skip


REFUSED = [
    Case("an op of another domain", X, Y, "y = org.example.Magic(x)", domain="org.example",
         says="the ONNX op org.example.Magic (opset 1) of node"),
    Case("a quantised product", "uint8[a,4] x", "int32 y", "y = MatMulInteger(x, w)",
         weights="uint8[4,2] w = {1,2,3,4,5,6,7,8}", says="MatMulInteger"),
    Case("a loop", "int64 n, float[a,b] x", Y, """c = Constant<value=bool{1}>()
         y = Loop(n, c, x) <body = l (int64 i, bool t, float[a,b] p) => (bool u, float[a,b] q) {
         u = Identity(t) q = Neg(p) }>""", says="the ONNX op Loop"),
    Case("a branch that values choose", "bool c, float[a,b] x", Y, """
         y = If(c) <then_branch = t () => (float p) { p = Neg(x) },
                    else_branch = e () => (float q) { q = Exp(x) }>""",
         says="which branch it takes depends on values"),
    Case("a shape of values", "float[a,4] x, int64[2] s", Y, "y = Reshape(x, s)",
         says="its sizes depend on values"),
    Case("counting down an open axis", X, Y, """s = Constant<value_ints=[-2]>()
         e = Constant<value_ints=[0]>() k = Constant<value_ints=[1]>()
         d = Constant<value_ints=[-1]>() y = Slice(x, s, e, k, d)""",
         says="it counts down along an open axis"),
    Case("an open size split", X, "float y, float z", "y, z = Split<axis=0,num_outputs=2>(x)",
         says="an open size is split"),
    Case("a mean of whole numbers", "int32[a,b] x", "int32 y", "y = ReduceMean(x)",
         says="a mean of whole numbers"),
    Case("dropout in training", X, Y, """r = Constant<value_float=0.5>()
         t = Constant<value=bool{1}>() y = Dropout(x, r, t)""", says="it drops elements"),
    Case("statistics of a norm", X, "float y, float m", "y, m = LayerNormalization(x, w)",
         weights="float[4] w = {1,2,3,4}", says="its mean or deviation is read"),
    Case("a cached attention", "float[a,2,b,6] q, float[a,2,c,6] k", Y, """
         y, p, r = Attention(q, q, q, , k, k) """, opset=23, says="caches and scores"),
]  # fmt: skip
"""``says`` is a part of the error."""
