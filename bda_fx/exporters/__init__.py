"""Ways out of Python: ONNX, TensorRT engines, AOTInductor packages, each with its evidence.

    export_onnx.py        (translate_onnx.py, spell_complex.py, spell_sums.py, check_onnx.py,
                           measure_onnx.py, run_onnx.py, time_sites.py)
    export_tensorrt.py    (build_engine.py)
    export_aoti.py

They share ``rewrite_pair`` (original and rewritten program), ``prove`` (noise of both in one
runtime), ``meet_budget`` (smaller bases until the proof holds), ``time_pairs`` (interleaved
timing), ``place_output`` (all files or none) and ``exported`` (what is returned, and written beside
the artefact). Heavy packages are imported where they are used.
"""
