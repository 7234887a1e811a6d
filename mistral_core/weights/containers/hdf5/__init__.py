"""HDF5 files of weights, understood without the HDF5 library."""
