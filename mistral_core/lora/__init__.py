"""LoRA adapters in peft's files: what they change, read and written in NumPy, whichever framework trains or runs them.

W' = W + s B A            (LoRA, arXiv 2106.09685)
W' = m (W + s B A) / |W + s B A|, by rows            (DoRA, arXiv 2402.09353)
"""
