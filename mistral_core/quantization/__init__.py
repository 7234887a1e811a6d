"""What packed numbers mean: the schemes that configs name, and arrays of packed numbers as floats."""

from .schemes import Scheme as Scheme
