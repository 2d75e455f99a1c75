"""Exact algebra with names: every number is a polynomial over the rationals, known by its id.

    symbols      x₀, x₁, …                      inputs, weights, free parameters
    inverses     t with t · det A = 1            A⁻¹ = t adj A
    functions    f(p₁, …, pₙ)                    a new symbol for each name and list of arguments

A polynomial is kept in normal form modulo the relations t · det A = 1, so two numbers are equal as
rational functions of the symbols exactly if they have the same id. The relations are a Gröbner
basis as long as their leading monomials have no symbol in common (Buchberger's first criterion),
which is checked. A function that is not interpreted (a softmax, a root) is equal to itself at equal
arguments and to nothing else; what is proved so holds for any function in its place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from sympy import QQ, Symbol
from sympy.polys.matrices import DomainMatrix
from sympy.polys.orderings import lex
from sympy.polys.rings import PolyElement, PolyRing

ZERO, ONE = 0, 1
"""Ids of 0 and 1: a tensor of plain zeros and ones is a tensor of ids already."""


class Polynomials:
    """A table of polynomials that grows by symbols and by results."""

    def __init__(self) -> None:
        self.ring = PolyRing([], QQ, lex)
        self.elements: list[PolyElement] = []
        self.ids: dict[PolyElement, int] = {}
        self.relations: list[PolyElement] = []
        self._products: dict[tuple[int, int], int] = {}
        self.determinants: dict[int, PolyElement] = {}
        """det A for the index of each symbol that stands for 1 / det A."""
        self._inverses: dict[tuple[int, ...], list[list[int]]] = {}
        self._functions: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for number in (0, 1):
            self.number(number)

    def symbols(self, names: Sequence[str]) -> list[int]:
        """Ids of new symbols."""
        clash = {str(symbol) for symbol in self.ring.symbols} & set(names)
        if clash or len(set(names)) < len(names):
            raise ValueError(f"symbols {sorted(clash) or names} exist already: give others")
        first = self.ring.ngens
        new = [Symbol(name) for name in names]
        self.ring = PolyRing([*self.ring.symbols, *new], QQ, lex)
        self.elements = [self._lift(element) for element in self.elements]
        self.relations = [self._lift(element) for element in self.relations]
        self.ids = {element: at for at, element in enumerate(self.elements)}
        return [self._name(generator) for generator in self.ring.gens[first:]]

    def number(self, value: float | Fraction) -> int:
        """The id of a rational number; a float is one."""
        exact = Fraction(value)
        return self._name(self.ring.ground_new(QQ(exact.numerator, exact.denominator)))

    def add(self, a: int, b: int, times: int = 1) -> int:
        """a + times · b"""
        return self._name(self.elements[a] + times * self.elements[b])

    def multiply(self, a: int, b: int) -> int:
        key = (a, b) if a < b else (b, a)
        if key not in self._products:
            self._products[key] = self._name(self.elements[a] * self.elements[b])
        return self._products[key]

    def dot(self, a: Sequence[int], b: Sequence[int]) -> int:
        """Σ aᵢ bᵢ"""
        total = self.ring.zero
        for i, j in zip(a, b, strict=True):
            if ZERO not in (i, j):
                total += self.elements[self.multiply(i, j)]
        return self._name(total)

    def total(self, terms: Sequence[int]) -> int:
        return self._name(sum((self.elements[i] for i in terms), self.ring.zero))

    def apply(self, name: str, arguments: Sequence[int], results: int = 1) -> list[int]:
        """``results`` values of a function that is not interpreted."""
        key = (name, tuple(arguments))
        if key not in self._functions:
            at = len(self._functions)
            self._functions[key] = self.symbols([f"{name}_{at}_{i}" for i in range(results)])
        return self._functions[key]

    def inverse(self, matrix: Sequence[Sequence[int]]) -> list[list[int]]:
        """A⁻¹ = t adj A, with a symbol t for 1 / det A: A is taken to be invertible.

        Raises:
            ValueError: det A is 0, or is not independent of the determinants before it.
        """
        key = tuple(itertools.chain.from_iterable(matrix))
        if key in self._inverses:
            return self._inverses[key]
        size = len(matrix)
        rows = [[self.elements[i] for i in row] for row in matrix]
        domain = self.ring.to_domain()
        adjugate, determinant = DomainMatrix(rows, (size, size), domain).adj_det()
        if not determinant:
            raise ValueError("a matrix is singular whatever its symbols are")
        for other in self.determinants.values():
            if any(a and b for a, b in zip(determinant.LM, other.LM, strict=False)):
                raise ValueError("determinants share a leading symbol: no normal form is known")
        self.symbols([f"t{len(self.determinants)}"])
        t, index = self.ring.gens[-1], self.ring.ngens - 1
        self.determinants[index] = determinant = self._lift(determinant)
        self.relations.append(t * determinant - 1)
        entries = [[t * self._lift(entry) for entry in row] for row in adjugate.to_list()]
        self._inverses[key] = [[self._name(entry) for entry in row] for row in entries]
        return self._inverses[key]

    def evaluate(self, at: int, values: Mapping[str, float]) -> float:
        """The polynomial ``at`` in float64, given a number for every symbol that is not 1 / det."""
        numbers = [values.get(str(symbol), 0.0) for symbol in self.ring.symbols]
        for index, determinant in self.determinants.items():
            numbers[index] = 1 / _value(determinant, numbers)
        return _value(self.elements[at], numbers)

    def _lift(self, element: PolyElement) -> PolyElement:
        """The same polynomial in the ring as it is now."""
        more = (0,) * (self.ring.ngens - element.ring.ngens)
        return self.ring.from_dict({(*m, *more): c for m, c in element.items()})

    def _name(self, element: PolyElement) -> int:
        if self.relations:
            element = element.rem(self.relations)
        if element not in self.ids:
            self.ids[element] = len(self.elements)
            self.elements.append(element)
        return self.ids[element]


def _value(element: PolyElement, numbers: Sequence[float]) -> float:
    return math.fsum(
        float(c) * math.prod(n**e for n, e in zip(numbers, monomial, strict=False) if e)
        for monomial, c in element.items()
    )
