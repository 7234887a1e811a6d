"""Proves that implementations of Mistral agree with the float64 specification of `mistral_core.reference`.

A case is data (`cases.py`), a piece is what is compared, from small to large (`pieces.py`), a backend is an adapter
of a few methods (`adapters/`), a tolerance has a reason (`tolerances.py`), and `meta/` plants errors that the suite
must find.
"""
