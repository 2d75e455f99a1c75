"""Proofs: what the passes emit equals the original as rational functions of weights and inputs.

``polynomials`` does the algebra (sympy), ``execute`` runs torch code and graphs on it, ``prove``
runs a program and its rewrite and compares, ``cases`` lists a program for every form that the
passes can emit. ``identities`` proves the formulas themselves, for matrices of any size.
"""
