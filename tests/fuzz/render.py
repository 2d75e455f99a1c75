"""From a :class:`Spec` to the source of a module, and to where the features of its heads lie."""

from __future__ import annotations

from dataclasses import dataclass

from tests.fuzz.grammar import Spec

B, TOKENS, MEMORY, PAST = 2, 5, 7, 3
COLUMN = {"q": 0, "k": 1, "v": 2, "out": 3}  # of the input, that masks each part


@dataclass(frozen=True)
class Rows:
    """Where one projection lies: ``weight[row]`` makes feature d of head h, row = ``at(h, d)``."""

    weight: str
    bias: str | None
    first: int
    by_head: int
    by_feature: int = 1

    def at(self, head: int, feature: int) -> int:
        return self.first + head * self.by_head + feature * self.by_feature


def rows_of(spec: Spec) -> dict[str, Rows]:
    """The rows of q, k and v in the parameters of the module."""
    h, g, d = spec.heads, spec.kv_heads, spec.head_dim
    bias = None if spec.bias == "none" else "b"
    if spec.fused == "chunk":
        firsts = {"q": 0, "k": h * d, "v": (h + g) * d}
        return {p: Rows("w_qkv", bias and "b_qkv", first, d) for p, first in firsts.items()}
    if spec.fused == "interleaved":  # one group: its queries, its key, its value
        per = (h // g + 2) * d
        firsts = {"k": h // g * d, "v": (h // g + 1) * d}
        found = {p: Rows("w_qkv", bias and "b_qkv", first, per) for p, first in firsts.items()}
        return {"q": Rows("w_qkv", bias and "b_qkv", 0, d), **found}
    if spec.fused == "kv":
        return {
            "q": Rows("w_q", bias and "b_q", 0, d),
            "k": Rows("w_kv", bias and "b_kv", 0, 2 * d),
            "v": Rows("w_kv", bias and "b_kv", d, 2 * d),
        }
    found = {p: Rows(f"w_{p}", bias and f"b_{p}", 0, d) for p in "qkv"}
    if spec.shared == "kq":
        found["k"] = found["q"]
    if spec.shared == "kv":
        found["v"] = found["k"]
    return found


def query_row(spec: Spec, head: int) -> int:
    """The row block of query head ``head`` (interleaved: with the gaps of keys and values)."""
    if spec.fused != "interleaved":
        return head * spec.head_dim
    times = spec.heads // spec.kv_heads
    return (head // times * (times + 2) + head % times) * spec.head_dim


def group_of(spec: Spec, head: int) -> int:
    """The key head that a query head meets."""
    times = spec.heads // spec.kv_heads
    return head % spec.kv_heads if spec.repeat == "repeat" else head // times


class _Source:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.rows = rows_of(spec)
        self.sizes = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        self.init: dict[str, str] = {}
        self.body: list[str] = []

    # -- parameters ---------------------------------------------------------------------------

    def parameter(self, name: str, *shape: int) -> str:
        self.init.setdefault(name, f"parameter({', '.join(map(str, shape))})")
        return f"self.{name}"

    def say(self, line: str) -> None:
        self.body.append(line)

    # -- projections --------------------------------------------------------------------------

    def project(
        self, part: str, x: str, width: int, weight: str, bias: str | None, out: int
    ) -> str:
        """``part = x Wᵀ + b`` in the spelling asked for."""
        w = self.parameter(weight, out, width)
        spelling = getattr(self.spec, f"spell_{part if part in 'qkvo' else 'q'}")
        add = ""
        if bias is not None:
            b = self.parameter(bias, out)
            if self.spec.bias == "fused" and spelling in ("linear", "addmm", "conv"):
                add = b
            elif spelling in ("conv", "left"):
                add = f"{b}[:, None]"
            else:
                add = b
        target = part
        fused = self.spec.bias == "fused"
        if spelling == "linear":
            self.say(f"{target} = F.linear({x}, {w}{', ' + add if add and fused else ''})")
            if add and not fused:
                self.say(f"{target} = {target} + {add}")
        elif spelling == "addmm" and add and fused:
            self.say(f"{target} = torch.addmm({add}, {x}.reshape(-1, {width}), {w}.t())")
            self.say(f"{target} = {target}.view({x}.shape[0], {x}.shape[1], {out})")
        elif spelling == "conv":
            extra = f", {add}" if add and fused else ""
            self.say(f"{target} = F.conv1d({x}.transpose(1, 2), {w}[:, :, None]{extra})")
            if add and not fused:
                self.say(f"{target} = {target} + {add}")
            self.say(f"{target} = {target}.transpose(1, 2)")
        elif spelling == "left":
            self.say(f"{target} = {w} @ {x}.transpose(1, 2)")
            if add:
                self.say(f"{target} = {target} + {add}")
            self.say(f"{target} = {target}.transpose(1, 2)")
        elif spelling == "einsum":
            self.say(f'{target} = torch.einsum("bte,fe->btf", {x}, {w})')
            if add:
                self.say(f"{target} = {target} + {add}")
        elif spelling == "heads" and out % self.spec.head_dim == 0 and part in "qkv":
            d = self.spec.head_dim
            self.say(
                f'{target} = torch.einsum("bte,hde->bthd", {x}, {w}.view({out // d}, {d}, {width}))'
            )
            self.say(f"{target} = {target}.flatten(2)")
            if add:
                self.say(f"{target} = {target} + {add}")
        else:
            self.say(f"{target} = {x} @ {w}.t()")
            if add:
                self.say(f"{target} = {target} + {add}")
        return target

    def source_of_keys(self) -> str:
        return "memory" if self.spec.cross else "x"

    def projections(self) -> None:
        spec, d = self.spec, self.spec.head_dim
        h, g, e = spec.heads, spec.kv_heads, spec.width
        keys, width = self.source_of_keys(), e
        if spec.low_rank:
            down = self.parameter("w_down", 7, e)
            self.say(f"latent = F.layer_norm(F.linear({keys}, {down}), (7,))")
            keys, width = "latent", 7
        r = self.rows
        if spec.fused in ("chunk", "interleaved"):
            self.project("q", "x", e, "w_qkv", r["q"].bias, (h + 2 * g) * d)
            self.say("qkv = q")
            if spec.fused == "chunk":
                self.say(f"q, k, v = qkv.split([{h * d}, {g * d}, {g * d}], -1)")
            else:
                times = h // g
                self.say(f"qkv = qkv.unflatten(-1, ({g}, {times + 2}, {d}))")
                self.say(f"q = qkv[:, :, :, :{times}].flatten(2)")
                self.say(
                    f"k, v = qkv[:, :, :, {times}].flatten(2), qkv[:, :, :, {times + 1}].flatten(2)"
                )
        elif spec.fused == "kv":
            self.project("q", "x", e, "w_q", r["q"].bias, h * d)
            self.project("k", keys, width, "w_kv", r["k"].bias, 2 * g * d)
            self.say(f"k, v = k.unflatten(-1, ({g}, 2, {d})).unbind(3)")
            self.say("k, v = k.flatten(2), v.flatten(2)")
        else:
            self.project("q", "x", e, "w_q", r["q"].bias, h * d)
            if spec.shared == "kq":
                self.project("k", keys, e, "w_q", r["q"].bias, h * d)
            else:
                self.project("k", keys, width, "w_k", r["k"].bias, g * d)
            if spec.shared == "kv":
                self.say("v = k")
            else:
                self.project("v", keys, width, "w_v", r["v"].bias, g * d)

    # -- between the projections and the attention --------------------------------------------

    def split(self, part: str) -> None:
        n, d, layout = self.sizes[part], self.spec.head_dim, self.spec.layout
        if layout == "permute":
            self.say(f"{part} = {part}.unflatten(-1, ({n}, {d})).permute(0, 2, 1, 3)")
        elif layout == "movedim":
            self.say(f"{part} = {part}.reshape(*{part}.shape[:2], {n}, {d}).movedim(1, 2)")
        elif layout == "stack":
            self.say(f"{part} = torch.stack({part}.split({d}, -1), 1)")
        else:
            self.say(
                f"{part} = {part}.view({part}.shape[0], {part}.shape[1], {n}, {d}).transpose(1, 2)"
            )

    def change(self, part: str, what: str) -> None:
        """One op on heads [B, heads, tokens, D]."""
        n, d = self.sizes[part], self.spec.head_dim
        simple = {
            "scale": f"{part} * 0.7",
            "scale_heads": f"{part} * torch.arange(1, {n + 1}).view({n}, 1, 1)",
            "scale_tokens": f"{part} * torch.arange(1, {part}.shape[2] + 1)[:, None]",
            "scale_features": f"{part} * torch.arange(1, {d + 1})",
            "scale_halves": f"torch.cat([{part}[..., :2] * 2, {part}[..., 2:] * 3], -1)",
            "relu": f"torch.relu({part})",
            "roll_tokens": f"{part}.roll(1, 2)",
            "add_shifted": f"{part} + {part}.roll(1, 2)",
            "round_trip": f"{part}.to(torch.float64).contiguous()",
            "zero_feature": f"F.pad({part}[..., 1:], (1, 0))",
            "norm": f"{part} * torch.rsqrt({part}.square().mean(-1, keepdim=True) + 1e-3)",
            **self.treatments(part, "x" if part == "q" else self.source_of_keys()),
        }
        x = "x" if part == "q" else self.source_of_keys()
        writes = {
            "in_place": "[..., 0].mul_(2.0)",
            "mask_in_place": f"[({x}[..., {COLUMN[part]}] > 0)[:, None].expand(-1, {n}, -1)] = 0",
            "zero_token": "[:, :, 0] = 0",
            "zero_part": "[:, :, 0, :2] = 0",
        }
        if what == "none":
            return
        if what == "add_constant":
            self.say(f"{part} = {part} + {self.parameter(f'c_{part}', n, 1, d)}")
        elif what == "add_linear":
            w = self.parameter(f"w_{part}2", n * d, self.spec.width)
            self.say(f"{part}2 = F.linear({x}, {w}).unflatten(-1, ({n}, {d})).transpose(1, 2)")
            self.say(f"{part} = {part} + 0.5 * {part}2")
        elif what == "add_input":
            self.say(f"{part} = {part} + {x}[:, None, :, :{d}]")
        elif what in writes:
            self.say(f"{part} = {part}.clone()")
            self.say(f"{part}{writes[what]}")
        else:
            self.say(f"{part} = {simple[what]}")

    def treatments(self, t: str, x: str) -> dict[str, str]:
        """Ops on heads ``t``, some of which treat all features of a head alike.

        Each part has a mask of its own, and each feature, so that no two are equal by accident.
        """
        d, column = self.spec.head_dim, COLUMN[t]
        mask = f"({x}[:, None, :, {column}:{column + 1}] > 0)"
        features = f"(torch.arange({t}.shape[2])[:, None] % {d} == torch.arange({d}))"
        return {
            "mask_tokens": f"{t}.masked_fill({mask}, 0.0)",
            "mask_expanded": f"torch.where(~{mask}.expand_as({t}), {t}, torch.zeros_like({t}))",
            "mask_features": f"torch.where({features}, {t}, 0.0)",
            "choose_shifted": f"torch.where({mask}, {t}, {t}.roll(1, 2))",
            "fill_ones": f"{t}.masked_fill({mask}, 1.0)",
            "lerp_shifted": f"torch.lerp({t}, {t}.roll(1, 2), {x}[:, None, :, :1].sigmoid())",
            "lerp_features": f"torch.lerp({t}, {t}.roll(1, 2), torch.arange({d}).to({t}) / {d})",
            "running_sum": f"{t}.cumsum(2)",
            "running_features": f"{t}.cumsum(-1)",
            "centre": f"{t} - {t}.mean(2, keepdim=True)",
            "centre_features": f"{t} - {t}.mean(-1, keepdim=True)",
            "pool": f"F.avg_pool1d({t}.mT.flatten(0, 1), 3, 1, 1).mT.unflatten(0, {t}.shape[:2])",
            "half_mean": f"torch.cat([{t}[..., :2].mean(2, keepdim=True).expand_as({t}[..., :2]), {t}[..., 2:]], -1)",
            "half_negated": f"torch.cat([0 - {t}[..., :2], {t}[..., 2:]], -1)",
            "half_difference": f"torch.cat([({t} + {t}.roll(1, 2))[..., :2], ({t} - {t}.roll(1, 2))[..., 2:]], -1)",
        }

    def rotate(self) -> None:
        kind, d = self.spec.rotary, self.spec.head_dim
        if kind == "none":
            return
        width = d if kind in ("half", "pairs") else 2
        width -= width % 2
        for part in "qk":
            where = f"{d - width}:" if kind == "last" else f":{width}"
            self.say(
                f"angle = torch.arange({part}.shape[2])[:, None] * torch.arange(1, {width // 2 + 1}) / 3"
            )
            self.say(f"turned = {part}[..., {where}]")
            if kind == "pairs":
                self.say("even, odd = turned[..., 0::2], turned[..., 1::2]")
                self.say("cos, sin = angle.cos(), angle.sin()")
                self.say(
                    "turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)"
                )
            else:
                half = width // 2
                self.say(
                    "cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))"
                )
                self.say(f"half = torch.cat([-turned[..., {half}:], turned[..., :{half}]], -1)")
                self.say("turned = turned * cos + half * sin")
            parts = (
                [f"{part}[..., :{d - width}]", "turned"]
                if kind == "last"
                else ["turned", f"{part}[..., {width}:]"]
            )
            self.say(f"{part} = torch.cat([{', '.join(parts)}], -1)")

    def permute(self) -> None:
        kind, d = self.spec.permuted, self.spec.head_dim
        if kind in ("q", "both"):
            self.say("q = q.flip(-1)")
        if kind in ("k", "both"):
            self.say(f"k = k[..., torch.arange({d - 1}, -1, -1)]")
        if kind == "heads" and self.spec.kv_heads > 1:  # the last head only
            self.say("k = torch.cat([k[:, :-1], k[:, -1:].flip(-1)], 1)")

    def repeat(self) -> None:
        h, g, d = self.spec.heads, self.spec.kv_heads, self.spec.head_dim
        if h == g or self.spec.repeat == "gqa":
            return
        for part in "kv":
            if self.spec.repeat == "repeat":
                self.say(f"{part} = {part}.repeat(1, {h // g}, 1, 1)")
            elif self.spec.repeat == "expand":
                self.say(
                    f"{part} = {part}[:, :, None].expand(-1, -1, {h // g}, -1, -1)"
                    f".reshape({part}.shape[0], {h}, {part}.shape[2], {d})"
                )
            else:
                self.say(f"{part} = {part}.repeat_interleave({h // g}, 1)")

    # -- the attention ------------------------------------------------------------------------

    def attention(self) -> None:
        spec = self.spec
        h, d = spec.heads, spec.head_dim
        if spec.scores == "sdpa":
            gqa = spec.repeat == "gqa" and spec.kv_heads < h
            self.say(
                f"out = F.scaled_dot_product_attention(q, k, v{', enable_gqa=True' if gqa else ''})"
            )
            return
        if spec.scores == "linear":
            self.say("out = q @ (k.transpose(-1, -2) @ v) / 5")
            return
        if spec.scores == "einsum":
            self.say('s = torch.einsum("bhid,bhjd->bhij", q, k)')
        elif spec.scores in ("bmm", "baddbmm"):
            flat = "flatten(0, 1)"
            if spec.scores == "bmm":
                self.say(
                    f"s = torch.bmm(q.{flat}, k.{flat}.transpose(1, 2)).unflatten(0, (-1, {h}))"
                )
            else:
                self.say(
                    "bias = torch.ones(q.shape[0] * q.shape[1], q.shape[2], k.shape[2], dtype=q.dtype)"
                )
                self.say(
                    f"s = torch.baddbmm(bias, q.{flat}, k.{flat}.transpose(1, 2), alpha=0.5)"
                    f".unflatten(0, (-1, {h}))"
                )
        else:
            self.say("s = q @ k.transpose(-1, -2)")
        if spec.second_query:
            w = self.parameter("w_second", h * d, spec.width)
            self.say(f"q2 = F.linear(x, {w}).unflatten(-1, ({h}, {d})).transpose(1, 2)")
            self.say("s = s + 0.3 * q2 @ k.transpose(-1, -2)")
        self.say(f"s = s / {d**0.5}")
        if spec.weights == "talking":
            self.say(f's = torch.einsum("bhij,hg->bgij", s, {self.parameter("mix", h, h)})')
        if spec.weights == "softcap":
            self.say("s = 3 * torch.tanh(s / 3)")
        if spec.weights == "alibi":
            self.say(
                f"s = s + torch.arange(s.shape[-1]) * torch.arange(1, {h + 1}).view({h}, 1, 1) / 9"
            )
        if spec.weights == "mask":
            self.say("s = s.masked_fill(torch.ones_like(s).tril() == 0, -1e9)")
        self.say("p = torch.sigmoid(s)" if spec.weights == "sigmoid" else "p = s.softmax(-1)")
        if spec.scores == "bmm":
            self.say(f"out = torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (-1, {h}))")
        else:
            self.say("out = p @ v")

    def change_out(self) -> None:
        h, d = self.spec.heads, self.spec.head_dim
        ops = {
            "gate_heads": "out * torch.sigmoid(x[:, None, :, :1])",
            "gate_features": f"out * torch.sigmoid(x[:, None, :, :{d}])",
            "gelu": "F.gelu(out)",
            "flip": "out.flip(-1)",
            "swap_heads": "out.flip(1)",
            **self.treatments("out", "x"),
        }
        if self.spec.change_out != "none":
            self.say(f"out = {ops[self.spec.change_out]}")
        if self.spec.extra == "residual":
            if self.spec.cross or self.spec.cached:
                return
            times = h // self.sizes["v"]
            self.say(
                "out = out + v"
                + (f".repeat_interleave({times}, 1)" if self.spec.repeat == "gqa" else "")
            )

    def output(self) -> None:
        h, d, e = self.spec.heads, self.spec.head_dim, self.spec.width
        self.say("z = out.transpose(1, 2)")
        self.say("flat = z.flatten(2)")
        self.project("o", "flat", h * d, "w_o", None if self.spec.bias == "none" else "b_o", e)
        self.say("y = o")
        results = []
        if self.spec.outputs == "two":
            self.say(f"o2 = F.linear(flat, {self.parameter('w_o2', 6, h * d)})")
            results.append("o2")
        if self.spec.outputs == "half_heads":
            self.say(f"o2 = F.linear(z[:, :, :1].flatten(2), {self.parameter('w_o2', 6, d)})")
            results.append("o2")
        if self.spec.outputs == "half_features":
            self.say(f"o2 = F.linear(z[..., :2].flatten(2), {self.parameter('w_o2', 6, 2 * h)})")
            results.append("o2")
        extra = {"k": "k", "v": "v", "out": "out", "weights": "p", "v_sum": "v.sum((0, 1))"}
        if self.spec.extra in extra:
            results.append(extra[self.spec.extra])
        if self.spec.shared == "other":
            self.say(
                f"other = {self.rows['k'].weight and 'self.' + self.rows['k'].weight}.square().sum()"
            )
            results.append("other")
        if self.spec.cached:
            results += ["past_k", "past_v"]
        self.results = results
        self.say(f"return {', '.join(['y', *results])}")

    def text(self) -> str:
        spec = self.spec
        self.projections()
        if spec.layout == "flat" and spec.scores == "sdpa" and spec.heads == spec.kv_heads:
            pass  # heads are joined with the batch where bmm does it
        for part in "qkv":
            self.split(part)
        for part in "qkv":
            self.change(part, getattr(spec, f"change_{part}"))
        self.rotate()
        self.permute()
        if spec.cached:
            self.say("k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)")
            self.say("past_k, past_v = k, v")
        self.repeat()
        self.attention()
        self.change_out()
        self.output()
        inputs = [
            "x",
            *(["memory"] if spec.cross else []),
            *(["past_k", "past_v"] if spec.cached else []),
        ]
        return self.module(inputs)

    def module(self, inputs: list[str]) -> str:
        spec = self.spec
        names = "".join(f"        self.{name} = {value}\n" for name, value in self.init.items())
        body = "".join(f"        {line}\n" for line in self.body)
        head = (
            "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n"
            "generator = torch.Generator().manual_seed(0)\n\n\n"
            "def randn(*shape):\n"
            "    return torch.randn(*shape, generator=generator, dtype=torch.float64)\n\n\n"
            "def parameter(*shape):\n"
            "    return nn.Parameter(randn(*shape) / shape[-1] ** 0.5)\n\n\n"
            "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"{names}\n    def layer(self, {', '.join(inputs)}):\n{body}\n"
            f"    def forward(self, {', '.join(inputs)}):\n"
        )
        if spec.layers == 1:
            head += f"        return self.layer({', '.join(inputs)})\n\n\n"
        else:  # one layer applied twice: its weights are shared
            many = bool(self.results)
            head += "        y = self.layer(x)\n"
            head += (
                f"        x = x + {'y[0]' if many else 'y'}\n        return y, self.layer(x)\n\n\n"
            )
        kv, d, e = spec.kv_heads, spec.head_dim, spec.width
        given = {
            "x": f"randn({B}, {TOKENS}, {e})",
            "memory": f"randn({B}, {MEMORY}, {e})",
            "past_k": f"randn({B}, {kv}, {PAST}, {d})",
            "past_v": f"randn({B}, {kv}, {PAST}, {d})",
        }
        head += "model = Model().eval()\n"
        head += f"inputs = ({', '.join(given[name] for name in inputs)},)\n"
        return head


def render(spec: Spec) -> str:
    """Source that defines ``model`` and ``inputs``, runnable as it stands."""
    return _Source(spec).text()
