"""The sample project has a pytest run of its own (``test_sample.py``)."""

collect_ignore = ["sample"]
