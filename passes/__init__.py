"""The passes of the pipeline, one file each: graphs in, graphs out.

A pass is a file ``verb_noun.py`` with one main function of the same name. It states its algebra or
the graph before and after, what it requires and what it leaves. The algebra itself
(``choose_basis``, ``change_basis``, ``predict_noise``) knows tensors only. Nothing here knows the
API, the backend or the exporters; ``bda_fx.pipeline`` calls the passes in order.

This folder is the import package ``bda_fx.passes``, in a checkout by way of the link
``bda_fx/passes``. Under a second name every class in it would exist twice, and ``isinstance``
would fail between the two.
"""

if __name__ != "bda_fx.passes":
    raise ImportError(
        f"this package is bda_fx.passes, but was imported as {__name__!r}: "
        "write `import bda_fx.passes`, and if that is not found, run `pip install -e .` "
        "in the repository root"
    )
